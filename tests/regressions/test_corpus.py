"""Bugs that users of other kernels met, each as a test of ours. docs/reliability.md lists all of them, with the tests.

A test names, in its mark `corpus`, the entries it answers; entries that a test elsewhere answers are marked there. What
needs a GPU is in test_gpu.py.
"""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.library import opcheck

import llama_kernels as lk
from llama_kernels.core import launch_cache
from llama_kernels.core.language import INTERPRETED
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops import rms_norm
from llama_kernels.ops.attention.tables import Tile
from tests.support.attention import Case, check, packed, tiles
from tests.support.environment import DEVICE, compiles
from tests.support.guards import guarded, guarded_allocations, relaid
from tests.support.ideal import attention_mask, drawn, ideal_attention, ideal_rms_norm
from tests.support.judge import UNIT, judge, relative_error
from tests.support.launches import KERNELS_RUN, kernels_launched, names
from tests.support.ops import CALLS, Make, Shape, calls
from tests.support.rms_norm import check as check_norm
from tests.support.rope import qk
from tests.support.rope import tables as rope_tables

corpus = pytest.mark.corpus
ROOT = Path(lk.__file__).parent.parent
SOURCES = sorted(Path(lk.__file__).parent.rglob("*.py"))


def an_op(
    op: str, device: torch.device, dtype: torch.dtype = torch.float32, B: int = 2, S: int = 20
) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """The op as a function of tensors that take gradients, to its first output, and such tensors."""
    call = dict(calls(Shape(B=B, S=S, D=16, N=32), Make(device, dtype)))[op]

    def first(*tensors: torch.Tensor) -> torch.Tensor:
        results = call(lk, *tensors)
        return results[0] if isinstance(results, tuple) else results

    return first, [x.detach().requires_grad_() for x in call.tensors]


def every(test: Callable[..., None]) -> Any:
    """For each op that has a gradient. What is rotated in place is a copy, so that form has tests of its own."""
    return pytest.mark.parametrize("op", [op for op in CALLS if op != "rope, in place"])(test)


