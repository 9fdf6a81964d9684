"""Ops on DTensors, sharded in every way that a mesh of all ranks allows, against the same calls on whole tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import llama_kernels as lk
from tests.distributed.processes import here, mesh_of

B, HQ, HKV, S, D, N = 4, 8, 4, 8, 16, 32
WHOLE = Replicate()
OF_ROWS = {"rows by batch": Shard(0), "rows by token": Shard(1), "rows whole": WHOLE, "columns": Shard(2)}
OF_PACKED = {"tokens of documents": Shard(0), "heads": Shard(1), "width": Shard(2), "whole": WHOLE}
OF_HEADS = {"batch": Shard(0), "heads": Shard(1), "tokens": Shard(2), "width": Shard(3), "whole": WHOLE}


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _heads(H: int) -> torch.Tensor:
    return _normal(B, S, H, D).transpose(1, 2)


def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    return lk.rope_tables(lk.rope_frequencies(D)[0], S)


_BOUNDS = torch.arange(B * S, dtype=torch.int32).view(B, S) % S
_POSITIONS = (_BOUNDS + torch.arange(B, dtype=torch.int32)[:, None]) % S  # each sequence has others


# name: (the call, of tensors by name; those that are sharded alike, differentiated; the others, which are replicated)
_CALLS: dict[str, tuple[Callable[..., Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {
    "rms_norm": (lk.rms_norm, {"x": _normal(B, S, N)}, {"weight": _normal(N)}),
    "add_rms_norm": (
        lk.add_rms_norm, {"x": _normal(B, S, N), "residual": _normal(B, S, N) + 1}, {"weight": _normal(N)}),
    "rope": (lk.rope, {"q": _heads(HQ), "k": _heads(HKV)}, dict(zip(("cos", "sin"), _tables(), strict=True))),
    "rope, positions": (
        lk.rope, {"q": _heads(HQ), "k": _heads(HKV)},
        {**dict(zip(("cos", "sin"), _tables(), strict=True)), "position_ids": _POSITIONS}),
    "rope, rows of tokens": (
        lk.rope, {"q": _heads(HQ), "k": _heads(HKV)},
        {name: x[_POSITIONS.long()] for name, x in zip(("cos", "sin"), _tables(), strict=True)}),
    "rope, axes": (
        lk.rope, {"q": _heads(HQ), "k": _heads(HKV)},
        {**dict(zip(("cos", "sin"), _tables(), strict=True)), "position_ids": torch.stack((_POSITIONS, _BOUNDS)),
         "axes": torch.arange(D // 2, dtype=torch.int32) % 2}),
    "rope_qkv": (
        lambda x, cos, sin: lk.rope_qkv(x, HQ, HKV, cos, sin), {"x": _normal(B, S, (HQ + 2 * HKV) * D)},
        dict(zip(("cos", "sin"), _tables(), strict=True))),
    "qk_norm_rope": (
        lk.qk_norm_rope, {"q": _heads(HQ), "k": _heads(HKV)},
        {"q_weight": _normal(D), "k_weight": _normal(D) + 1, **dict(zip(("cos", "sin"), _tables(), strict=True))}),
    "attention": (lk.attention, {"q": _heads(HQ), "k": _heads(HKV), "v": _heads(HKV) + 1}, {}),
    "attention, sinks": (
        lk.attention, {"q": _heads(HQ), "k": _heads(HKV), "v": _heads(HKV) + 1}, {"sinks": _normal(HQ)}),
    "attention, bounds": (
        lk.attention, {"q": _heads(HQ), "k": _heads(HKV), "v": _heads(HKV) + 1},
        {"kv_start": _BOUNDS // 2, "kv_end": 1 + _BOUNDS, "kv_prefix": _BOUNDS // 4}),
    "attention, lse": (
        functools.partial(lk.attention, return_lse=True),
        {"q": _heads(HQ), "k": _heads(HKV), "v": _heads(HKV) + 1}, {}),
    "attention_varlen": (
        lambda q, k, v, ends: lk.attention_varlen(q, k, v, ends, ends, S, S),
        {"q": _normal(2 * S, HQ, D), "k": _normal(2 * S, HKV, D), "v": _normal(2 * S, HKV, D) + 1},
        {"ends": torch.tensor([0, S // 2, S, 2 * S], dtype=torch.int32)}),
    "rope_attention": (
        lk.rope_attention, {"q": _heads(HQ), "k": _heads(HKV), "v": _heads(HKV) + 1},
        dict(zip(("cos", "sin"), _tables(), strict=True))),
}  # fmt: skip


def placements_of(name: str) -> dict[str, Placement]:
    """Of the tensors of a call that are sharded alike."""
    sharded = _CALLS[name][1]
    return OF_ROWS if "x" in sharded else OF_PACKED if sharded["q"].ndim == 3 else OF_HEADS


CASES = [(name, placement) for name in _CALLS for placement in placements_of(name)]


def _results(call: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Results and gradients of a call; tables have none."""
    differentiable = [name for name, x in tensors.items() if x.is_floating_point() and name not in ("cos", "sin")]
    leaves = [tensors[name].requires_grad_() for name in differentiable]
    outs = call(**tensors)
    outs = [x for x in (outs if isinstance(outs, tuple) else (outs,)) if x is not None]
    loss = sum((out * out).sum() for out in outs)
    return [*outs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _error(call: Callable[..., Any], tensors: dict[str, torch.Tensor], placed: dict[str, list[Placement]],
           mesh: DeviceMesh, compiled: bool = False) -> tuple[float, list[str]]:  # fmt: skip
    tensors = {name: here(x) for name, x in tensors.items()}
    expected = _results(call, {name: x.clone() for name, x in tensors.items()})
    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = _results(call, {name: distribute_tensor(x.clone(), mesh, placed[name]) for name, x in tensors.items()})
    pairs = zip(found, expected, strict=True)
    errors = [((_whole(a) - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs]  # a gradient may be 0
    return max(errors), [str(x.placements) for x in found]


def error_and_placements(name: str, placement: str) -> tuple[float, list[str]]:
    """The largest relative error of results and gradients, and where they are."""
    mesh = mesh_of()
    call, sharded, others = _CALLS[name]
    return _error(call, {**sharded, **others}, _placed(name, placement), mesh)


def _placed(name: str, placement: str) -> dict[str, list[Placement]]:
    _, sharded, others = _CALLS[name]
    return {**{n: [placements_of(name)[placement]] for n in sharded}, **{n: [WHOLE] for n in others}}


def error_where_one_result_is_used(name: str, placement: str, compiled: bool) -> tuple[float, list[str]]:
    """As `error_and_placements`; only the first result is used. Where compiled, the whole call is one graph."""
    call, sharded, others = _CALLS[name]

    def first(**tensors: torch.Tensor) -> torch.Tensor:
        outs = call(**tensors)
        return outs[0] if isinstance(outs, tuple) else outs

    return _error(first, {**sharded, **others}, _placed(name, placement), mesh_of(), compiled)


def error_on_a_mesh_of_two_dimensions(name: str) -> float:
    """Batch along one dimension, heads or tokens along the other."""
    mesh = mesh_of(2, dist.get_world_size() // 2)
    call, sharded, others = _CALLS[name]
    placed = {**{n: [Shard(0), Shard(1)] for n in sharded}, **{n: [WHOLE, WHOLE] for n in others}}
    return _error(call, {**sharded, **others}, placed, mesh)[0]


def attention_by_heads(shape: tuple[int, ...], Hkv: int, along: int) -> tuple[float, str]:
    """The error of attention whose heads are sharded along one dimension of a mesh, and where the result is."""
    mesh = mesh_of(*shape)
    tensors = {"q": _normal(1, 2 * Hkv, S, D), "k": _normal(1, Hkv, S, D), "v": _normal(1, Hkv, S, D) + 1}
    placed: list[Placement] = [Shard(1) if dim == along else WHOLE for dim in range(len(shape))]
    error, placements = _error(lk.attention, tensors, dict.fromkeys(tensors, placed), mesh)
    return error, placements[0]


def errors_where_the_weight_needs_a_gradient_or_not() -> list[float]:
    """The same shapes one after the other: DTensor remembers its decision by the arguments."""
    mesh = mesh_of()
    errors = []
    for name, needed in itertools.product(("rms_norm", "qk_norm_rope"), (False, True, False)):
        found = _grads(name, needed, lambda x, placement: distribute_tensor(x, mesh, [placement]))
        pairs = zip(found, _grads(name, needed, lambda x, placement: x), strict=True)
        errors += [((_whole(a) - b).norm() / b.norm()).item() for a, b in pairs]
    return errors


def _grads(name: str, needed: bool, place: Callable[[torch.Tensor, Placement], torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of the first result, those of the weights if they are needed."""
    call, sharded, others = _CALLS[name]
    tensors = {n: place(here(x).clone(), Shard(1)).requires_grad_() for n, x in sharded.items()}
    weights = {n: place(here(x).clone(), WHOLE).requires_grad_(needed and "weight" in n) for n, x in others.items()}
    outs = call(**tensors, **weights)
    outs = outs if isinstance(outs, tuple) else (outs,)
    leaves = [*tensors.values(), *(weight for weight in weights.values() if weight.requires_grad)]
    return [*torch.autograd.grad(sum((out * out).sum() for out in outs), leaves)]
