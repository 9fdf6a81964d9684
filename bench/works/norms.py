"""RMSNorm, and addition with RMSNorm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch

import llama_kernels as lk
from bench.works.work import Call, Piece, Work

EPS = 1e-6
ROWS = 4096  # rows of a piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm(Work):
    """x (M, N), weight (N,) -> y (M, N)."""

    M: int
    N: int

    op: ClassVar[str] = "rms_norm"
    arguments: ClassVar[tuple[str, ...]] = ("x", "weight")
    outputs: ClassVar[tuple[str, ...]] = ("y",)

    @property
    def _row(self) -> int:
        """Bytes of a row."""
        return self.N * self.dtype.itemsize

    def draw(self, device: str) -> Call:
        rows = lambda: torch.randn(self.M, self.N, device=device, dtype=self.dtype)  # noqa: E731
        weight = torch.rand(self.N, device=device, dtype=self.dtype) + 0.5
        return Call((*(rows() for _ in self.arguments[:-1]), weight), tuple(rows() for _ in self.outputs))

    def least_bytes(self) -> tuple[int, int]:
        rows = self.M * self._row
        return 2 * rows + self._row, 3 * rows + 2 * self._row  # x, y, weight; x, dy, dx, weight, dweight

    def reference(self, x, weight):
        return lk.reference.rms_norm(x, weight, EPS)

    def plain(self, x, weight):
        return plain_norm(x, weight)

    def pieces(self, call: Call) -> Iterator[Piece]:
        *inputs, weight = call.args
        for a in range(0, self.M, ROWS):
            rows = slice(a, a + ROWS)
            part = Call((*(x[rows] for x in inputs), weight), tuple(g[rows] for g in call.grads))
            yield Piece(part, (rows,) * len(call.grads), (*(rows for _ in inputs), ...))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddRMSNorm(RMSNorm):
    """x, residual (M, N), weight (N,) -> y, x + residual."""

    op: ClassVar[str] = "add_rms_norm"
    arguments: ClassVar[tuple[str, ...]] = ("x", "residual", "weight")
    outputs: ClassVar[tuple[str, ...]] = ("y", "residual_out")

    def least_bytes(self) -> tuple[int, int]:
        rows = self.M * self._row
        # x, residual, their sum, y; the sum, the gradients of both outputs, one gradient for both inputs
        return 4 * rows + self._row, 4 * rows + 2 * self._row

    def reference(self, x, residual, weight):
        return lk.reference.add_rms_norm(x, residual, weight, EPS)

    def plain(self, x, residual, weight):
        total = x + residual
        return plain_norm(total, weight), total


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm of Transformers."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


NORMS: tuple[type[RMSNorm], ...] = (RMSNorm, AddRMSNorm)  # all are measured at the same shapes
