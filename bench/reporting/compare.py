"""Compares two runs: what became slower, less exact or larger, and what is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bench.measuring.records import Record, Run
from bench.providers.provider import OURS

THRESHOLD = 0.05  # a time that grew by a larger share is a regression
ERROR_BY = 1.25  # so is an error that grew by a larger factor (other tiles round in other places)
MEMORY_BY = 1.02  # and memory that grew by a larger factor


@dataclasses.dataclass(frozen=True)
class Finding:
    record: Record
    what: str
    regression: bool

    def __str__(self) -> str:
        r = self.record
        return f"{r.op} {r.direction}, {r.shape}, {r.dtype}, {r.provider}: {self.what}"


def compare(before: Run, after: Run, threshold: float = THRESHOLD, provider: str | None = OURS) -> Iterator[Finding]:
    """What changed from `before` to `after` in rows of `provider` (and of its compiled form), or of all for None.

    A time that grew by more than `threshold` is a regression. So are an error or memory that grew, a number that is
    missing now, and a row that is gone. Raises ValueError if the runs are of two GPUs.
    """
    gpus = before.machine.get("gpu"), after.machine.get("gpu")
    if gpus[0] != gpus[1]:
        raise ValueError(f"runs of two machines: {gpus[0]} and {gpus[1]}")
    new = {r.key: r for r in after.records}
    for old in before.records:
        if provider is not None and not old.provider.startswith(provider):
            continue
        r = new.get(old.key)
        if r is None:
            yield Finding(old, "is gone", True)
            continue
        if old.ms is not None and r.ms is None:
            yield Finding(r, f"took {old.ms:.4f} ms, now: {r.reason or 'no time'}", True)
        elif old.ms is not None:
            change = r.ms / old.ms - 1
            if abs(change) > threshold:
                word = "slower" if change > 0 else "faster"
                spread = max(old.spread or 0, r.spread or 0)
                doubt = f", though samples spread by {spread:.1%}" if spread > abs(change) else ""
                yield Finding(r, f"{abs(change):.1%} {word}: {old.ms:.4f} -> {r.ms:.4f} ms{doubt}", change > 0)
        if old.error is not None and r.error is None:
            yield Finding(r, f"had an error of {old.error:.1e}, now: {r.reason or 'none is known'}", True)
        elif old.error is not None and r.error > ERROR_BY * old.error:
            yield Finding(r, f"error {old.error:.1e} -> {r.error:.1e}", True)
        for name in ("memory", "saved"):
            was, now = getattr(old, name), getattr(r, name)
            if was is not None and now is not None and now > MEMORY_BY * was:
                yield Finding(r, f"{name} {was:,} -> {now:,} bytes", True)


def matched(before: Run, after: Run, provider: str | None = OURS) -> int:
    """The number of rows that are in both runs."""
    keys = {r.key for r in after.records}
    return sum(r.key in keys for r in before.records if provider is None or r.provider.startswith(provider))
