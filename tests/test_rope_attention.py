"""Rotation and attention as one op: outputs and gradients against float64 by the rules of judge.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import llama_kernels as lk
from llama_kernels.ops.attention.tables import Tile
from llama_kernels.ops.rotation import full_width, rotates_in_registers
from tests.judge import (
    attention_mask,
    drawn,
    eager_rope,
    guarded,
    guarded_allocations,
    ideal_attention,
    judge,
    memory_order,
    relaid,
    relative_error,
    transposed,
    unchanged,
)
from tests.launches import Launched, kernels_launched, names
from tests.test_attention import (
    SMALL_TILES,
    Case,
    Inputs,
    anywhere,
    eager,
    in_float64,
    make,
    padded_left,
    score_bound,
    sink_terms,
    so_far,
    tiles,
)
from tests.test_hopper import machine
from tests.test_rope import POSITIONS, TABLE_DTYPES, TABLE_LAYOUTS, rows, tables, unlike_tables

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(ops: Any, case: Case, x: Inputs, *angles: torch.Tensor | None, interleaved: bool = False) -> list[torch.Tensor]:
    """out, lse and the gradients of `ops`' rope_attention, lk or lk.reference."""
    options = {name: getattr(case, name) for name in ("is_causal", "window_size", "softcap", "scale")}
    options.update(sinks=x.sinks, kv_start=x.kv_start, kv_end=x.kv_end, return_lse=True, interleaved=interleaved)
    out, lse = ops.rope_attention(x.q, x.k, x.v, *angles, **options)
    return [out, lse, *torch.autograd.grad((out, lse), x.tensors, (x.do, x.dlse))]


@torch.no_grad()
def ideal(
    case: Case, x: Inputs, cos, sin, position_ids, interleaved: bool, launches: Sequence[Launched] = ()
) -> list[list[torch.Tensor]]:
    """The draws of each result of `run`, float32 that rounds where the kernels' contract does: q and k as rotated, and
    dq and dk as turned back, where that is done in registers; else before it too. The Hopper backward, where it is
    among the launches, turns a dk that is rounded."""
    turn = functools.partial(eager_rope, interleaved=interleaved)
    c, s = (rows(x.q, table.float(), position_ids) for table in (cos, sin))
    q, k = (turn(t.float(), c, s).to(t.dtype) for t in (x.q, x.k))
    see = attention_mask(case.Sq, case.Sk, case.is_causal, case.window_size, x.kv_start, x.kv_end, x.q.device)
    scale = case.D**-0.5 if case.scale is None else case.scale
    call = (q, k, x.v, see, scale, case.softcap, x.sinks, x.do, x.dlse)

    def turned_back(grad: torch.Tensor) -> torch.Tensor:
        return turn(grad.float(), c, transposed(s, case.D, interleaved))

    out, lse, *grads = drawn(ideal_attention, *call)
    grads[:2] = ([turned_back(grad).to(grad.dtype) for grad in draws] for draws in grads[:2])
    if not full_width(cos, case.D) and rotates_in_registers(cos.shape[-1], interleaved):
        in_registers = slice(1) if "_hopper_backward_kernel" in names(launches) else slice(2)
        grads[in_registers] = drawn(ideal_attention, *call, closing=turned_back)[2:][in_registers]
    return [out, lse, *grads]


def check(
    case: Case, dtype: torch.dtype, device: torch.device, R: int | None = None,
    position_ids: torch.Tensor | None = None, *, interleaved: bool = False,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None, family: str = "randn",
    tile: Tile | Mapping[str, Tile] | None = None, layout: int | None = None,
) -> None:  # fmt: skip
    x = make(case, dtype, device, family)
    if layout is not None:
        x.q, x.k, x.v, x.do = (relaid(t, layout + i) for i, t in enumerate((x.q, x.k, x.v, x.do)))
    cos, sin = angles or tables(max(case.Sq, 60), case.D if R is None else R, device)
    safe = Inputs(*(None if t is None else guarded(t) for t in vars(x).values()))
    given = [guarded(cos), guarded(sin), None if position_ids is None else guarded(position_ids)]
    with guarded_allocations(), tiles(tile), unchanged(*vars(safe).values(), *given), kernels_launched() as launches:
        results = run(lk, case, safe, *given, interleaved=interleaved)
    wide = in_float64(x)
    truth = run(lk.reference, case, wide, cos.double(), sin.double(), position_ids, interleaved=interleaved)
    named = ["out", "lse", "dq", "dk", "dv", "dsinks"][: len(results)]
    terms = {"lse": score_bound(case, x)} | ({"dsinks": sink_terms(x, *truth[:2])} if case.sinks else {})
    ideals = ideal(case, x, cos, sin, position_ids, interleaved, launches)
    for name, K, R_, I in zip(named, results, truth, ideals, strict=True):
        judge(name, K, R_, I, terms=terms.get(name, 0.0))
    for name, K, t in zip(named[2:], results[2:], x.tensors, strict=True):
        assert (K.dtype, memory_order(K)) == (t.dtype, memory_order(t)), name
    assert (results[0].dtype, results[1].dtype) == (dtype, torch.float32)


def square(S: int, D: int = 32, DV: int | None = None, B: int = 1, heads: tuple[int, int] = (4, 2), **on: Any) -> Case:
    return Case(B, *heads, S, S, D, D if DV is None else DV, **on)


