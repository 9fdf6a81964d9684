"""Attention of CPU tensors: PyTorch's flash kernel where it computes the same, otherwise the formulas written out.

test_attention.py has the parity of both, but for the flash kernel's backward: its cases have a gradient of lse, for
which the formulas are written out.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from llama_kernels.ops.attention import cpu_flash, cpu_formulas
from tests.support.attention import Case, check, in_float64, make, run
from tests.support.attention_cases import CASES
from tests.support.environment import DEVICE, INTERPRETED
from tests.support.judge import UNIT

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="about what CPU tensors run without the interpreter"),
]


def qkv(D: int = 16, Dv: int = 16) -> list[torch.Tensor]:
    return [torch.randn(1, heads, 20, width).requires_grad_() for heads, width in ((4, D), (2, D), (2, Dv))]


@pytest.mark.parametrize("options", [{}, {"window_size": (5, 0)}, {"is_causal": False}], ids=str)
def test_the_flash_kernel_runs_forward_and_backward(options):
    with (
        mock.patch.object(cpu_flash, "flash_forward", wraps=cpu_flash.flash_forward) as forward,
        mock.patch.object(cpu_flash, "flash_backward", wraps=cpu_flash.flash_backward) as backward,
    ):
        lk.attention(*qkv(), **options).sum().backward()
    assert forward.call_count == backward.call_count == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(dtype):
    """Of a program that builds its model after torch.set_default_dtype(torch.bfloat16)."""
    options = {"window_size": (5, 0), "kv_end": torch.full((1, 20), 15, dtype=torch.int32)}
    torch.manual_seed(0)
    leaves = qkv()
    expected = lk.attention(*leaves, **options)
    grads = torch.autograd.grad(expected.sum(), leaves)
    torch.set_default_dtype(dtype)
    try:
        out = lk.attention(*leaves, **options)
        assert torch.equal(out, expected)
        assert all(map(torch.equal, torch.autograd.grad(out.sum(), leaves), grads))
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_flash_kernel_runs_for_each_sequence_of_a_packed_batch():
    q, k, v = (x.detach()[0].transpose(0, 1) for x in qkv())
    bounds = torch.tensor([0, 5, 20], dtype=torch.int32)
    with mock.patch.object(cpu_flash, "flash_forward", wraps=cpu_flash.flash_forward) as forward:
        lk.attention_varlen(q, k, v, bounds, bounds, 15, 15)
    assert forward.call_count == 2


@pytest.mark.parametrize(
    "widths, options",
    [((16, 16), {"softcap": 5.0}), ((16, 16), {"scale": -0.5}), ((16, 16), {"scale": 0.0}), ((16, 24), {})],
    ids=str,
)
def test_the_formulas_are_written_out_where_the_flash_kernel_computes_something_else(widths, options):
    with mock.patch.object(cpu_flash, "flash_forward", side_effect=AssertionError):
        assert lk.attention(*qkv(*widths), **options).isfinite().all()


def test_the_formulas_are_written_out_for_a_gradient_of_lse():
    q, k, v = qkv()
    with mock.patch.object(cpu_flash, "flash_backward", side_effect=AssertionError):
        _, lse = lk.attention(q, k, v, return_lse=True)
        lse.sum().backward()
    assert q.grad is not None and q.grad.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_without_that_of_lse(case, device):
    """Within twice the error of autograd through the formulas in float32, as judge.py allows, and two roundings: of the
    gradient itself, or of do where the gradient is smaller than do, since its terms may cancel."""
    torch.manual_seed(0)
    x = make(case, torch.float32, device)
    ours, plain, exact = (
        gradients(ops, case, inputs) for ops, inputs in ((lk, x), (lk.reference, x), (lk.reference, in_float64(x)))
    )
    for K, E, R in zip(ours, plain, exact, strict=True):
        rounding = UNIT[torch.float32] * max(R.norm(), x.do.double().norm())
        assert (K - R).norm() <= 2 * (E - R).norm() + 2 * rounding


def gradients(ops: Any, case: Case, x: Any) -> list[torch.Tensor]:
    """Of out alone."""
    out = run(ops, case, x, gradients=False)[0]
    return [grad.double() for grad in torch.autograd.grad(out, x.tensors, x.do.to(out.dtype))]


@pytest.mark.parametrize("rows", [7, 64])
@pytest.mark.parametrize("case", [case for case in CASES if not case.softcap], ids=str)
def test_any_number_of_rows_in_a_call_of_the_flash_kernel(case, rows, device):
    with mock.patch.object(cpu_flash, "_ROWS", rows):
        test_gradients_without_that_of_lse(case, device)


KEYS = torch.arange(1000, dtype=torch.int32)[None]


@pytest.mark.parametrize(
    "options, keys",
    [
        ({}, 1000 * 1000),  # one call of the kernel with is_causal=True
        ({"window_size": (9, 0)}, 192 * 192 + 4 * 192 * 208 + 40 * 56),
        ({"kv_start": KEYS // 500 * 500}, 700_000),
        ({"kv_end": KEYS + 1, "is_causal": False}, 1000 * 1000),  # likewise
        ({"kv_end": KEYS // 2 + 1, "is_causal": False}, 700_000),
        ({"kv_prefix": KEYS * 0 + 3, "window_size": (9, 0)}, 700_000),
    ],
    ids=str,
)
def test_keys_that_no_row_sees_are_left_out(options, keys):
    """So many scores does the flash kernel compute at most, of 1,000 queries and 1,000 keys."""
    q, k, v = (torch.randn(1, 1, 1000, 16, requires_grad=True) for _ in range(3))
    with (
        mock.patch.object(cpu_flash, "_FORWARD", wraps=cpu_flash._FORWARD) as forward,
        mock.patch.object(cpu_flash, "_BACKWARD", wraps=cpu_flash._BACKWARD) as backward,
    ):
        lk.attention(q, k, v, **options).sum().backward()
    for kernel, first in ((forward, 0), (backward, 1)):
        assert 0 < sum(call.args[first].shape[2] * call.args[first + 1].shape[2] for call in kernel.mock_calls) <= keys


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("first, end", [(0, 14), (6, 20), (3, 12), (19, 20), (20, 20)], ids=str)
def test_padding_needs_no_mask(first, end, is_causal):
    """The keys from `first` to `end` - 1 are tokens, of a causal model or of an encoder. The others hold NaN."""
    q, k, v = (x.detach() for x in qkv())
    do = torch.randn(1, 4, 20, 16)
    tokens, after = slice(first, end), slice(end, 20)
    ends = torch.arange(1, 21)[None].clamp(max=end) if is_causal else torch.full((1, 20), end)
    bounds = {"kv_start": torch.full((1, 20), first, dtype=torch.int32), "kv_end": ends.int()}
    padded = [torch.full_like(x, torch.nan) for x in (k, v)]
    for whole, x in zip(padded, (k, v), strict=True):
        whole[:, :, tokens] = x[:, :, tokens]
    leaves = [x.requires_grad_() for x in (q, *padded)]

    def no_mask(chunk: Any) -> None:
        assert chunk.see is None

    with mock.patch.object(cpu_flash, "_mask", side_effect=no_mask):
        out, lse = lk.attention(*leaves, is_causal=False, return_lse=True, **bounds)
        grads = torch.autograd.grad(out, leaves, do)
    expected, expected_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    expected_grads = [torch.zeros_like(x) for x in leaves]
    parts = [(tokens, True), (after, False)] if is_causal else [(slice(0, 20), False)]
    for rows, causal in parts if first < end else []:
        alone = [q[:, :, rows], k[:, :, tokens], v[:, :, tokens]]
        alone = [x.detach().requires_grad_() for x in alone]
        results = lk.attention(*alone, is_causal=causal, return_lse=True)
        expected[:, :, rows], expected_lse[:, :, rows] = (x.detach() for x in results)
        of_rows = torch.autograd.grad(results[0], alone, do[:, :, rows])
        for whole, part, place in zip(expected_grads, of_rows, (rows, tokens, tokens), strict=True):
            whole[:, :, place] += part
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert all(map(torch.equal, grads, expected_grads))


def test_the_lse_of_a_padded_row_is_its_sink():
    start, sinks = torch.full((1, 20), 6, dtype=torch.int32), torch.tensor([0.5, -1.0, 2.0, 0.0])
    out, lse = lk.attention(*qkv(), kv_start=start, sinks=sinks, return_lse=True)
    assert not out[:, :, :6].any() and torch.equal(lse[:, :, :6], sinks[:, None].expand(1, 4, 6))


def test_sequences_that_see_the_same_keys_are_one_call_of_the_kernel():
    q, k, v = (x.expand(3, -1, -1, -1) for x in qkv())
    same, other = torch.zeros(3, 20, dtype=torch.int32), torch.tensor([[0], [4], [0]], dtype=torch.int32).expand(3, 20)
    with (
        mock.patch.object(cpu_flash, "_FORWARD", wraps=cpu_flash._FORWARD) as forward,
        mock.patch.object(cpu_flash, "_BACKWARD", wraps=cpu_flash._BACKWARD) as backward,
    ):
        for start, calls in ((same, 1), (other, 3)):
            lk.attention(q, k, v, kv_start=start).sum().backward()
            assert forward.call_count == backward.call_count == calls
            forward.reset_mock()
            backward.reset_mock()


@pytest.mark.parametrize("options", [{}, {"window_size": (5, 0)}], ids=str)
def test_fewer_key_heads_are_repeated_for_older_releases_of_torch(options, monkeypatch):
    """From torch 2.13 on, PyTorch's kernel takes them as they are."""
    results = []
    for takes_groups in (cpu_flash._TAKES_GROUPS, False):
        torch.manual_seed(0)
        inputs = qkv()
        with monkeypatch.context() as patched:
            patched.setattr(cpu_flash, "_TAKES_GROUPS", takes_groups)
            out = lk.attention(*inputs, **options)
            out.sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    torch.testing.assert_close(*results)