def outcome(f: Callable[..., torch.Tensor], tensors: list[torch.Tensor], upstream: Any = None) -> list[torch.Tensor]:
    """Output and all gradients."""
    y = f(*tensors)
    dy = torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(1)).to(y.dtype)
    dy = dy if upstream is None else upstream(dy)
    return [y.detach(), *(g for g in torch.autograd.grad(y, tensors, dy, allow_unused=True) if g is not None)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """To the bit, of kernels; on the reference path torch adds up in the order of memory."""
    if len(a) != len(b):
        return False
    if INTERPRETED or DEVICE == "cuda":
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return all(relative_error(x, y) <= 2 * UNIT[x.dtype] for x, y in zip(a, b, strict=True))


def judge_rows(name: str, q, k, v, out, lse=None, **options: Any) -> None:
    """`out`, and lse, of causal attention, by the rules of the judge."""
    window = options.get("window_size", (-1, -1))
    truth = lk.reference.attention(*(x.double() for x in (q, k, v)), return_lse=True, **options)
    see = attention_mask(q.shape[2], k.shape[2], True, window, None, None, q.device)
    zeros = torch.zeros_like(truth[1], dtype=torch.float32)
    ideal = drawn(ideal_attention, q, k, v, see, q.shape[-1] ** -0.5, None, None, torch.zeros_like(out), zeros)
    judge(name, out, truth[0], ideal[0])
    if lse is not None:
        judge(f"lse, {name}", lse, truth[1], ideal[1])


# --- indexing and sizes ----------------------------------------------------------------------------------------------


@corpus(6)
@pytest.mark.parametrize("Sq", [1, 40], ids=["decoding", "rows"])
def test_wrong_past_65536_keys(Sq, device):
    """A product in 32 bits stepped at exactly 2^16: pytorch#187225, #162588. A window on both sides."""
    Sk, left = 2**16 + 30, 80
    q, k, v = (torch.randn(1, 1, S, 16, device=device).half() for S in (Sq, Sk, Sk))
    out, lse = lk.attention(q, k, v, window_size=(left, 0), return_lse=True)
    near = [x[:, :, -(left + Sq) :] for x in (k, v)]
    judge_rows("out", q, *near, out, lse, window_size=(left, 0))


@compiles
@corpus(7)
def test_grid_beyond_65535():
    """Batch times heads on a grid's second axis, which ends at 65,535: xformers#1046, #1054."""
    from triton.runtime.jit import JITFunction

    grids = []
    many = 70_000
    q = torch.zeros(many, 1, 1, 16, dtype=torch.float16)
    lse, x = torch.zeros(many, 1, 1), torch.zeros(many, 16)
    call = (None, None, None, None, None, 1, 1, 0.25, None, None, 0)
    with mock.patch.object(JITFunction, "run", lambda self, *args, grid, **options: grids.append(grid)):
        KERNELS["attention_forward"](q, q, q, *call)
        KERNELS["attention_backward"](q, None, q, q, q, q, lse, *call, True, True, True, False, None)
        KERNELS["rope"](q, q, torch.zeros(1, 8), torch.zeros(1, 8), None, False, False)
        KERNELS["rms_norm_forward"](x, None, None, 1e-6, 0.0)
        KERNELS["rms_norm_backward"](x, None, x, torch.zeros(16), torch.zeros(many, 1), 1e-6, 0.0, x.dtype, True, True)
        KERNELS["qk_norm_rope"](q, q, None, None, torch.zeros(1, 8), torch.zeros(1, 8), None, 1e-6, 0.0, False)
        few, wide = torch.zeros(2, 1, 4, 16).half(), torch.zeros(2, 1, 4096, 16).half()
        KERNELS["attention_forward"](few, wide, wide, None, None, None, None, None, 4, 4096, 0.25, None, None, 0)
    assert len(grids) == 11 and max(grid[0] for grid in grids) >= many
    assert all(n <= 65535 for grid in grids for n in grid[1:])


@corpus(9)
def test_rows_longer_than_65536(device):
    """Refused, or spilled, or summed wrongly: Liger's and quack's limits on the row."""
    check_norm((2, 65537), torch.float16, device)


@corpus(10, 11)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 9])
def test_only_the_first_rows_are_written(M, device):
    """A grid with a cap and no loop over what is beyond it (vllm-ascend#5012), or partial sums of programs without rows
    left as they came (flash-attention#781). In the interpreter four programs share the rows."""
    check_norm((M, 4096), torch.float16, device, residual=True)


@corpus(12)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0,)], ids=str)
def test_nothing_at_all_is_no_division_by_zero(shape, device):
    """flash-attention#2515, #2470; xformers ecdab5bb. Shapes are kept, and the weight's gradient is zero."""
    x = torch.zeros(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[-1:], device=device, requires_grad=True)
    dx, dweight = torch.autograd.grad(lk.rms_norm(x, weight), (x, weight), torch.zeros(shape, device=device))
    assert dx.shape == shape and not dweight.any()
    for B, H, Sq, Sk in ((0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)):
        q, k, v = (torch.randn(B, H, S, 8, device=device, requires_grad=True) for S in (Sq, Sk, Sk))
        out, lse = lk.attention(q, k, v, return_lse=True)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not any(g.any() for g in grads)
        cos, sin = rope_tables(3, 8, device)
        a, b = lk.rope(q, k, cos, sin) if Sq == Sk else (q, k)
        assert (a.shape, b.shape) == (q.shape, k.shape)


@corpus(13)
@pytest.mark.parametrize("N", [41, 123, 1000])
def test_masked_lanes_enter_the_mean(N, device):
    """Lanes past the row's end counted as values: unsloth#1867, Liger#582. Shows where the mean is far from zero."""
    check_norm((7, N), torch.float32, device, layout=lambda x: x + 5)


