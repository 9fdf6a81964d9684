"""Instructions that exchange values within a warp, and mma."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import fragments
from .access import COMBINE
from .copies import Copies


class Warps(Copies):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Fragments of mma operands, by the identity of their registers: arrays never change, so it tells them apart.
        self._fragments: dict[tuple[int, ...], tuple[list[np.ndarray], np.ndarray]] = {}

    def shuffle(
        self, k: int, x: np.ndarray, how: str, by: np.ndarray, clamp: np.ndarray, M: np.ndarray | None
    ) -> np.ndarray:
        self._whole_warps(k, M)
        if len(x) == 1:
            return x
        if len(by) == 1 and len(clamp) == 1:
            return x[_constant_sources(self.lanes, how, int(by[0]), int(clamp[0]))]
        return x[_sources(self.lanes, how, by.astype("i8"), clamp.astype("i8"))]

    def reduce(self, k: int, x: np.ndarray, how: str, M: np.ndarray | None) -> np.ndarray:
        self._whole_warps(k, M)
        return np.repeat(COMBINE[how].reduce(self._full(x).reshape(-1, 32), axis=1), 32).astype(x.dtype)

    def vote(self, k: int, p: np.ndarray, how: str, M: np.ndarray | None) -> np.ndarray:
        self._whole_warps(k, M)
        rows = self._full(p).reshape(-1, 32)
        if how == "ballot":
            out = (rows.astype("u8") << np.arange(32, dtype="u8")).sum(1).astype("u4")
        else:
            out = {"all": rows.all, "any": rows.any}[how](1)
        return np.repeat(out, 32)

    def elect(self, k: int, M: np.ndarray | None) -> np.ndarray:
        """The first lane of each warp."""
        self._whole_warps(k, M)
        return np.arange(self.lanes) % 32 == 0

    def mma(
        self, k: int, kind: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], M: np.ndarray | None
    ) -> list[np.ndarray]:
        self._whole_warps(k, M)
        left = self._fragment(a, lambda xs: fragments.a_fragment(xs, kind))
        right = fragments.b_fragment([self._full(x) for x in b], kind)
        sums = self._fragment(c, fragments.c_fragment) + left @ right.transpose(0, 2, 1)
        warps = len(left) if M is None else int(np.count_nonzero(M)) // 32 if len(M) > 1 else len(left)
        self.report.counts["tensor core operations"] += 2 * warps * 16 * 8 * left.shape[-1]
        out = fragments.c_registers(sums)
        self._fragments[tuple(map(id, out))] = out, sums
        return out

    def _fragment(self, registers: list[np.ndarray], make: Callable[[list[np.ndarray]], np.ndarray]) -> np.ndarray:
        """A fragment that many products share, or that the last one left."""
        key = tuple(map(id, registers))
        if key not in self._fragments:
            if len(self._fragments) > 256:
                self._fragments.clear()
            self._fragments[key] = registers, make([self._full(x) for x in registers])
        return self._fragments[key][1]


@functools.lru_cache(maxsize=256)
def _constant_sources(lanes: int, how: str, by: int, clamp: int) -> np.ndarray:
    return _sources(lanes, how, np.array([by]), np.array([clamp]))


def _sources(lanes: int, how: str, by: np.ndarray, clamp: np.ndarray) -> np.ndarray:
    """The lane that each lane reads, by the pseudocode of shfl.sync in the PTX ISA."""
    lane = np.arange(lanes)
    i, by = lane % 32, by & 31
    segment, last = clamp >> 8 & 31, clamp & 31
    most, least = (i & segment) | (last & ~segment), i & segment
    j = {"up": i - by, "down": i + by, "bfly": i ^ by, "idx": least | (by & ~segment)}[how]
    inside = j >= most if how == "up" else j <= most
    return lane - i + np.where(inside, j, i)
