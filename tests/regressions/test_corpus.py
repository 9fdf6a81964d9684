"""Bugs that users of other kernels met, each as a test: sizes, masks and numbers.

A docstring says what went wrong there. The mark `corpus` has the numbers of the entries of docs/reliability.md that a
test answers.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from bench.attention_options import attention_options
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention.tables import Tile
from tests.support.attention import Case, check, packed, tiles
from tests.support.environment import compiles
from tests.support.guards import guarded, guarded_allocations
from tests.support.ideal import attention_mask, drawn, ideal_attention, ideal_rms_norm
from tests.support.judge import equal_results, judge
from tests.support.launches import KERNELS_RUN, kernels_launched, names
from tests.support.rms_norm import check as check_norm
from tests.support.rope import tables as rope_tables

corpus = pytest.mark.corpus


def judge_rows(name: str, q, k, v, out, lse=None, **options: Any) -> None:
    """Judge `out` and lse of causal attention."""
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
def test_more_than_65536_keys(Sq, device):
    """A product of 32 bits was wrong from exactly 2^16 on: pytorch#187225, #162588. The window ends on both sides."""
    Sk, left = 2**16 + 30, 80
    q, k, v = (torch.randn(1, 1, S, 16, device=device).half() for S in (Sq, Sk, Sk))
    out, lse = lk.attention(q, k, v, window_size=(left, 0), return_lse=True)
    near = [x[:, :, -(left + Sq) :] for x in (k, v)]
    judge_rows("out", q, *near, out, lse, window_size=(left, 0))


@compiles
@corpus(7)
def test_only_the_first_grid_axis_exceeds_65535():
    """Batch times heads on a grid's second axis, which ends at 65,535: xformers#1046, #1054."""
    from triton.runtime.jit import JITFunction

    grids = []
    many = 70_000
    q = torch.zeros(many, 1, 1, 16, dtype=torch.float16)
    lse, x = torch.zeros(many, 1, 1), torch.zeros(many, 16)
    call = attention_options(1, 1, 0.25)
    with mock.patch.object(JITFunction, "run", lambda self, *args, grid, **options: grids.append(grid)):
        KERNELS["attention_forward"](q, q, q, *call)
        for need_dq in (True, False):  # else delta has a launch of its own
            KERNELS["attention_backward"](q, None, q, q, q, q, lse, *call, need_dq, True, True, False, None)
        KERNELS["rope"](q, q, torch.zeros(1, 8), torch.zeros(1, 8), None, False, False)
        KERNELS["rms_norm_forward"](x, None, None, 1e-6, 0.0)
        KERNELS["rms_norm_backward"](x, None, x, torch.zeros(16), torch.zeros(many, 1), 1e-6, 0.0, x.dtype, True, True)
        KERNELS["qk_norm_rope"](q, q, None, None, torch.zeros(1, 8), torch.zeros(1, 8), None, 1e-6, 0.0, False)
        few, wide = torch.zeros(2, 1, 4, 16).half(), torch.zeros(2, 1, 4096, 16).half()
        KERNELS["attention_forward"](few, wide, wide, *attention_options(4, 4096, 0.25))
    assert len(grids) == 12 and max(grid[0] for grid in grids) >= many
    assert all(n <= 65535 for grid in grids for n in grid[1:])


@corpus(9)
def test_norms_of_rows_longer_than_65536(device):
    """Longer rows were refused, spilled registers, or were summed wrongly: Liger and quack."""
    check_norm((2, 65537), torch.float16, device)


@corpus(10, 11)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 9])
def test_rows_after_the_first_rows_of_a_program_are_written(M, device):
    """The number of programs had a cap, and none looped over further rows (vllm-ascend#5012). Partial sums of programs
    without rows were not initialised (flash-attention#781). In the interpreter four programs share the rows."""
    check_norm((M, 4096), torch.float16, device, residual=True)


@corpus(12)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0,)], ids=str)
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape, device):
    """Divisions by zero: flash-attention#2515, #2470; xformers ecdab5bb."""
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
def test_masked_lanes_do_not_enter_the_mean(N, device):
    """Lanes past the end of a row counted as values: unsloth#1867, Liger#582. It shows where the mean is far from 0."""
    check_norm((7, N), torch.float32, device, layout=lambda x: x + 5)


