"""The table of ops. Everything that the tests and the bench do to every op, they do to every row of it.

A row is a public function: sample arguments, its options, what has a gradient, and what it refuses
(tests/support/bad_inputs.py). `registered_calls` has the ops of torch.ops.llama_kernels that run them, forward and
backward. Function and reference have the row's name in llama_kernels and in llama_kernels.reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import llama_kernels as lk
import llama_kernels.ops.attention.masked_decode  # registers decode_attention, which only integrations call
from bench.attention_options import attention_options

Arguments = dict[str, Any]


class Shape(NamedTuple):
    """Sizes of a sample call. The norms take rows of N numbers."""

    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    S: int = 6
    D: int = 8
    N: int = 8

    @property
    def positions(self) -> int:
        """Rows of the tables of RoPE: more than tokens."""
        return self.S + 3

    @property
    def bounds(self) -> list[int]:
        """Of two packed documents of unequal length."""
        return [0, self.S // 3, self.S]


class Make(NamedTuple):
    """Makes tensors on a device, random ones of a dtype."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def normal(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=self.device).to(self.dtype)

    def heads(self, B: int, H: int, S: int, D: int) -> torch.Tensor:
        """(B, H, S, D) in the memory order of a projection, (B, S, H, D)."""
        return self.normal(B, S, H, D).transpose(1, 2)

    def integers(self, end: int, *sizes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(end, sizes, device=self.device, dtype=dtype)

    def int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def tables(self, shape: Shape) -> Arguments:
        inv_freq, _ = lk.rope_frequencies(shape.D)
        cos, sin = lk.rope_tables(inv_freq.to(self.device), shape.positions)
        return {"cos": cos, "sin": sin}


@dataclasses.dataclass(frozen=True)
class Op:
    """name: of the public function, and of its reference.
    arguments: of a call with nothing but what must be given.
    differentiable: the tensors that have a gradient.
    options: more arguments, which change what is computed.
    variants: other forms of the call: changed arguments, by the name of the form.
    written: arguments that the call writes into.
    """

    name: str
    arguments: Callable[[Shape, Make], Arguments]
    differentiable: tuple[str, ...]
    options: Callable[[Shape, Make], Arguments]
    variants: dict[str, Arguments] = dataclasses.field(default_factory=dict)
    written: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that share dtype and device: what the call computes with, apart from tables and positions."""
        return self.differentiable or ("q", "k", "v", *self.written)


# --- arguments -------------------------------------------------------------------------------------------------------


def _norm(s: Shape, make: Make) -> Arguments:
    return {"x": make.normal(s.B, s.S, s.N), "weight": make.normal(s.N)}


def _add_norm(s: Shape, make: Make) -> Arguments:
    x = _norm(s, make)
    return {"x": x["x"], "residual": make.normal(s.B, s.S, s.N), "weight": x["weight"]}


def _qk(s: Shape, make: Make) -> Arguments:
    return {"q": make.heads(s.B, s.Hq, s.S, s.D), "k": make.heads(s.B, s.Hkv, s.S, s.D)}


def _qkv(s: Shape, make: Make) -> Arguments:
    return {**_qk(s, make), "v": make.heads(s.B, s.Hkv, s.S, s.D)}


def _rope(s: Shape, make: Make) -> Arguments:
    return {**_qk(s, make), **make.tables(s)}


def _rope_qkv(s: Shape, make: Make) -> Arguments:
    qkv = make.normal(s.B, s.S, (s.Hq + 2 * s.Hkv) * s.D)
    return {"qkv": qkv, "q_heads": s.Hq, "kv_heads": s.Hkv, **make.tables(s)}


def _rope_into_cache(s: Shape, make: Make) -> Arguments:
    """One new token of every sequence."""
    caches = {name: make.heads(s.B, s.Hkv, s.S, s.D) for name in ("k_cache", "v_cache")}
    return {**_qkv(s._replace(S=1), make), **caches, "cache_position": make.int32([s.S // 2]), **make.tables(s)}


def _qk_norm_rope(s: Shape, make: Make) -> Arguments:
    return {**_qk(s, make), "q_weight": make.normal(s.D), "k_weight": make.normal(s.D), **make.tables(s)}


def _varlen(s: Shape, make: Make) -> Arguments:
    packed = {name: x[0].transpose(0, 1) for name, x in _qkv(s._replace(B=1), make).items()}
    bounds = {name: make.int32(s.bounds) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    return {**packed, **bounds, "max_seqlen_q": s.S - s.S // 3, "max_seqlen_k": s.S - s.S // 3}


def _rope_attention(s: Shape, make: Make) -> Arguments:
    return {**_qkv(s, make), **make.tables(s)}


# --- options ---------------------------------------------------------------------------------------------------------


def _positions(s: Shape, make: Make) -> Arguments:
    return {"position_ids": make.integers(s.positions, s.B, s.S)}


def _scores(s: Shape, make: Make) -> Arguments:
    return {"sinks": make.normal(s.Hq).float(), "return_lse": True}


_OFFSET: Arguments = {"offset": 1.0}
_QKV = ("q", "k", "v")

OPS: dict[str, Op] = {
    row.name: row
    for row in (
        Op("rope", _rope, ("q", "k"), _positions, {"q alone": {"k": None}, "in place": {"inplace": True}}),
        Op("rope_qkv", _rope_qkv, ("qkv",), _positions),
        Op("rope_into_cache", _rope_into_cache, (), lambda s, make: _positions(s._replace(S=1), make),
           written=("k_cache", "v_cache")),
        Op("rms_norm", _norm, ("x", "weight"), lambda s, make: _OFFSET),
        Op("add_rms_norm", _add_norm, ("x", "residual", "weight"), lambda s, make: _OFFSET),
        Op("qk_norm_rope", _qk_norm_rope, ("q", "k", "q_weight", "k_weight"),
           lambda s, make: {**_OFFSET, **_positions(s, make)}),
        Op("attention", _qkv, _QKV, _scores),
        Op("attention_varlen", _varlen, _QKV, _scores),
        Op("rope_attention", _rope_attention, _QKV, lambda s, make: {**_scores(s, make), **_positions(s, make)}),
    )
}  # fmt: skip


def sample(name: str, shape: Shape = Shape(), make: Make = Make()) -> Arguments:
    """Arguments of a call of op `name`, without options."""
    return OPS[name].arguments(shape, make)


# --- calls -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """A call as a function of the tensors that have a gradient: `call(lk, *call.tensors)`, or lk.reference.

    Results that are None, of a tensor that was not given, are left out.
    """

    op: str
    arguments: Arguments
    differentiable: tuple[str, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.arguments[name] for name in self.differentiable)

    def __call__(self, module: Any, *tensors: torch.Tensor) -> Any:
        if self.arguments.get("inplace"):  # of tensors that are not leaves
            tensors = tuple(x * 1 for x in tensors)
        given = dict(zip(self.differentiable, tensors, strict=True))
        results = getattr(module, self.op)(**{**self.arguments, **given})
        return tuple(x for x in results if x is not None) if isinstance(results, tuple) else results


def calls(shape: Shape, make: Make, options: bool = False) -> Iterator[tuple[str, Call]]:
    """A call of each row that has a gradient, and of its variants, with options or without."""
    for op in OPS.values():
        if not op.differentiable:
            continue
        arguments = op.arguments(shape, make)
        if options:
            arguments.update(op.options(shape, make))
        differentiable = op.differentiable + ("sinks",) * ("sinks" in arguments)
        yield op.name, Call(op.name, arguments, differentiable)
        for variant, changed in op.variants.items():
            changed = {**op.arguments(shape, make), **changed}
            names = tuple(name for name in op.differentiable if changed[name] is not None)
            yield f"{op.name}, {variant}", Call(op.name, changed, names)


CALLS = [label for label, _ in calls(Shape(), Make())]


# --- registered ops --------------------------------------------------------------------------------------------------


def registered_calls(shape: Shape, make: Make) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Calls of every registered op: its name in torch.ops.llama_kernels, and positional arguments.

    Forward and backward, with and without what is optional. `shape.N` is the row of the norms.
    """
    s, S = shape, shape.S
    x, residual, dy = (make.normal(s.B, S, s.N) for _ in range(3))
    weight, rstd = make.normal(s.N), torch.rand(s.B, S, 1, device=make.device)
    q, k, v, dq = (make.heads(s.B, H, S, s.D) for H in (s.Hq, s.Hkv, s.Hkv, s.Hq))
    dk, dv, k_cache, v_cache = (make.heads(s.B, s.Hkv, S, s.D) for _ in range(4))
    head = make.normal(s.D)
    angles = tuple(make.tables(s).values())
    narrow = tuple(make.tables(s._replace(D=s.D // 4 * 3)).values())  # some of each head is not rotated
    positions = make.integers(s.positions, s.B, S)
    three, axes = make.integers(s.positions, 3, s.B, S), make.integers(3, s.D // 2)
    slots = torch.arange(S, device=make.device)

    plain = attention_options(S, S, 0.2)  # from the sinks on
    sinks, kv_start = make.normal(s.Hq).float(), make.integers(S // 2, s.B, S, dtype=torch.int32)
    options = attention_options(
        S, S, 0.2, sinks=sinks, kv_start=kv_start, kv_end=kv_start + S // 2, softcap=5.0, left=7, right=3
    )
    cu, longest = make.int32(s.bounds), S - S // 3
    packed = attention_options(longest, longest, 0.2, cu_seqlens_q=cu, cu_seqlens_k=cu.clone())
    packed_qkv = tuple(x[0].transpose(0, 1) for x in (q, k, v))
    lse = torch.randn(s.B, s.Hq, S, device=make.device)
    saved = (q, k, v, dq, lse)  # dq has the shape and strides of out
    token, keys, values = (make.heads(s.B, H, n, s.D) for H, n in ((s.Hq, 1), (s.Hkv, 600), (s.Hkv, 600)))
    decoding = attention_options(1, 600, 0.2)
    visible, ends = make.integers(2, s.B, 600).bool(), make.integers(600, s.B, 1, dtype=torch.int32)
    rest = (None, None, *angles, positions, True, 0.2, 5.0, 7, 0)  # of rope_attention_backward, from kv_start on
    rest_narrow = (None, None, *narrow, None, False, 0.2, None, None, 0)
    return {
        "rms_norm": ("rms_norm_forward", (x, None, weight, 1e-6, 0.0)),
        "add_rms_norm": ("rms_norm_forward", (x, residual, None, 1e-6, 1.0)),
        "rms_norm backward": ("rms_norm_backward", (dy, None, x, weight, rstd, 1e-6, 0.0, x.dtype, True, True)),
        "add_rms_norm backward": ("rms_norm_backward", (dy, residual, x, weight, rstd, 1e-6, 0.0, x.dtype, True, True)),
        "rms_norm backward, dweight alone": (
            "rms_norm_backward", (dy, None, x, weight, rstd, 1e-6, 0.0, x.dtype, False, True)),
        "rms_norm tangent": ("rms_norm_tangent", (dy, x, weight, None, rstd, 1e-6, 0.0, x.dtype)),
        "add_rms_norm tangent": ("rms_norm_tangent", (dy, x, weight, weight.flip(0), rstd, 1e-6, 1.0, x.dtype)),
        "rope": ("rope", (q, k, *angles, positions, False, False)),
        "rope, q alone, inverse": ("rope", (q, None, *angles, None, True, True)),
        "rope, in place": ("rope_", (q.clone(), k.clone(), *angles, None, False)),
        "rope_qkv backward": ("rope_qkv_backward", (dq, dk, dv, *angles, positions, False)),
        "rope_into_cache": (
            "rope_into_cache", (q, k, v, k_cache, v_cache, slots, *angles, positions, False)),
        "rope_into_cache, three positions a token": (
            "rope_into_cache", (q, k, v, k_cache.clone(), v_cache.clone(), slots, *angles, three, False, axes)),
        "qk_norm_rope": ("qk_norm_rope", (q, k, head, head, *angles, positions, 1e-6, 0.0, False)),
        "qk_norm_rope, q alone": ("qk_norm_rope", (q, None, None, None, *angles, None, 1e-6, 0.0, True)),
        "qk_norm_rope tangent": (
            "qk_norm_rope_tangent", (dq, dk, head, None, q, k, head, head, *angles, positions, 1e-6, 0.0, False)),
        "qk_norm_rope backward": (
            "qk_norm_rope_backward", (dq, dk, q, k, head, None, *angles, positions, 1e-6, 1.0, False, True)),
        "attention": ("attention_forward", (q, k, v, *plain)),
        "attention, options": ("attention_forward", (q, k, v, *options)),
        "attention, float32 out": ("attention_forward", (q, k, v, *plain, torch.float32)),
        "attention, prefix": ("attention_forward", (q, k, v, *options, None, kv_start)),
        "attention, packed": ("attention_forward", (*packed_qkv, *packed)),
        "attention, decoding": ("attention_forward", (token, keys, values, *decoding)),
        "attention backward": ("attention_backward", (dq, None, *saved, *plain, True, True, True, False, None)),
        "attention backward, packed": (
            "attention_backward", (dq[0].transpose(0, 1), None, *packed_qkv, dq[0].transpose(0, 1), lse[0], *packed,
                                   True, True, True, False, None)),
        "attention backward, options": (
            "attention_backward", (dq, lse, *saved, *options, False, True, True, True, None)),
        "attention backward, float32 gradients": (
            "attention_backward", (dq, None, *saved, *plain, True, True, True, False, None, torch.float32)),
        "attention backward, prefix": (
            "attention_backward", (dq, lse, *saved, *options, True, True, True, True, None, None, kv_start)),
        "rope_attention backward": (
            "rope_attention_backward", (dq, lse, *saved, sinks, *rest, True, True, True, True, None)),
        "rope_attention backward, prefix": (
            "rope_attention_backward", (dq, lse, *saved, sinks, *rest, True, True, True, True, None, kv_start)),
        "rope_attention backward, three positions a token": (
            "rope_attention_backward", (dq, lse, *saved, None, None, None, *angles, three, False, 0.2, None, None, 0,
                                        True, True, True, False, None, None, axes)),
        "rope_attention backward, dq not needed": (
            "rope_attention_backward", (dq, None, *saved, None, *rest_narrow, False, True, True, False, None)),
        "decode_attention": (
            "decode_attention", (token, keys, values, visible, sinks, None, ends, 0.2, 5.0)),
    }  # fmt: skip


REGISTERED = list(registered_calls(Shape(), Make()))
