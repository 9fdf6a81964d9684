"""The tiles of an attention call: how many steps each takes, in the order of their start, and when the last ends."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a dense call: B sequences of S tokens, Hq query heads, Hkv key heads, heads of D."""

    B: int
    S: int
    Hq: int
    Hkv: int
    D: int
    causal: bool = True

    @property
    def group(self) -> int:
        return self.Hq // self.Hkv

    @property
    def flops(self) -> int:
        """Of a forward's two products, as they are counted in public: half of them with a causal mask."""
        return 4 * self.B * self.Hq * self.S**2 * self.D // (2 if self.causal else 1)


@dataclasses.dataclass(frozen=True)
class Tile:
    """How many programs take so many steps without a mask and with one."""

    plain: float
    masked: float
    count: int


def of_rows(shape: Shape, BLOCK_M: int, BLOCK_N: int, heads: int) -> list[Tile]:
    """Programs that keep rows and walk over the keys (forward, dq), the longest first."""
    found = []
    for m in range(0, shape.S, BLOCK_M):
        blocks = -(-shape.S // BLOCK_N)
        if not shape.causal:
            found.append(Tile(blocks - bool(shape.S % BLOCK_N), float(bool(shape.S % BLOCK_N)), heads))
            continue
        end, plain = -(-min(m + BLOCK_M, shape.S) // BLOCK_N), m // BLOCK_N
        found.append(Tile(plain, end - plain, heads))
    return found[::-1]


def of_keys(shape: Shape, BLOCK_M: int, BLOCK_N: int, heads: int, group: int) -> list[Tile]:
    """Programs that keep keys and walk over the rows of `group` heads (dk and dv), the longest first."""
    found = []
    for n in range(0, shape.S, BLOCK_N):
        first = n // BLOCK_M if shape.causal else 0
        steps = -(-shape.S // BLOCK_M) - first
        masked = min(-(-BLOCK_N // BLOCK_M), steps) if shape.causal else 0
        found.append(Tile(group * (steps - masked), group * masked, heads))
    return found


def cycles(costs: Iterable[tuple[float, int]], slots: int) -> float:
    """When the last program ends, if programs start in order as slots come free. costs: cycles, how many programs."""
    free = [0.0] * slots
    for each, count in costs:
        for _ in range(count):
            heapq.heapreplace(free, free[0] + each)
    return max(free)


def steps(tiles: Iterable[Tile]) -> float:
    """Of all programs together."""
    return sum((tile.plain + tile.masked) * tile.count for tile in tiles)
