"""The check of a rope_attention call: out, lse and every gradient against float64."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import llama_kernels as lk
from llama_kernels.ops.attention.tables import Tile
from llama_kernels.ops.rotation import full_width, rotates_in_registers
from tests.support.attention import BOUNDS, Case, Inputs, in_float64, judge_results, make, tiles
from tests.support.guards import guarded, guarded_allocations, relaid, unchanged
from tests.support.ideal import attention_mask, drawn, eager_rope, ideal_attention, transposed
from tests.support.launches import Launched, kernels_launched, names
from tests.support.rope import rows, tables


def run(
    ops: Any, case: Case, x: Inputs, *angles: torch.Tensor | None, interleaved: bool = False,
    axes: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """out, lse and the gradients of `ops`' rope_attention, lk or lk.reference."""
    options = {name: getattr(case, name) for name in ("is_causal", "window_size", "softcap", "scale")}
    options.update(sinks=x.sinks, return_lse=True, interleaved=interleaved, axes=axes)
    options.update({name: getattr(x, name) for name in BOUNDS})
    out, lse = ops.rope_attention(x.q, x.k, x.v, *angles, **options)
    return [out, lse, *torch.autograd.grad((out, lse), x.tensors, (x.do, x.dlse))]


@torch.no_grad()
def ideal(
    case: Case, x: Inputs, cos, sin, position_ids, interleaved: bool, launches: Sequence[Launched] = (), axes=None
) -> list[list[torch.Tensor]]:
    """The draws of each result of `run`: float32 that rounds where the kernels must.

    They round q and k after the rotation. They round dq and dk after the inverse rotation, and before it too unless it
    is done in registers. The Hopper backward, if it is among the launches, rounds dk before it in any case.
    """
    rotate = functools.partial(eager_rope, interleaved=interleaved)
    c, s = (rows(x.q, table.float(), position_ids, axes) for table in (cos, sin))
    q, k = (rotate(t.float(), c, s).to(t.dtype) for t in (x.q, x.k))
    rule = (case.is_causal, case.window_size, x.kv_start, x.kv_end, x.q.device, x.kv_prefix)
    see = attention_mask(case.Sq, case.Sk, *rule)
    scale = case.D**-0.5 if case.scale is None else case.scale
    call = (q, k, x.v, see, scale, case.softcap, x.sinks, x.do, x.dlse)

    def unrotated(grad: torch.Tensor) -> torch.Tensor:
        return rotate(grad.float(), c, transposed(s, case.D, interleaved))

    out, lse, *grads = drawn(ideal_attention, *call)
    grads[:2] = ([unrotated(grad).to(grad.dtype) for grad in draws] for draws in grads[:2])
    if axes is None and not full_width(cos, case.D) and rotates_in_registers(cos.shape[-1], interleaved):
        in_registers = slice(1) if "_hopper_backward_kernel" in names(launches) else slice(2)
        grads[in_registers] = drawn(ideal_attention, *call, closing=unrotated)[2:][in_registers]
    return [out, lse, *grads]


def check(
    case: Case, dtype: torch.dtype, device: torch.device, R: int | None = None,
    position_ids: torch.Tensor | None = None, *, interleaved: bool = False,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None, family: str = "randn",
    tile: Tile | Mapping[str, Tile] | None = None, layout: int | None = None, axes: torch.Tensor | None = None,
) -> None:  # fmt: skip
    x = make(case, dtype, device, family)
    if layout is not None:
        x.q, x.k, x.v, x.do = (relaid(t, layout + i) for i, t in enumerate((x.q, x.k, x.v, x.do)))
    cos, sin = angles or tables(max(case.Sq, 60), case.D if R is None else R, device)
    safe = Inputs(*(None if t is None else guarded(t) for t in vars(x).values()))
    given = [guarded(cos), guarded(sin), None if position_ids is None else guarded(position_ids)]
    with guarded_allocations(), tiles(tile), unchanged(*vars(safe).values(), *given), kernels_launched() as launches:
        results = run(lk, case, safe, *given, interleaved=interleaved, axes=axes)
    how = {"interleaved": interleaved, "axes": axes}
    truth = run(lk.reference, case, in_float64(x), cos.double(), sin.double(), position_ids, **how)
    judge_results(case, x, results, truth, ideal(case, x, cos, sin, position_ids, interleaved, launches, axes))


def square(S: int, D: int = 32, DV: int | None = None, B: int = 1, heads: tuple[int, int] = (4, 2), **on: Any) -> Case:
    return Case(B, *heads, S, S, D, D if DV is None else DV, **on)