@corpus(14, 15)
@pytest.mark.parametrize(
    "D, DV", [(40, 40), (59, 59), (80, 80), (96, 96), (111, 111), (160, 160), (192, 192), (64, 24)]
)
def test_head_widths_that_are_no_power_of_two(D, DV, device):
    """Columns past the head's end: flash-attention 215930bc, aacc10fb, 470010f5; buffers shaped after the wrong tensor
    where v is of another width: 6d199aa2."""
    check(Case(1, 2, 1, 20, 30, D, DV), torch.float16, device)


@corpus(16)
@pytest.mark.parametrize("S", [1, 2, 15, 16, 17, 31, 32, 33])
def test_tail_block_reads_past_the_end(S, device):
    """xformers#1100, FlagGems f395f956: a tensor that ends inside a block. All of them lie amid NaN here."""
    check(Case(1, 2, 2, S, S, 16, 16), torch.float16, device, tile=Tile(16, 16, 4, 1))


# --- masks -----------------------------------------------------------------------------------------------------------


@corpus(19)
def test_nan_in_the_reference_hides_a_mismatch():
    """cubecl#1070, Liger#261: a comparison that takes NaN for equal to everything."""
    R = torch.randn(4, 64)
    broken, nan = R.clone(), R.double().index_fill(0, torch.tensor([1]), torch.nan)
    broken[1, 2] = torch.nan
    with pytest.raises(AssertionError, match="isnan"):
        judge("x", broken, R.double(), R)
    with pytest.raises(AssertionError, match="isnan"):
        judge("x", R, nan, R)
    with pytest.raises(AssertionError, match="isposinf"):
        judge("x", R.index_fill(0, torch.tensor([0]), torch.inf), R.double(), R)


@corpus(21)
def test_nan_gradients_where_queries_far_outnumber_keys(device):
    """flash-attention#443: the lengths of its report, a third of them."""
    check(packed((25, 11, 49), (1, 1, 1), 4, 2, 32, 32), torch.float16, device)


@corpus(22)
@pytest.mark.parametrize("left", [0, 1, 19, 20, 21])
def test_window_off_by_one(left, device):
    """Whether `left` counts the query's own key: transformers#39408, vllm#3385. It does not: left=0 sees one key."""
    q, k = torch.zeros(1, 1, 20, 32, device=device), torch.zeros(1, 1, 20, 32, device=device)
    v = torch.eye(20, 32, device=device)[None, None]
    seen = lk.attention(q, k, v, window_size=(left, 0))[0, 0, :, :20] > 0
    i, j = torch.arange(20, device=device)[:, None], torch.arange(20, device=device)
    assert torch.equal(seen, (j <= i) & (i - j <= left))


@corpus(23)
@pytest.mark.parametrize("Sq, Sk", [(40, 70), (70, 40)])
@pytest.mark.parametrize("Hq", [2, 6])
def test_window_with_groups_and_unequal_lengths(Sq, Sk, Hq, device):
    """Each worked, together they did not: xformers 1e13ad90."""
    check(Case(1, Hq, 2, Sq, Sk, 16, 16, window_size=(9, 3), is_causal=False), torch.float16, device)


@corpus(24, 25)
def test_empty_sequences_write_out_of_bounds(device):
    """Zero-length sequences, and rows after the last: flash-attention#2562, #1713, #2324; pytorch#176793."""
    check(packed((0, 5, 0, 4, 0), (0, 5, 0, 4, 0), 2, 2, 16, 16), torch.float16, device)
    check(packed((3, 5, 0, 4), (0, 5, 7, 4), 2, 1, 16, 16), torch.float16, device)
    q, k, v = (guarded(torch.randn(12, 2, 16, device=device)).requires_grad_() for _ in range(3))
    cu = torch.tensor([0, 0, 5, 5, 9, 9], dtype=torch.int32, device=device)
    with guarded_allocations():
        out = lk.attention_varlen(q, k, v, cu, cu, 5, 5)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(x[:9].any() and not x[9:].any() for x in (out, *grads))


