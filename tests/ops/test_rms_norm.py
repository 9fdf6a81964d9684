"""RMSNorm and add+RMSNorm: outputs and gradients against float64 by the rules of judge.py."""

from __future__ import annotations

import contextlib

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core.language import INTERPRETED, tl
from llama_kernels.ops import rms_norm
from tests.support.hardware import ERRORS, interpreted
from tests.support.judge import DTYPES
from tests.support.rms_norm import add_is_two_ops, check, check_tangent

# Every tile: one element, widths that are no power of two, many short rows in a program, one row, rows read in steps.
SHAPES = (
    (5, 1),
    (3, 2),
    (7, 3),
    (130, 64),
    (2, 9, 40),
    (33, 128),
    (17, 1000),
    (3, 4096),
    (2, 5120),
    (3, 8192),
    (2, 16640),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, residual, dtype, device):
    check(shape, dtype, device, residual=residual)


def test_rows_of_65536_elements(device):
    """With a residual, whose sum is read back. test_norms_of_rows_longer_than_65536 has none."""
    check((2, 65536 + 8), torch.float16, device, residual=True)


@pytest.mark.parametrize("tight", [False, pytest.param(True, marks=pytest.mark.interpreter)], ids=["plain", "tight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_16384_elements_with_the_tiles_of_either_compiler(dtype, tight, device, monkeypatch):
    """The longest rows kept whole: with more rows than programs, and as newer compilers are given them."""
    if tight:
        monkeypatch.setattr(rms_norm, "_TIGHT", tl.constexpr(True))
    monkeypatch.setattr(rms_norm, "processors_of", lambda _: 2)
    check((5, 16384 - 8), dtype, device, residual=True)


@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weight", [False, True], ids=["bare", "weighted"])
def test_with_and_without_weight_and_offset(weight, offset, residual, device):
    check((70, 96), torch.bfloat16, device, weight=weight, offset=offset, residual=residual)


@pytest.mark.corpus(61)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_a_weight_of_another_dtype(x_dtype, weight_dtype, device):
    check((70, 96), x_dtype, device, weight_dtype=weight_dtype)


@pytest.mark.corpus(61)
def test_a_residual_of_a_wider_dtype(device):
    check((70, 96), torch.bfloat16, device, residual=True, residual_dtype=torch.float32)
    check((2, 33000), torch.bfloat16, device, residual=True, residual_dtype=torch.float32)  # read back as the sum


@pytest.mark.corpus(30)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_large_and_tiny_inputs(size, dtype, device):
    if dtype == torch.float16 and size > 1:
        size = 100  # the products of a thousand with a thousand in dweight pass 65504
    check((70, 128), dtype, device, size=size, residual=True)
    check((70, 128), dtype, device, size=size, eps=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [128, 4096])
def test_never_worse_than_eager(N, dtype, device):
    check((40, N), dtype, device, eager=True)


LAYOUTS = {
    "tokens of heads": ((2, 3, 5, 64), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "every second row": ((6, 64), lambda x: x.repeat_interleave(2, 0)[::2]),
    "a slice of a packed projection": ((2, 3, 5, 64), lambda x: torch.cat((x, x), -1)[..., :64]),
    "one row for all": ((1, 6, 64), lambda x: x[:, :1].expand(4, 6, 64)),
    "columns": ((40, 64), lambda x: x.T.contiguous().T),
    "four dimensions apart": ((2, 3, 2, 3, 16), lambda x: torch.cat((x, x), 3)[:, :, :, :3].permute(2, 0, 3, 1, 4)),
    "a vector": ((64,), lambda x: x),
}  # fmt: skip


@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_inputs_of_any_strides(name, residual, device):
    shape, layout = LAYOUTS[name]
    x = layout(torch.randn(shape, device=device))
    kept = x.stride(-1) == 1 and all(size == 1 or stride for size, stride in zip(x.shape, x.stride(), strict=True))

    def order(t: torch.Tensor) -> list[int]:
        """From the innermost dimension to the outermost, where results keep it."""
        return sorted(range(t.ndim), key=t.stride) if kept else []

    check(shape, torch.float32, device, residual=residual, layout=layout, order=order)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (0, 2, 1, 3), (2, 0, 3, 1)], ids=str)
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "with gaps"])
def test_a_residual_in_another_memory_order(order, gaps, device):
    """Of four leading dimensions a kernel takes three, so tensors are copied: inputs, but never results."""
    x = torch.randn(2, 3, 2, 3, 16, device=device)
    x = torch.cat((x, x), 3)[:, :, :, :3] if gaps else x
    r = torch.empty([x.shape[d] for d in order] + [16], device=device)
    r = r.permute(*(order.index(d) for d in range(4)), 4).copy_(torch.randn_like(x))
    assert r.stride() != x.stride()
    upstream = [torch.randn_like(x) for _ in range(2)]
    results = []
    for residual in (r, r.contiguous()):
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        outs = lk.add_rms_norm(*leaves)
        results.append((*outs, *torch.autograd.grad(outs, leaves, upstream)))
    for given, contiguous in zip(*results, strict=True):
        assert torch.equal(given, contiguous)
    assert results[0][1].stride() == r.stride()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (3, 0), (2, 0, 0, 0, 8), (0, 3, 0, 2, 0, 8)], ids=str)
