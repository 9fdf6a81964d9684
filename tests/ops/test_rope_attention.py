"""Rotation and attention as one op: outputs and gradients against float64 by the rules of judge.py."""

from __future__ import annotations

import pytest
import torch

import llama_kernels as lk
from tests.support.attention import (
    SMALL_TILES,
    anywhere,
    documents,
    eager,
    in_float64,
    make,
    padded_left,
    shared,
    so_far,
)
from tests.support.guards import guarded
from tests.support.ideal import attention_mask, eager_rope
from tests.support.judge import DTYPES, judge, relative_error
from tests.support.launches import kernels_launched
from tests.support.rope import POSITIONS, TABLE_DTYPES, TABLE_LAYOUTS, rows, tables, unlike_tables
from tests.support.rope_attention import check, ideal, run, square

# (D, R): whole and partial, powers of two and not, in a block that they fill and in one that they do not.
WIDTHS = ((64, 64), (128, 128), (256, 256), (2, 2), (16, 4), (64, 32), (128, 96), (80, 80), (80, 64), (96, 96), (5, 4))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", WIDTHS)
def test_heads_of_any_width_rotated_in_full_or_in_part(D, R, interleaved, device):
    check(square(37, D), torch.bfloat16, device, R, interleaved=interleaved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", [(64, 64), (80, 40), (48, 24)])
def test_outputs_and_gradients_in_each_dtype(D, R, interleaved, dtype, device):
    check(square(90, D, 48), dtype, device, R, interleaved=interleaved)


CASES = (
    square(150, 64, B=2, heads=(3, 3)),
    square(70, 64, heads=(8, 1), is_causal=False),
    square(1, 16),
    square(130, window_size=(20, 0)),
    square(130, is_causal=False, window_size=(9, 30)),
    square(100, softcap=3.0, scale=-0.3),
    square(90, sinks=True),
    square(150, B=2, kv_start=anywhere),
    square(100, B=2, is_causal=False, kv_start=padded_left, kv_end=so_far, sinks=True),
    square(130, 24, 40, heads=(6, 2), window_size=(20, 30), softcap=5.0, sinks=True, kv_start=anywhere),
    square(130, B=2, kv_start=documents, kv_prefix=shared),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_of_attention(case, device):
    check(case, torch.float16, device)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("tile", SMALL_TILES, ids=str)
def test_every_tile_ends_with_the_inverse_rotation(tile, interleaved, device):
    check(square(75, 32, B=2), torch.float16, device, 16, interleaved=interleaved, tile=tile)


@pytest.mark.parametrize("form", POSITIONS)
def test_position_ids_of_every_shape(form, device):
    position_ids = POSITIONS[form](2, 13).to(torch.int32).to(device)
    check(square(13, 64, B=2), torch.float16, device, None, position_ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R, full", [(64, 64, False), (80, 40, False), (64, 64, True)])
def test_several_positions_a_token(D, R, full, interleaved, dtype, device):
    position_ids = torch.randint(0, 60, (3, 2, 37), device=device)
    angles = unlike_tables(60, R, device) if full else tables(60, R, device)
    axes = torch.randint(0, 3, angles[0].shape[-1:], device=device)
    check(square(37, D, B=2), dtype, device, None, position_ids, interleaved=interleaved, angles=angles, axes=axes)


def test_equal_positions_on_every_axis_give_the_rotated_operands_of_one_position(device):
    x, angles = make(square(40, 64, B=2), torch.bfloat16, device), tables(60, 64, device)
    one, axes = torch.randint(0, 60, (2, 40), device=device), lk.rope_axes((8, 12, 12), device=device)
    given = (x.q, x.k, x.v, *angles)
    assert torch.equal(lk.rope_attention(*given, one), lk.rope_attention(*given, one.expand(3, 2, 40), axes=axes))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_tables_with_a_row_for_each_token(table_dtype, batch, device):
    angles = (table.to(table_dtype).unflatten(0, (batch, 40)) for table in tables(40 * batch, 32, device))
    check(square(40, B=2), torch.float16, device, angles=tuple(angles))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", [(64, 64), (80, 48)])
@pytest.mark.parametrize("table_dtype", TABLE_DTYPES, ids=str)
def test_tables_with_an_angle_for_each_element(table_dtype, D, R, interleaved, device):
    angles = unlike_tables(37, R, device, table_dtype)
    check(square(37, D), torch.bfloat16, device, interleaved=interleaved, angles=angles)


@pytest.mark.parametrize("R", [64, 128])
@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
def test_tables_of_any_strides(layout, R, device):
    """64 entries of heads of 128 are an angle a pair, read in two parts by the kernels that end with the rotation; 128
    are an angle an element."""
    angles = tuple(TABLE_LAYOUTS[layout](table) for table in unlike_tables(40, R, device, torch.bfloat16))
    check(square(13, 128, B=2), torch.float16, device, angles=angles)


def test_float64_tables_in_the_kernels_that_end_with_the_inverse_rotation(device):
    angles = tuple(table.double() for table in tables(40, 64, device))
    check(square(40, 64), torch.float16, device, angles=angles)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_positions_outside_of_the_table_are_clamped(interleaved, device):
    """Forward and backward. The NaN around the tables is not read."""
    x = make(square(6), torch.float32, device)
    angles = [guarded(table) for table in tables(5, 32, device)]
    positions = torch.tensor([3, -1, 4, 5, 2**62, -(2**63)], device=device)
    outside = run(lk, square(6), x, *angles, positions, interleaved=interleaved)
    inside = run(lk, square(6), x, *angles, positions.clamp(0, 4), interleaved=interleaved)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(outside, inside, strict=True))


@pytest.mark.parametrize("family", ["peaky", "tiny", "huge"])
def test_large_and_tiny_inputs(family, device):
    check(square(100, 64), torch.bfloat16, device, family=family)


@pytest.mark.parametrize("layout", [3, 17])
def test_inputs_of_any_strides(layout, device):
    check(square(40, B=2), torch.float16, device, layout=layout)


@pytest.mark.deterministic
def test_the_forward_equals_separate_calls_and_the_gradients_are_more_exact(device):
    """Separate calls round dq and dk before their rotation and after it, this op once. dv does not depend on it."""
    case = square(128, 64)
    x, angles = make(case, torch.bfloat16, device), tables(128, 64, device)
    together = run(lk, case, x, *angles)
    out, lse = lk.attention(*lk.rope(x.q, x.k, *angles), x.v, return_lse=True)
    apart = [out, lse, *torch.autograd.grad((out, lse), x.tensors, (x.do, x.dlse))]
    truth = run(lk.reference, case, in_float64(x), *(table.double() for table in angles))
    for i in (0, 1, 4):
        assert torch.equal(together[i], apart[i])
    for i in (2, 3):
        assert relative_error(together[i], truth[i]) < 0.95 * relative_error(apart[i], truth[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_worse_than_eager(dtype, device):
    case = square(128, 64)
    x, (cos, sin) = make(case, dtype, device), tables(128, 64, device)
    x.dlse.zero_()
    with kernels_launched() as launches:
        results = run(lk, case, x, cos, sin)
    truth = run(lk.reference, case, in_float64(x), cos.double(), sin.double())
    best = ideal(case, x, cos, sin, None, False, launches)
    with torch.no_grad():
        see = attention_mask(128, 128, True, (-1, -1), None, None, device)
        c, s = rows(x.q, cos, None), rows(x.q, sin, None)
        q, k = (eager_rope(t, c, s, False) for t in (x.q, x.k))
        out, _, dq, dk, dv, _ = eager(q, k, x.v, see, 64**-0.5, None, None, x.do, x.dlse)
        dq, dk = (eager_rope(grad, c, -s, False) for grad in (dq, dk))
    for i, name, theirs in ((0, "out", out), (2, "dq", dq), (3, "dk", dk), (4, "dv", dv)):
        judge(name, results[i], truth[i], best[i], theirs)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "s", "qk", "kv", "qs"])
def test_some_gradients_equal_those_of_a_call_for_all_where_heads_are_rotated_in_part(wanted, device):
    t = {name: torch.randn(1, H, 12, 32, device=device) for name, H in (("q", 4), ("k", 2), ("v", 2))}
    t["s"] = torch.randn(4, device=device)

    def gradients(names: str) -> dict[str, torch.Tensor]:
        leaves = {name: x.detach().requires_grad_(name in names) for name, x in t.items()}
        q, k, v, sinks = leaves.values()
        out = lk.rope_attention(q, k, v, *tables(12, 24, device), sinks=sinks)
        asked = [leaves[name] for name in names]
        return dict(zip(names, torch.autograd.grad(out, asked, torch.ones_like(out)), strict=True))

    everything = gradients("qkvs")
    assert all(torch.equal(grad, everything[name]) for name, grad in gradients(wanted).items())


@pytest.mark.parametrize("shapes", [((0, 4, 7, 8), (0, 2, 7, 8)), ((2, 4, 0, 8), (2, 2, 0, 8)),
                                    ((2, 0, 7, 8), (2, 2, 7, 8))], ids=str)  # fmt: skip
def test_empty_inputs_give_empty_outputs(shapes, device):
    q, k = (torch.randn(shape, device=device).requires_grad_() for shape in shapes)
    v = torch.randn(shapes[1], device=device).requires_grad_()
    out = lk.rope_attention(q, k, v, *tables(7, 8, device))
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)]
    assert not any(grad.any() for grad in grads)
