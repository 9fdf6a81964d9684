"""What an estimate says: a time, what takes it, which limit binds, and how sure that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

# What a reader sees for a pipe or part of a model.
LIMITS = {
    "dram": "DRAM",
    "l2": "L2",
    "tensor": "tensor cores",
    "mufu": "exponentials (MUFU)",
    "issue": "issue slots",
    "memory": "shared memory port",
    "latency": "latency",
    "alu": "integer units",
    "float32": "float32 units",
    "uniform": "uniform units",
    "empty": "empty programs",
    "launch": "launches",
    "reduce": "sums in the L2 (red)",
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated time of a call. error: the mean error of such estimates where the truth is known, as a share."""

    seconds: float
    limit: str  # a key of LIMITS
    error: float
    parts: tuple[tuple[str, float], ...] = ()  # launches with their seconds, in order
    empty: float = 0.0  # of the seconds, what programs without work take
    kind: str = ""  # of estimate, as in errors.json

    @property
    def low(self) -> float:
        return self.seconds * (1 - self.error)

    @property
    def high(self) -> float:
        return self.seconds * (1 + self.error)

    def later(self, seconds: float) -> Estimate:
        """The same, after `seconds` more."""
        return dataclasses.replace(self, seconds=self.seconds + seconds)

    def __str__(self) -> str:
        ms = self.seconds * 1e3
        return f"{ms:.3g} ms ±{self.error:.0%}, bound by {LIMITS[self.limit]}"


def new_name(parts: Collection[str], name: str) -> str:
    """`name`, with a prime for each launch of that kernel before it. dk and dv of wide heads, for one, are two."""
    return name + "'" * sum(part.rstrip("'") == name for part in parts)


def together(estimates: dict[str, Estimate]) -> Estimate:
    """One call after another. The limit, the error and the kind are those of the largest."""
    largest = max(estimates.values(), key=lambda e: e.seconds)
    parts = tuple((name, e.seconds) for name, e in estimates.items())
    seconds, empty = (sum(getattr(e, name) for e in estimates.values()) for name in ("seconds", "empty"))
    return Estimate(seconds, largest.limit, largest.error, parts, empty, largest.kind)