def test_empty_inputs_give_empty_outputs(shape, device):
    x, r = (torch.randn(shape, device=device).requires_grad_() for _ in range(2))
    w = torch.randn(shape[-1], device=device).requires_grad_()
    y, s = lk.add_rms_norm(x, r, w)
    dx, dr, dw = torch.autograd.grad((y, s), (x, r, w), (torch.ones_like(y), torch.ones_like(s)))
    assert y.shape == s.shape == dx.shape == dr.shape == shape
    assert torch.equal(dw, torch.zeros_like(w))


@pytest.mark.parametrize("shape", [(2, 0, 0, 0, 8), (0, 3, 0, 2, 0, 8)], ids=str)
def test_the_tangent_of_empty_inputs_is_empty(shape, device):
    x, tx = (torch.randn(shape, device=device) for _ in range(2))
    assert torch.func.jvp(lk.rms_norm, (x,), (tx,))[1].shape == shape


@pytest.mark.parametrize("dims", [(2, 0, 1, 3, 4), (1, 3, 0, 2, 4), (3, 2, 1, 0, 4)], ids=str)
def test_a_residual_beside_five_dimensions_one_of_which_has_one_element(dims, device):
    """Its stride may be that of another dimension. The order of the two in memory is then undefined."""
    x = torch.randn(2, 2, 1, 2, 8, device=device).permute(dims)
    r = torch.randn(x.shape, device=device)
    y, s = lk.add_rms_norm(x, r)
    torch.testing.assert_close(s, x + r)
    torch.testing.assert_close(y, lk.reference.rms_norm(x + r))


def test_empty_inputs_with_a_strided_last_dimension(device):
    """`contiguous` keeps the strides of a tensor without elements."""
    x, weight = torch.randn(0, 16, device=device)[..., ::2], torch.randn(8, device=device)
    assert lk.rms_norm(x, weight).shape == (0, 8)


def test_more_rows_than_32_bits_number_are_refused():
    x, rstd = torch.empty(2**31, 16, device="meta"), torch.empty(2**31, 1, device="meta")
    forward = rms_norm._Forward(x, None, None, 1e-6, 0.0)
    with pytest.raises(ValueError, match="x is a tensor of 2147483648 rows; wanted at most 2\\^31 - 2\\^24"):
        rms_norm._launch_forward.__wrapped__(forward, x, None, rstd)
    tangent = rms_norm._Tangent(x, x, None, None, rstd, 1e-6, 0.0, x.dtype)
    with pytest.raises(ValueError, match="2147483648 rows"):
        rms_norm._launch_tangent.__wrapped__(tangent, x)


