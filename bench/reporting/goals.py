"""The goals of speed in bfloat16, and whether a run meets them.

A goal picks records by op, direction and sizes. It is met if the slowest of them reaches it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from bench.measuring.records import Record
from bench.providers.provider import OURS

HOST_MICROSECONDS = 25.0  # goal of the host time of a forward call with its launch
LAUNCH_MICROSECONDS = 3.0  # time of the driver's launch of a kernel, which bench.host does not measure

# What a goal is about: see Goal.quantity.
COPY, RATE, RATIO, SHARE = "copy", "rate", "ratio", "share"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A goal for one op in one direction.

    work: the name of the goal on pages.
    quantity: COPY, our rate / that of a copy in the same run; RATE, our TFLOP/s; RATIO, the time of provider `against`
        / ours; SHARE, our rate / our rate at the op and shape `beside`.
    least: the goal is met if the quantity is at least this.
    sizes: for each size, the smallest and the largest that count, both included.
    hopper: whether the goal is for the run with the Hopper kernels.
    """

    work: str
    op: str
    direction: str
    quantity: str
    least: float
    sizes: Mapping[str, tuple[int, int]]
    against: str | None = None
    beside: tuple[str, str] | None = None
    hopper: bool = False

    def picks(self, r: Record) -> bool:
        return (
            (r.op, r.direction, r.dtype, r.provider) == (self.op, self.direction, "bfloat16", OURS)
            and not r.estimate
            and all(low <= r.sizes.get(name, -1) <= high for name, (low, high) in self.sizes.items())
        )

    def shown(self, value: float) -> str:
        if self.quantity == RATE:
            return f"{value:.0f} TFLOP/s"
        return f"{value:.2f}x" if self.quantity == RATIO else f"{value:.0%}"

    def __str__(self) -> str:
        than = {COPY: " of the copy", RATE: "", RATIO: f" {self.against}", SHARE: " of the rate"}[self.quantity]
        return self.shown(self.least) + than


_ROWS, _SHORT = {"N": (2048, 65536)}, {"N": (64, 128)}
_HEADS = {"S": (2048, 2**20)}
_LONG = {"S": (4096, 16384), "Hq": (32, 32), "Hkv": (8, 8), "D": (128, 128), "window": (-1, -1)}

GOALS = (
    Goal("RMSNorm, rows of 2k to 65k", "rms_norm", "forward", COPY, 0.95, _ROWS),
    Goal("add + RMSNorm, rows of 2k to 65k", "add_rms_norm", "forward", COPY, 0.95, _ROWS),
    Goal("RMSNorm, rows of 2k to 65k", "rms_norm", "backward", COPY, 0.88, _ROWS),
    Goal("RMSNorm, rows of 64 and 128", "rms_norm", "forward", COPY, 0.92, _SHORT),
    Goal("RMSNorm, rows of 64 and 128", "rms_norm", "backward", COPY, 0.85, _SHORT),
    Goal("RoPE", "rope", "forward", COPY, 0.93, _HEADS),
    Goal("RoPE", "rope", "backward", COPY, 0.93, _HEADS),
    Goal("RoPE", "rope", "forward", RATIO, 1.9, _HEADS, against="liger"),
    Goal("RoPE", "rope", "forward", RATIO, 1.05, _HEADS, against="torch.compile"),
    Goal("attention, D=128, 4k to 16k", "attention", "forward", RATIO, 1.2, _LONG, against="sdpa-flash"),
    Goal("attention, D=128, 4k to 16k", "attention", "backward", RATIO, 1.1, _LONG, against="sdpa-flash"),
    Goal("the same, Hopper kernels", "attention", "forward", RATIO, 1.0, _LONG, against="sdpa-cudnn", hopper=True),
    Goal("the same, Hopper kernels", "attention", "backward", RATIO, 1.0, _LONG, against="sdpa-cudnn", hopper=True),
    Goal("the same, Hopper kernels", "attention", "forward", RATE, 600, _LONG, hopper=True),
    Goal("the same, Hopper kernels", "attention", "backward", RATE, 500, _LONG, hopper=True),
    *(
        Goal("packed, unequal over equal documents", "attention_varlen", direction, SHARE, 0.9, {},
             beside=("attention_varlen", "equal documents"))
        for direction in ("forward", "backward")
    ),
)  # fmt: skip


class Standing(NamedTuple):
    """A goal, and the value of the slowest record; or None, and `why` there is no value."""

    goal: Goal
    value: float | None
    why: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value >= self.goal.least


def standings(portable: Sequence[Record], hopper: Sequence[Record] = ()) -> Iterator[Standing]:
    """The standing of every goal in the records of a run, and in those of a run with the Hopper kernels."""
    for goal in GOALS:
        found = hopper if goal.hopper else portable
        picked = [r for r in found if goal.picks(r) and r.shape != (goal.beside or ("", ""))[1]]
        if not picked:
            yield Standing(goal, None, "no record")
            continue
        timed = [r for r in picked if r.ms is not None]
        untimed = [r.reason or "no time" for r in picked if r.ms is None]
        if wrong := next((why for why in untimed if not timed or not why.startswith("not run")), None):
            yield Standing(goal, None, wrong)
            continue
        measured = [_MEASURES[goal.quantity](goal, r, found) for r in timed]
        numbers = [x for x in measured if isinstance(x, float)]
        yield Standing(goal, min(numbers)) if numbers else Standing(goal, None, str(measured[0]))


# The functions of _MEASURES: the value of a goal's quantity for one record, or why there is none.


def _of_copy(goal: Goal, r: Record, found: Sequence[Record]) -> float | str:
    return r.percent / 100 if r.unit == "GB/s" and r.percent is not None else f"in {r.unit}"


def _rate(goal: Goal, r: Record, found: Sequence[Record]) -> float | str:
    return r.rate if r.unit == "TFLOP/s" and r.rate is not None else f"in {r.unit}"


def _times(goal: Goal, r: Record, found: Sequence[Record]) -> float | str:
    other = next((o for o in found if o.key[:-1] == r.key[:-1] and o.provider == goal.against), None)
    if other is None:
        return "no record of it"
    return other.reason or "no time" if other.ms is None else other.ms / r.ms


def _share(goal: Goal, r: Record, found: Sequence[Record]) -> float | str:
    op, shape = goal.beside
    others = (o for o in found if (o.op, o.shape, o.direction, o.dtype) == (op, shape, r.direction, r.dtype))
    other = next((o for o in others if o.provider == OURS and o.rate), None)
    return f"no record of {shape}" if other is None else r.rate / other.rate


_MEASURES: dict[str, Callable[[Goal, Record, Sequence[Record]], float | str]] = {
    COPY: _of_copy, RATE: _rate, RATIO: _times, SHARE: _share,
}  # fmt: skip
