"""The tiles of an attention call: how many steps each takes, in the order of their start, and when the last ends."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a dense call: B sequences of S tokens, Hq query heads, Hkv key heads, heads D wide."""

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
        """The FLOPs of a forward's two products, as they are counted in public: half of them with a causal mask."""
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


def of_seen_keys(
    Sq: int, Sk: int, left: int | None, BLOCK_M: int, BLOCK_N: int, heads: int, first: int = 0, keys: int | None = None
) -> list[Tile]:
    """As `of_rows`, of Sq rows that see Sk keys, causal, with a window of `left` keys before their own or without one.

    first, keys: of a part of the keys, in multiples of BLOCK_N.
    """
    found, stop = [], Sk if keys is None else min(first + keys, Sk)
    for m in range(0, Sq, BLOCK_M):
        own, last = m + Sk - Sq, min(m + BLOCK_M, Sq) - 1 + Sk - Sq  # positions of the first and the last row
        begin, full_begin = (first if left is None else max(row - left, first) for row in (own, last))
        end, full_end = min(last + 1, stop), min(own + 1, stop)
        steps = max(-(-end // BLOCK_N) - begin // BLOCK_N, 0)
        plain = min(max(full_end // BLOCK_N - -(-full_begin // BLOCK_N), 0), steps)
        found.append(Tile(plain, steps - plain, heads))
    return found[::-1]


def of_rows_that_see(S: int, left: int, BLOCK_M: int, BLOCK_N: int, heads: int, group: int) -> list[Tile]:
    """As `of_keys`, of S rows and keys, causal, with a window of `left` keys before a row's own."""
    found = []
    for n in range(0, S, BLOCK_N):
        last = min(n + BLOCK_N, S) - 1
        steps = -(-min(last + left + 1, S) // BLOCK_M) - n // BLOCK_M
        plain = min(max(min(n + left + 1, S) // BLOCK_M - -(-last // BLOCK_M), 0), steps)
        found.append(Tile(group * plain, group * (steps - plain), heads))
    return found


def cycles(costs: Iterable[tuple[float, int]], slots: int) -> float:
    """When the last program ends, if programs start in order as slots come free. costs: cycles, how many programs."""
    free = [0.0] * slots
    for each, count in costs:
        for _ in range(count):
            heapq.heapreplace(free, free[0] + each)
    return max(free)


def steps(tiles: Iterable[Tile]) -> float:
    """The steps of all programs together."""
    return sum((tile.plain + tile.masked) * tile.count for tile in tiles)
