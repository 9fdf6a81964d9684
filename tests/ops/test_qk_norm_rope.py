"""Norm and rotation of heads in one op: outputs and gradients against float64 by the rules of judge.py."""

from __future__ import annotations

import pytest
import torch

import llama_kernels as lk
from tests.support.judge import DTYPES
from tests.support.qk_norm_rope import check, check_tangents, weights
from tests.support.rope import LAYOUTS, POSITIONS, TABLE_DTYPES, TABLE_LAYOUTS, qk, tables, unlike_tables


def by_nesting(x: torch.Tensor) -> list[int]:
    """The dimensions from the innermost to the outermost. A dense result keeps this order of an input with gaps."""
    return sorted(range(x.ndim), key=x.stride)


# Every width in bfloat16; in the others one that is rotated whole, and one that is not.
WIDTHS = ((2, 2), (16, 16), (64, 64), (80, 80), (128, 128), (256, 256), (64, 32), (80, 20), (128, 96), (5, 4))
WIDTHS_AND_DTYPES = [(D, R, torch.bfloat16) for D, R in WIDTHS]
WIDTHS_AND_DTYPES += [(*widths, dtype) for widths in ((64, 64), (128, 96)) for dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R, dtype", WIDTHS_AND_DTYPES)
def test_heads_of_any_width_rotated_in_full_or_in_part(D, R, interleaved, dtype, device):
    q, k = qk(2, 4, 2, 13, D, dtype, device)
    check(q, k, *weights(D, dtype, device), *tables(13, R, device), interleaved=interleaved)


@pytest.mark.parametrize("Hq, Hkv", [(1, 1), (3, 3), (8, 1), (32, 8), (7, 5)])
def test_any_number_of_query_and_key_heads(Hq, Hkv, device):
    q, k = qk(1, Hq, Hkv, 37, 64, torch.bfloat16, device)
    check(q, k, *weights(64, torch.bfloat16, device), *tables(40, 64, device))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("bare", ["", "q", "k", "qk"])
def test_weight_offset_and_eps(bare, eps, offset, device):
    q, k = qk(2, 4, 2, 13, 64, torch.bfloat16, device)
    q_weight, k_weight = weights(64, torch.bfloat16, device, offset)
    q_weight, k_weight = None if "q" in bare else q_weight, None if "k" in bare else k_weight
    check(q, k, q_weight, k_weight, *tables(13, 64, device), eps=eps, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_a_weight_of_another_dtype(dtype, weight_dtype, device):
    q, k = qk(2, 4, 2, 13, 64, dtype, device)
    check(q, k, *weights(64, weight_dtype, device), *tables(13, 64, device))


@pytest.mark.parametrize("form", POSITIONS)
def test_position_ids_of_every_shape_and_integer_dtype(form, device):
    q, k = qk(2, 4, 2, 13, 64, torch.float16, device)
    position_ids = POSITIONS[form](2, 13).to(torch.int32).to(device)
    check(q, k, *weights(64, torch.float16, device), *tables(60, 64, device), position_ids)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", [(2, 2), (64, 64), (80, 80), (128, 96), (64, 34)])
def test_tables_with_an_angle_for_each_element(D, R, interleaved, device):
    """The gradients are those of the transpose, which is not the inverse here."""
    q, k = qk(2, 4, 2, 13, D, torch.bfloat16, device)
    check(q, k, *weights(D, q.dtype, device), *unlike_tables(13, R, device), interleaved=interleaved)


@pytest.mark.parametrize("R", [32, 64])
@pytest.mark.parametrize("table_dtype", TABLE_DTYPES, ids=str)
def test_tables_of_every_dtype(table_dtype, R, device):
    """32 entries are an angle a pair, 64 are an angle an element."""
    q, k = qk(2, 4, 2, 13, 64, torch.float32, device)
    check(q, k, *weights(64, q.dtype, device), *unlike_tables(13, R, device, table_dtype))


@pytest.mark.parametrize("R", [32, 64])
@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
def test_tables_of_any_strides(layout, R, device):
    q, k = qk(2, 4, 2, 13, 64, torch.bfloat16, device)
    cos, sin = (TABLE_LAYOUTS[layout](table) for table in unlike_tables(40, R, device, torch.bfloat16))
    check(q, k, *weights(64, q.dtype, device), cos, sin)


def test_packed_tokens_with_and_without_position_ids(device):
    q, k = (x[0].transpose(0, 1) for x in qk(1, 4, 2, 50, 64, torch.bfloat16, device))
    position_ids = torch.cat((torch.arange(20), torch.arange(30))).to(device)
    check(q, k, *weights(64, torch.bfloat16, device), *tables(50, 64, device), position_ids)


def test_k_may_be_none(device):
    q, _ = qk(2, 4, 2, 13, 64, torch.bfloat16, device)
    check(q, None, weights(64, torch.bfloat16, device)[0], None, *tables(13, 64, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_strides(layout, device):
    q, k = (LAYOUTS[layout](x) for x in qk(2, 4, 2, 13, 64, torch.float32, device))
    check(q, k, *weights(64, torch.float32, device), *tables(13, 64, device), order=by_nesting)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_large_and_tiny_inputs(size, dtype, device):
    if dtype == torch.float16 and size > 1:
        size = 100
    q, k = ((size * x.float()).to(dtype) for x in qk(1, 4, 2, 40, 64, dtype, device))
    check(q, k, *weights(64, dtype, device), *tables(40, 64, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_worse_than_eager(dtype, device):
    q, k = qk(2, 4, 2, 40, 64, dtype, device)
    check(q, k, *weights(64, dtype, device), *tables(40, 64, device), eager=True)


def test_a_head_of_zeros_where_eps_is_zero_spoils_no_other(device):
    """rstd is infinite for it, and must not reach the padding of a tile."""
    q, k = qk(1, 3, 1, 5, 16, torch.float32, device)
    check(q, k, *weights(16, torch.float32, device), *tables(5, 16, device), eps=0.0)


@pytest.mark.parametrize("shapes", [((0, 4, 7, 8), (0, 2, 7, 8)), ((2, 4, 0, 8), (2, 2, 0, 8)), ((0, 4, 8), (0, 2, 8)),
                                    ((2, 4, 7, 8), (2, 0, 7, 8)), ((2, 0, 7, 8), (2, 2, 7, 8))], ids=str)  # fmt: skip
def test_empty_inputs_give_empty_outputs(shapes, device):
    leaves = [torch.randn(shape, device=device).requires_grad_() for shape in (*shapes, (8,), (8,))]
    outs = lk.qk_norm_rope(*leaves, *tables(7, 8, device))
    grads = torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])
    assert [x.shape for x in (*outs, *grads)] == [x.shape for x in (*leaves[:2], *leaves)]
    for x, dw in zip(leaves[:2], grads[2:], strict=True):
        assert x.numel() or torch.equal(dw, torch.zeros_like(dw))


def test_results_are_more_exact_than_those_of_separate_calls(device):
    """They round the norm's result to bfloat16; this does not."""
    q, k = qk(2, 4, 2, 40, 64, torch.bfloat16, device)
    w, angles = weights(64, torch.bfloat16, device), tables(40, 64, device)
    apart = lk.rope(lk.rms_norm(q, w[0]), lk.rms_norm(k, w[1]), *angles)
    together = lk.qk_norm_rope(q, k, *w, *angles)
    truth = lk.reference.qk_norm_rope(*(x.double() for x in (q, k, *w)), *(x.double() for x in angles))
    for a, b, R in zip(apart, together, truth, strict=True):
        assert (b.double() - R).norm() < 0.9 * (a.double() - R).norm()


# --- tangents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R, dtype", WIDTHS_AND_DTYPES)
def test_tangents_of_heads_of_any_width(D, R, interleaved, dtype, device):
    q, k = qk(2, 4, 2, 13, D, dtype, device)
    check_tangents(q, k, *weights(D, dtype, device), *tables(13, R, device), interleaved=interleaved)


@pytest.mark.parametrize("bare", ["", "q", "k", "qk"])
def test_tangents_with_positions_an_offset_and_an_epsilon(bare, device):
    q, k = qk(2, 4, 2, 13, 64, torch.bfloat16, device)
    q_weight, k_weight = weights(64, torch.bfloat16, device, 1.0)
    q_weight, k_weight = None if "q" in bare else q_weight, None if "k" in bare else k_weight
    positions = torch.randint(0, 40, (2, 13), device=device)
    angles = unlike_tables(40, 64, device)
    check_tangents(q, k, q_weight, k_weight, *angles, positions, eps=1e-2, offset=1.0)
    check_tangents(q, None, q_weight, None, *angles, positions, eps=1e-2, offset=1.0)