@corpus(26)
def test_nan_in_padding_leaks(device):
    """0 times NaN in p @ v: xformers' test_nans_in_padding. What no row sees may hold anything, in the middle of a
    block too, as a cache that is not full does."""
    q, k, v = (torch.randn(2, H, S, 16, device=device) for H, S in ((4, 3), (2, 50), (2, 50)))
    filled = torch.tensor([[17] * 3, [40] * 3], dtype=torch.int32, device=device)
    start = torch.tensor([[0] * 3, [5] * 3], dtype=torch.int32, device=device)
    dirty = [x.clone() for x in (k, v)]
    for x in dirty:
        x[0, :, 17:] = torch.nan
        x[1, :, :5] = torch.inf
        x[1, :, 40:] = torch.nan
    for Sq in (1, 3):
        options = {"is_causal": False, "kv_start": start[:, :Sq], "kv_end": filled[:, :Sq]}
        for tile in (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1, carry=True), None):
            results = []
            for keys, values in ((k, v), dirty):
                leaves = [x.detach().clone().requires_grad_() for x in (q[:, :, :Sq], keys, values)]
                with tiles(tile):
                    out = lk.attention(*leaves, **options)
                    results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
            assert same(*results)


@corpus(28)
@pytest.mark.parametrize("S", [1, 17, 65])
def test_lse_of_one_key_head_and_odd_lengths(S, device):
    """xformers 41646dbb: wrong for one key head where the length is one past a block."""
    check(Case(2, 4, 1, S, S, 16, 16), torch.float16, device, tile=Tile(16, 16, 4, 1))


# --- numerics --------------------------------------------------------------------------------------------------------


@corpus(29)
def test_weight_gradient_added_up_in_half_precision(device):
    """Liger#950: an error that grows with the number of rows."""
    check_norm((2048, 24), torch.bfloat16, device)


@compiles
@corpus(30, 36, 63)
@pytest.mark.parametrize("op, label", [("attention", "D=64 float32 causal"), ("rms_norm", "N=1024 +residual"),
                                       ("rope", "D=64 R=64 heads=32/8")])  # fmt: skip
def test_scalars_become_doubles_and_float32_becomes_tf32(op, label):
    """A Python float that reaches a kernel as float64 halves its speed (Liger#1350, unsloth#4110); tl.dot takes TF32
    unless told not to (triton#5895). Read from what Triton makes of the kernels."""
    from bench.codegen.cases import cases
    from bench.codegen.compiling import compile_case

    case = next(c for c in cases() if (c.op, c.label) == (op, label))
    for name, kernel in compile_case("sm_90", case):
        assert "f64" not in kernel.asm["ttir"], name
        assert "tf32" not in kernel.asm["ttir"], name


@corpus(32)
@pytest.mark.parametrize("used", ["y", "residual_out", "both"])
def test_residual_gradient_on_the_wrong_side_of_the_norm(used, device):
    """quack#53: the gradient of residual_out joins after the norm's backward, not before."""
    x, r, w = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((6, 40), (6, 40), (40,)))
    wide = [t.detach().double().requires_grad_() for t in (x, r, w)]
    for_y, for_r = torch.randn(6, 40, device=device), torch.randn(6, 40, device=device)

    def loss(ops: Any, x, r, w) -> torch.Tensor:
        y, out = ops.add_rms_norm(x, r, w)
        return {"y": (y * for_y).sum(), "residual_out": (out * for_r).sum(), "both": (y * for_y + out * for_r).sum()}[
            used
        ]

    grads = torch.autograd.grad(loss(lk, x, r, w), (x, r, w), allow_unused=True)
    truth = torch.autograd.grad(loss(lk.reference, *wide), wide, allow_unused=True)
    dy, ds = for_y * (used != "residual_out"), for_r * (used != "y")
    ideal = drawn(ideal_rms_norm, *(t.detach() for t in (x, r, w)), 1e-6, 0.0, dy, ds)[2:]
    for name, g, exact, I in zip(("dx", "dresidual", "dweight"), grads, truth, ideal, strict=True):
        assert (g is None) == (exact is None)
        if g is not None:
            judge(name, g, exact, I)