@pytest.mark.parametrize(("rows", "N"), [(2**31 - 2**24 + 1, 1), (2**31 - 1, 16)])
def test_more_rows_than_the_loops_of_the_backward_count_are_refused(rows, N):
    """The first row of the tile after the last one would pass 2^31, become negative, and be read."""
    x, rstd, weight = (torch.empty(*shape, device="meta") for shape in ((rows, N), (rows, 1), (N,)))
    backward = rms_norm._Backward(x, None, x, weight, rstd, 1e-6, 0.0, x.dtype, True, True)
    shares = rms_norm._shares(rows, N, 4, 4, True, 132)
    steps = max(rms_norm.row_tile(pass_, N, 4).BLOCK_R for pass_ in ("backward", "weight_grad")) * shares.grid
    assert 3 * steps < 2**24  # the tile of this step, and two that are loaded ahead
    with pytest.raises(ValueError, match=f"x is a tensor of {rows} rows; wanted at most"):
        rms_norm._launch_backward.__wrapped__(backward, shares, x, weight, None)


@pytest.mark.corpus(30)
def test_rows_of_zeros_stay_zeros(device):
    x = torch.zeros(4, 96, device=device, requires_grad=True)
    w = torch.randn(96, device=device)
    y = lk.rms_norm(x, w, eps=1e-6)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, torch.zeros_like(y))
    torch.testing.assert_close(dx, (w * 1e3).expand_as(dx))  # rstd = 1 / sqrt(eps)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_rows_whose_mean_square_is_subnormal(device):
    """A GPU's rsqrt takes such numbers for 0."""
    with interpreted(ERRORS["mixed"]) if INTERPRETED else contextlib.nullcontext():
        check((4, 256), torch.float32, device, size=1e-20, eps=0.0)


@pytest.mark.corpus(32)
def test_only_the_residual_stream_is_used(device):
    x, r, w = (torch.randn(shape, device=device).requires_grad_() for shape in ((4, 96), (4, 96), (96,)))
    _, s = lk.add_rms_norm(x, r, w)
    ds = torch.randn_like(s)
    dx, dr, dw = torch.autograd.grad(s, (x, r, w), ds, allow_unused=True)
    assert torch.equal(dx, ds) and torch.equal(dr, ds) and dw is None


def test_the_fused_add_is_the_two_ops_bit_for_bit(device):
    add_is_two_ops(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_default_eps_is_that_of_pytorch(dtype, device):
    """Inputs so small that eps decides. PyTorch takes that of the dtype in which it computes."""
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    x, w = (torch.randn(4, 64, device=device) * 1e-4).to(dtype), torch.rand(64, device=device).to(dtype)
    q, no_angle = x[:, None], (torch.ones(4, 1, device=device), torch.zeros(4, 1, device=device))

    def plain(x, eps):
        return torch.nn.functional.rms_norm(x, (64,), w, eps)

    assert torch.equal(plain(x, None), plain(x, eps)) and not torch.equal(plain(x, eps), plain(x, 2 * eps))
    for m in (lk, lk.reference) if dtype != torch.float64 else (lk.reference,):
        calls = [
            lambda x, eps, m=m: m.rms_norm(x, w, eps),
            lambda x, eps, m=m: m.add_rms_norm(x, x, w, eps)[0],
            lambda x, eps, m=m: m.qk_norm_rope(x[:, None], q, w, w, *no_angle, eps=eps)[0],
        ]
        if m is lk:
            calls.append(lambda x, eps: lk.nn.RMSNorm(64, eps, device=device)(x))
        for call in calls:
            results = []
            for each in (None, eps):
                leaf = x.clone().requires_grad_()
                y = call(leaf, each)
                results.append((y, *torch.autograd.grad(y.sum(), leaf)))
            assert all(map(torch.equal, *results))


# --- tangents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [False, True], ids=["bare", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tangents(shape, weight, dtype, device):
    check_tangent(shape, dtype, device, weight=weight)


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_tangents_with_a_residual_an_offset_and_an_epsilon(offset, residual_dtype, device):
    check_tangent((70, 96), torch.bfloat16, device, residual_dtype=residual_dtype, offset=offset, eps=1e-2)


def test_tangents_of_long_rows_and_of_rows_with_gaps(device):
    check_tangent((2, 65536 + 8), torch.float16, device)
    check_tangent((2, 3, 5, 96), torch.bfloat16, device, layout=lambda x: x.transpose(1, 2))
    check_tangent((70, 96), torch.float32, device, layout=lambda x: torch.cat((x, x), -1)[:, :96], size=1e3)