# (D, R): whole and partial, powers of two and not, in a block that they fill and in one that they do not.
WIDTHS = ((64, 64), (128, 128), (256, 256), (2, 2), (16, 4), (64, 32), (128, 96), (80, 80), (80, 64), (96, 96), (5, 4))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", WIDTHS)
def test_widths(D, R, interleaved, device):
    check(square(37, D), torch.bfloat16, device, R, interleaved=interleaved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", [(64, 64), (80, 40), (48, 24)])
def test_dtypes(D, R, interleaved, dtype, device):
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
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_of_attention(case, device):
    check(case, torch.float16, device)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("tile", SMALL_TILES, ids=str)
def test_every_tile_ends_with_the_rotation(tile, interleaved, device):
    check(square(75, 32, B=2), torch.float16, device, 16, interleaved=interleaved, tile=tile)


@pytest.mark.parametrize("form", POSITIONS)
def test_position_ids(form, device):
    position_ids = POSITIONS[form](2, 13).to(torch.int32).to(device)
    check(square(13, 64, B=2), torch.float16, device, None, position_ids)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_a_row_a_token(table_dtype, batch, device):
    angles = (table.to(table_dtype).unflatten(0, (batch, 40)) for table in tables(40 * batch, 32, device))
    check(square(40, B=2), torch.float16, device, angles=tuple(angles))


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", [(64, 64), (80, 48)])
@pytest.mark.parametrize("table_dtype", TABLE_DTYPES, ids=str)
def test_an_angle_an_element(table_dtype, D, R, interleaved, device):
    angles = unlike_tables(37, R, device, table_dtype)
    check(square(37, D), torch.bfloat16, device, interleaved=interleaved, angles=angles)


@pytest.mark.parametrize("R", [64, 128])
@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
def test_layouts_of_tables(layout, R, device):
    """64 entries of heads of 128 are an angle a pair, read in two parts by the kernels that end with the rotation; 128
    are an angle an element."""
    angles = tuple(TABLE_LAYOUTS[layout](table) for table in unlike_tables(40, R, device, torch.bfloat16))
    check(square(13, 128, B=2), torch.float16, device, angles=angles)


def test_float64_tables_in_the_kernels_that_end_with_the_rotation(device):
    angles = tuple(table.double() for table in tables(40, 64, device))
    check(square(40, 64), torch.float16, device, angles=angles)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_positions_outside_of_the_table_are_its_ends(interleaved, device):
    """In both directions: the NaN around the tables is nowhere."""
    x = make(square(6), torch.float32, device)
    angles = [guarded(table) for table in tables(5, 32, device)]
    positions = torch.tensor([3, -1, 4, 5, 2**62, -(2**63)], device=device)
    outside = run(lk, square(6), x, *angles, positions, interleaved=interleaved)
    inside = run(lk, square(6), x, *angles, positions.clamp(0, 4), interleaved=interleaved)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(outside, inside, strict=True))


@pytest.mark.parametrize("family", ["peaky", "tiny", "huge"])
def test_inputs_of_every_size(family, device):
    check(square(100, 64), torch.bfloat16, device, family=family)


@pytest.mark.parametrize("layout", [3, 17])
def test_layouts(layout, device):
    check(square(40, B=2), torch.float16, device, layout=layout)


@pytest.mark.deterministic
def test_forward_is_the_two_calls_bit_for_bit_and_the_gradients_are_nearer_to_the_truth(device):
    """They round dq and dk, and the rotation of them; this rounds once. dv sees nothing of it."""
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


@pytest.mark.parametrize("R", [32, 24])
@pytest.mark.parametrize("wanted", ["q", "k", "v", "s", "qk", "kv", "qs"])
def test_only_the_gradients_asked_for(wanted, R, device):
    t = {name: torch.randn(1, H, 12, 32, device=device) for name, H in (("q", 4), ("k", 2), ("v", 2))}
    t["s"] = torch.randn(4, device=device)

    def grads(names: str) -> dict[str, torch.Tensor]:
        leaves = {name: x.detach().requires_grad_(name in names) for name, x in t.items()}
        q, k, v, sinks = leaves.values()
        out = lk.rope_attention(q, k, v, *tables(12, R, device), sinks=sinks)
        return dict(
            zip(names, torch.autograd.grad(out, [leaves[name] for name in names], torch.ones_like(out)), strict=True)
        )

    everything = grads("qkvs")
    for name, grad in grads(wanted).items():
        assert torch.equal(grad, everything[name])


@pytest.mark.parametrize("shapes", [((0, 4, 7, 8), (0, 2, 7, 8)), ((2, 4, 0, 8), (2, 2, 0, 8)),
                                    ((2, 0, 7, 8), (2, 2, 7, 8))], ids=str)  # fmt: skip
def test_nothing_in_nothing_out(shapes, device):
    q, k = (torch.randn(shape, device=device).requires_grad_() for shape in shapes)
    v = torch.randn(shapes[1], device=device).requires_grad_()
    out = lk.rope_attention(q, k, v, *tables(7, 8, device))
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)]
    assert not any(grad.any() for grad in grads)


@pytest.mark.interpreter
@pytest.mark.parametrize("D, R, interleaved", [(64, 64, False), (128, 64, True), (80, 80, False)])
def test_the_hopper_backward_turns_its_gradients(D, R, interleaved, device):
    with machine() as (on_forward, on_backward):
        check(square(150, D, B=2), torch.float16, device, R, interleaved=interleaved)
    assert on_forward.launches == on_backward.launches == 1