@corpus(37)
def test_prefill_and_decoding_differ(device):
    """flash-attention c2006099: constants that differ between the two paths. The last row of one is the other."""
    q, k, v = (torch.randn(1, H, 600, 32, device=device).half() for H in (8, 2, 2))
    with kernels_launched() as launches:
        whole, whole_lse = lk.attention(q, k, v, return_lse=True)
        last, lse = lk.attention(q[:, :, -1:], k, v, return_lse=True)
    assert names(launches) == ["_forward_kernel", "_decode_kernel", "_combine_kernel"] * KERNELS_RUN
    judge_rows("decoding", q[:, :, -1:], k, v, last, lse)
    judge_rows("prefill", q[:, :, -1:], k, v, whole[:, :, -1:], whole_lse[..., -1:])


@corpus(38)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_one_bad_value_spoils_others(bad, device):
    """TransformerEngine 71971e33: a mask by multiplication. A row of a norm, a token of RoPE, a batch entry, a head and
    a packed sequence of attention keep it to themselves, and do not swallow it."""
    x = torch.randn(6, 40, device=device)
    broken = x.clone()
    broken[2, 7] = bad
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(lk.rms_norm(broken)[rest], lk.rms_norm(x)[rest]) and lk.rms_norm(broken)[2].isnan().any()
    q, k, v = (torch.randn(2, 2, 20, 16, device=device) for _ in range(3))
    cos, sin = rope_tables(20, 16, device)
    spoiled = q.clone()
    spoiled[1, 0, 4, 3] = bad
    turned, clean = lk.rope(spoiled, None, cos, sin)[0], lk.rope(q, None, cos, sin)[0]
    differs = (turned != clean).nonzero()
    assert len(differs) == 2 and (differs[:, :3] == torch.tensor([1, 0, 4], device=device)).all()  # the pair
    for which in range(3):
        given = [t.clone() for t in (q, k, v)]
        given[which][1, 0, 4, 3] = bad
        out, expected = lk.attention(*given), lk.attention(q, k, v)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1, 1], expected[1, 1])
        assert not out[1, 0].isfinite().all() or which == 1
        flat = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
        expected = lk.attention_varlen(
            *flat, *[torch.tensor([0, 10, 20], dtype=torch.int32, device=device)] * 2, 10, 10
        )
        flat[which][14, 0, 3] = bad
        out = lk.attention_varlen(*flat, *[torch.tensor([0, 10, 20], dtype=torch.int32, device=device)] * 2, 10, 10)
        assert torch.equal(out[:10], expected[:10]) and torch.equal(out[:, 1], expected[:, 1])


@corpus(39)
def test_bfloat16_gradients_cast_to_float16(device):
    """Triton's tutorial casts dS to float16 whatever the input: gradients of bfloat16 beyond 65,504 are lost."""
    q, k, v = (torch.randn(1, 2, 30, 16, device=device).bfloat16().requires_grad_() for _ in range(3))
    out = lk.attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), torch.full_like(out, 2.0**17), retain_graph=True)
    unit = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.equal(g, u * 2.0**17) for g, u in zip(grads, unit, strict=True))


# --- layout and aliasing ---------------------------------------------------------------------------------------------


UPSTREAMS = {
    "expanded": lambda dy: torch.ones_like(dy[..., :1]).expand_as(dy),
    "transposed": lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda dy: torch.stack((dy, dy), -1)[..., 0],
    "one number": lambda dy: dy.new_ones(()).expand_as(dy),
}


@every
@corpus(41)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_gradient_that_is_not_contiguous(op, upstream, device):
    """`.sum().backward()` gives a stride of 0: flash-attention#355, quack#88, unsloth#10617."""
    f, tensors = an_op(op, device)
    make = UPSTREAMS[upstream]
    assert same(outcome(f, tensors, make), outcome(f, tensors, lambda dy: make(dy).contiguous()))


