"""merge_attention, and attention ops that hand out float32: attention over keys that are divided among calls."""

from __future__ import annotations

import pytest
import torch

import llama_kernels as lk
from bench.attention_options import attention_options
from bench.estimate.bounds import Tally
from tests.support.judge import UNIT

forward = torch.ops.llama_kernels.attention_forward
backward = torch.ops.llama_kernels.attention_backward

SCALE = 0.3
BOUND = 4 * UNIT[torch.float32]  # parts and their sum: a few roundings of float32
SPLITS = [(0, 20), (20, 33), (33, 50)]  # of 50 keys


def heads(device, dtype=torch.float32, Sq: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = ((2, 4, Sq, 16), (2, 2, 50, 16), (2, 2, 50, 24))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def in_parts(q, k, v, attention, **options):
    parts = [attention(q, k[:, :, a:b], v[:, :, a:b], is_causal=False, return_lse=True, **options) for a, b in SPLITS]
    return zip(*parts, strict=True)


def test_parts_of_the_keys_merge_to_attention_over_all(device):
    tensors = [x.requires_grad_() for x in heads(device)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results = lk.merge_attention(*in_parts(*tensors, lk.attention))
    truth = lk.reference.attention(*exact, is_causal=False, return_lse=True)
    do, dlse = (torch.randn_like(x) for x in results)
    grads = torch.autograd.grad(results, tensors, (do, dlse))
    true_grads = torch.autograd.grad(truth, exact, (do.double(), dlse.double()))
    for i, (found, expected) in enumerate(zip((*results, *grads), (*truth, *true_grads), strict=True)):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < BOUND, (("out", "lse", "dq", "dk", "dv")[i], error)


def test_packed_parts_have_lse_by_head(device):
    q, k, v = (x[0].transpose(0, 1) for x in heads(device))
    cu_q = torch.tensor([0, 12], dtype=torch.int32, device=device)
    outs, lses = [], []
    for a, b in SPLITS:
        cu_k = torch.tensor([0, b - a], dtype=torch.int32, device=device)
        out, lse = lk.attention_varlen(q, k[a:b], v[a:b], cu_q, cu_k, 12, b - a, is_causal=False, return_lse=True)
        outs.append(out)
        lses.append(lse)
    out, lse = lk.merge_attention(outs, lses)
    dense = lk.attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=False, return_lse=True)
    torch.testing.assert_close(out, dense[0][0].transpose(0, 1))
    torch.testing.assert_close(lse, dense[1][0])


def test_rows_that_see_no_key_give_zero_and_have_finite_gradients(device):
    outs = [torch.zeros(1, 1, 3, 4, device=device, requires_grad=True) for _ in range(2)]
    lses = [torch.full((1, 1, 3), -torch.inf, device=device, requires_grad=True) for _ in range(2)]
    out, lse = lk.merge_attention(outs, lses)
    assert not out.any() and (lse == -torch.inf).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (*outs, *lses))


def test_two_float32_parts_move_20_bytes_an_element(device):
    """One is read and written, then both are read and the sum is written. A ring merges so once for each block."""
    outs = [torch.randn(1, 2, 64, 512, device=device) for _ in range(2)]
    lses = [torch.randn(1, 2, 64, device=device) for _ in range(2)]
    with Tally() as tally:
        out, _ = lk.merge_attention(outs, lses)
    assert sum(op.bytes for op in tally.ops) / out.numel() < 20.5  # lse is a 512th of it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_results_are_those_that_are_rounded(dtype, device):
    q, k, v = heads(device, dtype)
    rest = attention_options(12, 50, SCALE, right=None)
    out, lse = forward(q, k, v, *rest)
    wide, wide_lse = forward(q, k, v, *rest, torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), out) and torch.equal(wide_lse, lse)

    do = torch.randn_like(out)
    needed = (True, True, True, False, True)
    grads = backward(do, None, q, k, v, out, lse, *rest, *needed)
    wide_grads = backward(do, None, q, k, v, out, lse, *rest, *needed, torch.float32)
    for grad, wide_grad in zip(grads[:3], wide_grads[:3], strict=True):
        assert wide_grad.dtype == torch.float32 and torch.equal(wide_grad.to(dtype), grad)


def test_the_backward_of_a_part_of_the_keys_takes_out_and_lse_of_whole_rows(device):
    q, k, v = heads(device)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth = lk.reference.attention(*exact, is_causal=False, scale=SCALE)
    do = torch.randn_like(truth)
    true_grads = torch.autograd.grad(truth, exact, do)

    out, lse = lk.attention(q, k, v, is_causal=False, scale=SCALE, return_lse=True)
    shares = []
    for a, b in SPLITS:
        rest = attention_options(12, b - a, SCALE, right=None)
        needed = (True, True, True, False, True)
        shares.append(backward(do.float(), None, q, k[:, :, a:b], v[:, :, a:b], out, lse, *rest, *needed)[:3])
    dqs, dks, dvs = zip(*shares, strict=True)
    for found, expected in zip((sum(dqs), torch.cat(dks, 2), torch.cat(dvs, 2)), true_grads, strict=True):
        assert (found.double() - expected).norm() / expected.norm() < BOUND


@pytest.mark.parametrize(
    "outs, lses, error, text",
    [
        ([], [], ValueError, "outs is empty; wanted at least one part"),
        ([(1, 2, 3, 4)], [], ValueError, "lses is 0 tensors"),
        ([(1, 2, 3, 4)], [(1, 2, 4)], ValueError, r"lses\[0\] is of shape \(1, 2, 4\)"),
        ([(1, 2, 3, 4), (1, 2, 3, 5)], [(1, 2, 3)] * 2, ValueError, r"outs\[1\] is of shape \(1, 2, 3, 5\)"),
        ([(3, 4)], [(3,)], ValueError, r"outs\[0\] is of shape \(3, 4\)"),
    ],
    ids=str,
)
def test_bad_parts_are_named(outs, lses, error, text):
    with pytest.raises(error, match=text):
        lk.merge_attention([torch.zeros(shape) for shape in outs], [torch.zeros(shape) for shape in lses])
    with pytest.raises(TypeError, match=r"lses\[0\] is torch.float16"):
        lk.merge_attention([torch.zeros(1, 2, 3, 4)], [torch.zeros(1, 2, 3).half()])


@pytest.mark.parametrize(
    "outs, lses, got",
    [
        (torch.zeros(2, 1, 2, 3, 4), torch.zeros(2, 1, 2, 3), "outs is a Tensor"),
        ([torch.zeros(1, 2, 3, 4)], iter([torch.zeros(1, 2, 3)]), "lses is a list_iterator"),
        ([torch.zeros(1, 2, 3, 4), None], [torch.zeros(1, 2, 3)] * 2, r"outs\[1\] is None"),
        ([torch.zeros(1, 2, 3, 4)], [None], r"lses\[0\] is None"),
    ],
    ids=["a stack", "an iterator", "no out", "no lse"],
)
def test_what_is_no_list_of_tensors_is_named(outs, lses, got):
    with pytest.raises(TypeError, match=rf"llama_kernels\.merge_attention: {got}; wanted"):
        lk.merge_attention(outs, lses)