@corpus(14, 15)
@pytest.mark.parametrize(
    "D, DV", [(40, 40), (59, 59), (80, 80), (96, 96), (111, 111), (160, 160), (192, 192), (64, 24)]
)
def test_head_widths_that_are_no_power_of_two(D, DV, device):
    """Columns past the end of the head were used: flash-attention 215930bc, aacc10fb, 470010f5. Where v has another
    width, a buffer had the shape of the wrong tensor: 6d199aa2."""
    check(Case(1, 2, 1, 20, 30, D, DV), torch.float16, device)


@corpus(16)
@pytest.mark.parametrize("S", [1, 2, 15, 16, 17, 31, 32, 33])
def test_the_tail_block_reads_nothing_past_the_end(S, device):
    """A tensor that ends inside a block: xformers#1100, FlagGems f395f956. Here each tensor lies between NaN."""
    check(Case(1, 2, 2, S, S, 16, 16), torch.float16, device, tile=Tile(16, 16, 4, 1))


# --- masks -----------------------------------------------------------------------------------------------------------


@corpus(19)
def test_the_judge_takes_nan_for_equal_only_where_both_are_nan():
    """A comparison took NaN for equal to everything: cubecl#1070, Liger#261."""
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
def test_gradients_where_queries_far_outnumber_keys(device):
    """NaN gradients: flash-attention#443. A third of the lengths of its report."""
    check(packed((25, 11, 49), (1, 1, 1), 4, 2, 32, 32), torch.float16, device)


@corpus(22)
@pytest.mark.parametrize("left", [0, 1, 19, 20, 21])
def test_a_window_does_not_count_the_querys_own_key(left, device):
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
    """Each of them worked alone, but not together: xformers 1e13ad90."""
    check(Case(1, Hq, 2, Sq, Sk, 16, 16, window_size=(9, 3), is_causal=False), torch.float16, device)


@corpus(24, 25)
def test_empty_sequences_write_nothing_out_of_bounds(device):
    """Sequences of length zero, and rows after the last one: flash-attention#2562, #1713, #2324; pytorch#176793."""
    check(packed((0, 5, 0, 4, 0), (0, 5, 0, 4, 0), 2, 2, 16, 16), torch.float16, device)
    check(packed((3, 5, 0, 4), (0, 5, 7, 4), 2, 1, 16, 16), torch.float16, device)
    q, k, v = (guarded(torch.randn(12, 2, 16, device=device)).requires_grad_() for _ in range(3))
    cu = torch.tensor([0, 0, 5, 5, 9, 9], dtype=torch.int32, device=device)
    with guarded_allocations():
        out = lk.attention_varlen(q, k, v, cu, cu, 5, 5)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(x[:9].any() and not x[9:].any() for x in (out, *grads))


@corpus(26)
def test_nan_in_padding_reaches_nothing(device):
    """0 times NaN in p @ v: xformers' test_nans_in_padding. Keys that no row sees may be NaN, in the middle of a block
    too, as in a cache that is not full."""
    q, k, v = (torch.randn(2, H, S, 16, device=device) for H, S in ((2, 3), (1, 50), (1, 50)))
    filled = torch.tensor([[17] * 3, [40] * 3], dtype=torch.int32, device=device)
    start = torch.tensor([[0] * 3, [5] * 3], dtype=torch.int32, device=device)
    dirty = [x.clone() for x in (k, v)]
    for x in dirty:
        x[0, :, 17:] = torch.nan
        x[1, :, :5] = torch.inf
        x[1, :, 40:] = torch.nan
    for Sq in (1, 3):
        options = {"is_causal": False, "kv_start": start[:, :Sq], "kv_end": filled[:, :Sq]}
        for tile in (Tile(16, 16, 4, 1), None):
            results = []
            for keys, values in ((k, v), dirty):
                leaves = [x.detach().clone().requires_grad_() for x in (q[:, :, :Sq], keys, values)]
                with tiles(tile):
                    out = lk.attention(*leaves, **options)
                    results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
            assert equal_results(*results)