@every
@corpus(42, 45)
def test_expanded_input_after_a_contiguous_one(op, device):
    """Stride 0 met where alignment was learnt from a contiguous call: flash-attention#2189, unsloth#3782."""
    f, tensors = an_op(op, device)
    one = [t.detach()[:1] if t.ndim > 2 else t.detach() for t in tensors]
    if op == "attention_varlen":
        one = [t.detach()[:1].expand_as(t) for t in tensors]
    expanded = [t.expand_as(like).requires_grad_() for t, like in zip(one, tensors, strict=True)]
    copied = [t.detach().contiguous().requires_grad_() for t in expanded]
    first = outcome(f, copied)
    assert same(first, outcome(f, expanded)) and same(first, outcome(f, copied))


@corpus(43, 44)
@pytest.mark.parametrize("seed", range(4))
def test_gradient_written_with_the_strides_of_another_tensor(seed, device):
    """Strides of do used for o, dv made like k: flash-attention 9ee0ff1d, 2423cca3. Five memory orders at once."""
    check(Case(2, 4, 2, 20, 30, 16, 24), torch.float16, device, layout=10 * seed)
    check(packed((8, 12), (20, 10), 4, 2, 16, 24), torch.float16, device, layout=10 * seed)


@every
@corpus(46)
@pytest.mark.parametrize("shift", [1, 3])
def test_misaligned_slice_after_an_aligned_call(op, shift, device):
    """A kernel specialised for 16-byte alignment, met by x[1:]: pytorch#184714, triton#11583."""
    f, tensors = an_op(op, device, torch.float16)
    expected = outcome(f, tensors)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        dense = x.detach()
        buffer = torch.empty(dense.numel() + shift, dtype=x.dtype, device=device)
        return buffer[shift:].as_strided(x.shape, x.stride(), shift).copy_(dense).requires_grad_()

    assert same(expected, outcome(f, [shifted(t) for t in tensors]))


@every
@corpus(47)
def test_strides_of_dimensions_of_one_element(op, device):
    """They mean nothing and may be anything: cudnn-frontend's random configurations."""
    f, tensors = an_op(op, device, B=1, S=1)
    strange = [relaid(t.detach(), seed).requires_grad_() for seed, t in enumerate(tensors)]
    assert any(a.stride() != b.stride() for a, b in zip(strange, tensors, strict=True))
    assert same(outcome(f, tensors), outcome(f, strange))


@every
@corpus(48)
def test_gradient_with_two_readers(op, device):
    """dx written over dy, which another branch still needs: Liger#370, #376 (Gemma 2)."""
    f, tensors = an_op(op, device)
    x = tensors[0]
    y = f(*tensors)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    side = torch.zeros_like(y, requires_grad=True)
    dx, dside = torch.autograd.grad((f(*tensors) + side).sum(), (x, side))
    assert torch.equal(dx, expected) and torch.equal(dside, torch.ones_like(side))


@corpus(49, 51)
def test_rotation_changes_its_input(device):
    """unsloth#5001; quack 7142154: unless asked to, and then autograd must know, and a leaf is refused."""
    q, k = qk(1, 2, 2, 6, 8, torch.float32, device)
    before, versions = (q.clone(), k.clone()), (q._version, k._version)
    cos, sin = rope_tables(6, 8, device)
    lk.rope(q, k, cos, sin)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]) and (q._version, k._version) == versions
    lk.rope(q, k, cos, sin, inplace=True)
    assert not torch.equal(q, before[0]) and q._version > versions[0] and k._version > versions[1]
    with pytest.raises(ValueError, match="q is a leaf"):
        lk.rope(q.requires_grad_(), k, cos, sin, inplace=True)


