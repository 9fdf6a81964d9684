"""Forward mode, torch.func.jvp, of the ops that rotate and normalise."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch

from bench.works.norms import AddRMSNorm, RMSNorm
from bench.works.rotations import QKNormRope, Rope
from bench.works.work import Call, Function, Piece, Work, as_tuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tangents(Work, abc.ABC):
    """The arguments of the work `of`, and a tangent of each -> its outputs, and their tangents."""

    base: ClassVar[type[Work]]
    directions: ClassVar[tuple[str, ...]] = ("forward",)

    @property
    def of(self) -> Work:
        return self.base(shape=self.shape, dtype=self.dtype, **self.sizes)

    def draw(self, device: str) -> Call:
        args, grads = self.of.draw(device)
        return Call((*args, *map(torch.randn_like, args)), (*grads, *map(torch.zeros_like, grads)))

    def least_bytes(self) -> tuple[int, int]:
        forward, _ = self.of.least_bytes()
        of = self.of
        return 2 * forward - (of.table_bytes if isinstance(of, Rope) else 0), 0

    def reference(self, *args):
        return tangents_by(self.of.reference)(*args)

    def plain(self, *args):
        return tangents_by(self.of.plain)(*args)

    def pieces(self, call: Call) -> Iterator[Piece]:
        n, outputs = len(call.args) // 2, len(call.grads) // 2
        for part, where, indices in self.of.pieces(Call(call.args[:n], call.grads[:outputs])):
            tangents = (x[index] for x, index in zip(call.args[n:], indices, strict=True))
            yield Piece(Call((*part.args, *tangents), (*part.grads, *part.grads)), (*where, *where), indices * 2)


def tangents_by(function: Function) -> Function:
    """Arguments and their tangents -> the outputs of `function` and their tangents."""

    def f(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n = len(args) // 2
        outputs, tangents = torch.func.jvp(function, args[:n], args[n:])
        return *as_tuple(outputs), *as_tuple(tangents)

    return f


def _doubled(names: tuple[str, ...]) -> tuple[str, ...]:
    return (*names, *(f"{name}_tangent" for name in names))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfRows(Tangents):
    M: int
    N: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfHeads(Tangents):
    B: int
    S: int
    Hq: int
    Hkv: int
    D: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNormTangents(_OfRows):
    base: ClassVar[type[Work]] = RMSNorm
    op: ClassVar[str] = "rms_norm_jvp"
    arguments: ClassVar[tuple[str, ...]] = _doubled(RMSNorm.arguments)
    outputs: ClassVar[tuple[str, ...]] = _doubled(RMSNorm.outputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddRMSNormTangents(_OfRows):
    base: ClassVar[type[Work]] = AddRMSNorm
    op: ClassVar[str] = "add_rms_norm_jvp"
    arguments: ClassVar[tuple[str, ...]] = _doubled(AddRMSNorm.arguments)
    outputs: ClassVar[tuple[str, ...]] = _doubled(AddRMSNorm.outputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeTangents(_OfHeads):
    base: ClassVar[type[Work]] = Rope
    op: ClassVar[str] = "rope_jvp"
    arguments: ClassVar[tuple[str, ...]] = _doubled(Rope.arguments)
    outputs: ClassVar[tuple[str, ...]] = _doubled(Rope.outputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QKNormRopeTangents(_OfHeads):
    base: ClassVar[type[Work]] = QKNormRope
    op: ClassVar[str] = "qk_norm_rope_jvp"
    arguments: ClassVar[tuple[str, ...]] = _doubled(QKNormRope.arguments)
    outputs: ClassVar[tuple[str, ...]] = _doubled(QKNormRope.outputs)


TANGENTS: tuple[type[Tangents], ...] = (RMSNormTangents, AddRMSNormTangents, RopeTangents, QKNormRopeTangents)