# --- written out, in chunks of rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [7, 64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_rows_in_a_chunk(case, rows, device):
    with mock.patch.object(cpu_flash, "takes", lambda call: False), mock.patch.object(cpu_formulas, "_ROWS", rows):
        check(case, torch.float32, device)


def test_a_row_that_sees_no_key_is_0_where_the_formulas_are_written_out():
    start = torch.arange(20, dtype=torch.int32).expand(1, -1).contiguous()
    start[0, 3] = 20
    q, k, v = qkv()
    out, lse = lk.attention(q, k, v, softcap=5.0, kv_start=start, return_lse=True)
    out.sum().backward()
    assert not out[:, :, 3].any() and (lse[:, :, 3] == -torch.inf).all()
    assert lse[:, :, 4].isfinite().all() and not q.grad[:, :, 3].any() and q.grad.isfinite().all()
    empty = lk.attention(q, k[:, :, :0], v[:, :, :0], softcap=5.0, return_lse=True)
    assert not empty[0].any() and (empty[1] == -torch.inf).all()


def test_keys_that_no_query_sees_may_hold_nan_where_the_formulas_are_written_out():
    """In the middle of the keys of one sequence, while the other sequence sees them."""
    end = torch.full((2, 20), 4, dtype=torch.int32)
    prefix = torch.tensor([[0] * 20, [20] * 20], dtype=torch.int32)
    q, k, v = (torch.randn(2, heads, 20, 16) for heads in (4, 2, 2))
    k[0, :, 4:], v[0, :, 4:] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = lk.attention(*leaves, softcap=5.0, is_causal=False, kv_end=end, kv_prefix=prefix)
    out.sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_bits_of_a_sequence_do_not_depend_on_the_bounds_of_others(softcap):
    """Which keys are computed together depends on those that rows see."""
    q, k, v = (torch.randn(2, H, 700, 16).requires_grad_() for H in (4, 2, 2))
    kv_start = torch.tensor([[0], [301]], dtype=torch.int32).expand(2, 700)

    def results(row: slice) -> list[torch.Tensor]:
        leaves = [x[row].detach().requires_grad_() for x in (q, k, v)]
        out = lk.attention(*leaves, kv_start=kv_start[row], softcap=softcap)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    together = results(slice(0, 2))
    for b in range(2):
        for whole, alone in zip(together, results(slice(b, b + 1)), strict=True):
            assert torch.equal(whole[b : b + 1], alone)