@corpus(50)
def test_packed_projection_shares_its_storage(device):
    """xformers#1401: q, k and v as views of one tensor, and gradients that run back into it."""
    qkv = torch.randn(2, 20, 3, 4, 16, device=device, requires_grad=True)

    def attend(q, k, v):
        return lk.attention(*(x.transpose(1, 2) for x in (q, k, v)))

    out = attend(*qkv.unbind(2))
    (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    apart = [x.detach().clone().requires_grad_() for x in qkv.unbind(2)]
    expected = attend(*apart)
    grads = torch.autograd.grad(expected, apart, torch.ones_like(out))
    assert torch.equal(out, expected) and torch.equal(dqkv, torch.stack(grads, 2))


# --- autograd, compilers, processes ----------------------------------------------------------------------------------


@every
@corpus(58)
def test_saved_tensors_pass_through_hooks(op, device):
    """TransformerEngine#1334, xformers#1152: saved tensors that are read twice, or that no hook sees."""
    f, tensors = an_op(op, device)
    expected = outcome(f, tensors)
    packed_away = []
    with saved_tensors_hooks(lambda x: packed_away.append(x) or x.clone(), lambda x: x):
        hooked = outcome(f, tensors)
    with save_on_cpu():
        offloaded = outcome(f, tensors)
    assert packed_away and same(expected, hooked) and same(expected, offloaded)


@every
@corpus(62, 64)
def test_fake_strides_are_the_real_ones(op, device):
    """pytorch#178499, prime-rl#3567: a compiler believes the fake kernel's strides. No op returns its input."""
    for seed in range(3):
        f, tensors = an_op(op, device)
        tensors = [relaid(t.detach(), seed + i).requires_grad_() for i, t in enumerate(tensors)]
        real = f(*tensors)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = f(*(mode.from_tensor(t) for t in tensors))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        assert real.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}


@corpus(62)
@pytest.mark.parametrize("seed", range(2))
def test_registered_ops_on_strided_inputs(seed, device):
    """torch.library.opcheck, on memory orders of every kind."""
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    q, k, v, do = (relaid(torch.randn(2, H, 9, 16, device=device), seed + i) for i, H in enumerate((4, 2, 2, 4)))
    call = (None, None, None, None, None, 9, 9, 0.25, None, None, 0)
    out, lse = torch.ops.llama_kernels.attention_forward(q, k, v, *call)
    opcheck(torch.ops.llama_kernels.attention_forward.default, (q, k, v, *call), test_utils=checks)
    grads = (do, None, q, k, v, out, lse, *call, True, True, True, False, None)
    opcheck(torch.ops.llama_kernels.attention_backward.default, grads, test_utils=checks)
    cos, sin = rope_tables(9, 16, device)
    opcheck(torch.ops.llama_kernels.rope.default, (q, k, cos, sin, None, False, False), test_utils=checks)
    opcheck(torch.ops.llama_kernels.rms_norm_forward.default, (q, None, None, 1e-6, 0.0), test_utils=checks)


@corpus(65)
def test_compiled_graphs_are_not_made_for_every_length(device):
    """A compilation a shape: Liger#988. Four batch sizes and lengths take two graphs, one of them dynamic."""
    graphs = 0

    def backend(graph, _):
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def layer(q, k, v):
        return lk.rms_norm(lk.attention(q, k, v))

    with torch.no_grad():
        for B, S in ((2, 8), (3, 12), (5, 20), (7, 9)):
            layer(*(torch.randn(B, H, S, 16, device=device) for H in (4, 2, 2)))
    assert graphs <= 2


@compiles
@corpus(65)
def test_kernels_are_not_compiled_for_every_shape():
    """flash-attention f692b98d: row counts and lengths are arguments, not constants. Alignment makes at most two."""
    from triton.runtime import driver

    from bench.host import LaunchingNothing

    before = driver._active
    driver.set_active(LaunchingNothing("sm_90"))
    try:
        kernel = rms_norm._rms_norm_forward_kernel
        kernel.device_caches.clear()
        for M in (2, 16, 48, 100, 1001, 4096):
            KERNELS["rms_norm_forward"](torch.zeros(M, 256), None, None, 1e-6, 0.0)
        compiled = len(kernel.device_caches[driver.active.get_current_device()][0])
    finally:
        driver._active = before
    assert compiled <= 3