@corpus(28)
@pytest.mark.parametrize("S", [1, 17, 65])
def test_lse_of_one_key_head_and_odd_lengths(S, device):
    """xformers 41646dbb: wrong for one key head where the length is one past a block."""
    check(Case(2, 4, 1, S, S, 16, 16), torch.float16, device, tile=Tile(16, 16, 4, 1))


# --- numerics --------------------------------------------------------------------------------------------------------


@corpus(29)
def test_the_weight_gradient_is_summed_in_float32(device):
    """Summed in half precision, its error grows with the number of rows: Liger#950."""
    check_norm((2048, 24), torch.bfloat16, device)


@compiles
@corpus(30, 36, 63)
@pytest.mark.parametrize("op, label", [("attention", "D=64 float32 causal"), ("rms_norm", "N=1024 +residual"),
                                       ("rope", "D=64 R=64 heads=32/8")])  # fmt: skip
def test_no_scalar_becomes_a_double_and_no_product_takes_tf32(op, label):
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
def test_the_gradient_of_residual_out_joins_after_the_backward_of_the_norm(used, device):
    """It joined before: quack#53."""
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
def test_prefill_and_decoding_agree(device):
    """Constants differed between the two: flash-attention c2006099. The last row of a prefill is a decoding step."""
    q, k, v = (torch.randn(1, H, 600, 32, device=device).half() for H in (8, 2, 2))
    with kernels_launched() as launches:
        whole, whole_lse = lk.attention(q, k, v, return_lse=True)
        last, lse = lk.attention(q[:, :, -1:], k, v, return_lse=True)
    assert names(launches) == ["_forward_kernel", "_decode_kernel", "_combine_kernel"] * KERNELS_RUN
    judge_rows("decoding", q[:, :, -1:], k, v, last, lse)
    judge_rows("prefill", q[:, :, -1:], k, v, whole[:, :, -1:], whole_lse[..., -1:])


@corpus(38)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_an_inf_or_nan_stays_in_its_row_token_or_head(bad, device):
    """A mask by multiplication: TransformerEngine 71971e33. The value stays in its row of a norm, its token of RoPE,
    and its batch entry, head and packed sequence of attention; and it does not vanish there."""
    x = torch.randn(6, 40, device=device)
    broken = x.clone()
    broken[2, 7] = bad
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(lk.rms_norm(broken)[rest], lk.rms_norm(x)[rest]) and lk.rms_norm(broken)[2].isnan().any()
    q, k, v = (torch.randn(2, 2, 20, 16, device=device) for _ in range(3))
    cos, sin = rope_tables(20, 16, device)
    spoiled = q.clone()
    spoiled[1, 0, 4, 3] = bad
    rotated, clean = lk.rope(spoiled, None, cos, sin)[0], lk.rope(q, None, cos, sin)[0]
    differs = (rotated != clean).nonzero()
    assert len(differs) == 2 and (differs[:, :3] == torch.tensor([1, 0, 4], device=device)).all()  # the pair
    cu = torch.tensor([0, 10, 20], dtype=torch.int32, device=device)
    for which in range(3):
        given = [t.clone() for t in (q, k, v)]
        given[which][1, 0, 4, 3] = bad
        out, expected = lk.attention(*given), lk.attention(q, k, v)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1, 1], expected[1, 1])
        assert not out[1, 0].isfinite().all() or which == 1
        flat = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
        expected = lk.attention_varlen(*flat, cu, cu, 10, 10)
        flat[which][14, 0, 3] = bad
        out = lk.attention_varlen(*flat, cu, cu, 10, 10)
        assert torch.equal(out[:10], expected[:10]) and torch.equal(out[:, 1], expected[:, 1])


@corpus(39)
def test_bfloat16_gradients_may_exceed_the_range_of_float16(device):
    """Triton's tutorial casts dS to float16 in any dtype, which loses gradients of bfloat16 beyond 65,504."""
    q, k, v = (torch.randn(1, 2, 30, 16, device=device).bfloat16().requires_grad_() for _ in range(3))
    out = lk.attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), torch.full_like(out, 2.0**17), retain_graph=True)
    unit = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.equal(g, u * 2.0**17) for g, u in zip(grads, unit, strict=True))
