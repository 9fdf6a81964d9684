"""RMSNorm, alone and after an addition."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch

import llama_kernels as lk
from bench.works.work import Call, Piece, Work

EPS = 1e-6
ROWS = 4096  # of a piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm(Work):
    """x (M, N), weight (N,) -> y (M, N)."""

    M: int
    N: int

    op: ClassVar[str] = "rms_norm"
    arguments: ClassVar[tuple[str, ...]] = ("x", "weight")
    outputs: ClassVar[tuple[str, ...]] = ("y",)

    def draw(self, device: str) -> Call:
        x, dy = (torch.randn(self.M, self.N, device=device, dtype=self.dtype) for _ in range(2))
        return Call((x, torch.rand(self.N, device=device, dtype=self.dtype) + 0.5), (dy,))

    def bytes(self, direction: str) -> int:
        rows, row = self.M * self.N * self.dtype.itemsize, self.N * self.dtype.itemsize
        forward, backward = 2 * rows + row, 3 * rows + 2 * row  # x, y; x, dy, dx
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def reference(self, x, weight):
        return lk.reference.rms_norm(x, weight, EPS)

    def plain(self, x, weight):
        return plain_norm(x, weight)

    def pieces(self, call: Call) -> Iterator[Piece]:
        for a in range(0, self.M, ROWS):
            rows = slice(a, a + ROWS)
            part = Call((call.args[0][rows], call.args[1]), (call.grads[0][rows],))
            yield Piece(part, (rows,), (rows, ...))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddRMSNorm(Work):
    """x, residual (M, N), weight (N,) -> y, x + residual."""

    M: int
    N: int

    op: ClassVar[str] = "add_rms_norm"
    arguments: ClassVar[tuple[str, ...]] = ("x", "residual", "weight")
    outputs: ClassVar[tuple[str, ...]] = ("y", "residual_out")

    def draw(self, device: str) -> Call:
        x, residual, dy, ds = (torch.randn(self.M, self.N, device=device, dtype=self.dtype) for _ in range(4))
        return Call((x, residual, torch.rand(self.N, device=device, dtype=self.dtype) + 0.5), (dy, ds))

    def bytes(self, direction: str) -> int:
        rows, row = self.M * self.N * self.dtype.itemsize, self.N * self.dtype.itemsize
        forward, backward = 4 * rows + row, 4 * rows + 2 * row  # the sum, dy, ds and one gradient for both
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def reference(self, x, residual, weight):
        return lk.reference.add_rms_norm(x, residual, weight, EPS)

    def plain(self, x, residual, weight):
        total = x + residual
        return plain_norm(total, weight), total

    def pieces(self, call: Call) -> Iterator[Piece]:
        x, residual, weight = call.args
        for a in range(0, self.M, ROWS):
            rows = slice(a, a + ROWS)
            part = Call((x[rows], residual[rows], weight), tuple(g[rows] for g in call.grads))
            yield Piece(part, (rows, rows), (rows, rows, ...))


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Transformers' LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)