@corpus(66, 68, 69, 75)
def test_no_autotuner_and_no_private_functions_of_triton():
    """An autotuner runs kernels on live tensors (triton#6547), chooses by too few keys (flash-attention e317aa49) and
    races between threads (triton#10295); libdevice moves between releases (Liger#79). We use neither."""
    for source in SOURCES:
        names = {node.attr for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"autotune", "heuristics", "libdevice", "Autotuner"}, source


@corpus(70)
def test_nothing_is_read_back():
    """A hidden wait for the GPU breaks CUDA graphs and stalls training: triton#10596. Only `checked` reads values."""
    for source in (Path(lk.__file__).parent / "ops").rglob("*.py"):
        tree = ast.parse(source.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = node.func.attr
                assert name not in {"item", "cpu", "nonzero", "numpy", "synchronize"}, f"{source}:{node.lineno}"
                if name in {"tolist", "aminmax"}:
                    line = source.read_text().splitlines()[node.lineno - 2 : node.lineno]
                    assert "values_are_checked" in " ".join(line), f"{source}:{node.lineno}"


@compiles
@corpus(71)
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches where torch's current device is: triton#2441, flash-attention#54, unsloth#6888."""
    from triton.runtime.jit import JITFunction

    inside, launches = [False], []

    @contextlib.contextmanager
    def on_device_of(x):
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(launch_cache, "on_device_of", on_device_of)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launches.append((self.__name__, inside[0])))
    from bench.codegen.cases import cases

    wanted = {"attention": "D=64 bfloat16 all", "decode": "D=64 bfloat16 all", "rope": "D=64 R=64 heads=32/8",
              "qk_norm_rope": "D=64 R=64 heads=32/8", "rms_norm": "N=32768"}  # fmt: skip
    for case in cases():
        if wanted.get(case.op) == case.label:
            case.launch()
    assert len({name for name, _ in launches}) == 13 and all(where for _, where in launches), launches


@compiles
@corpus(69, 74)
def test_cold_starts_of_many_threads_and_processes(tmp_path):
    """A cache that several write at once: triton#2688, #11512, fla deec73e1. Four processes of four threads."""
    program = """
import concurrent.futures, multiprocessing, sys, torch
from bench.host import LaunchingNothing
from llama_kernels.core.registry import KERNELS
from triton.runtime import driver

def norm(i):
    y, _, _ = KERNELS["rms_norm_forward"](torch.zeros(4, 256 * (1 + i % 2)), None, None, 1e-6, 0.0)
    assert y.shape == (4, 256 * (1 + i % 2))

def cold_start():
    driver.set_active(LaunchingNothing("sm_90"))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(norm, range(16)))) == 16

processes = [multiprocessing.get_context("fork").Process(target=cold_start) for _ in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join(120)
sys.exit(any(process.exitcode != 0 for process in processes))
"""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "cache").iterdir())


@corpus(74)
def test_home_that_cannot_be_written():
    """A container's HOME is often read-only: triton#518. Import, and the ops on a CPU, write nothing."""
    program = "import torch, llama_kernels as lk; print(*lk.rms_norm(torch.ones(2, 8)).shape)"
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("TRITON_CACHE")}, "HOME": "/proc/nowhere"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "8"], done.stderr[-1000:]


def test_the_table_of_the_documentation_is_true():
    """Every entry has a row; every row names just the tests that carry its number, or says why there is none."""
    marked: dict[int, set[str]] = {}
    for file in Path(__file__).parents[1].rglob("test_*.py"):
        for node in ast.parse(file.read_text()).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) in ("corpus", "pytest.mark.corpus"):
                    for number in mark.args:
                        marked.setdefault(number.value, set()).add(f"{file.stem.removeprefix('test_')}: {node.name}")
    listed: dict[int, set[str]] = {}
    for line in (ROOT / "docs/reliability.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].isdigit():
            tests = cells[3].replace("`", "").replace(" (GPU)", "")
            listed[int(cells[0])] = set() if tests.startswith("does not apply: ") else set(tests.split("<br>"))
    assert sorted(listed) == list(range(1, 77))
    assert {number: tests for number, tests in listed.items() if tests} == marked
