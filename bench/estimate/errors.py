"""How far our estimates are off, by kind, from errors.json. `python -m bench calibrate --record` writes that file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("errors.json")
UNKNOWN = 0.3  # the error that is stated where nothing can be compared
FEW, OF_FEW = 10, 0.1  # of fewer points than these, no smaller error is stated than this
LEAST = 0.04  # nor of many: sources that measured the same kernel differ by more

PEERS, OURS = "peers", "ours"


class Key(NamedTuple):
    """What an error is of."""

    kind: str  # of estimate, such as "rows" or "attention backward"
    family: str  # of GPUs
    whose: str  # kernels: PEERS, whose speed is published, or OURS, which ran on a GPU


class Error(NamedTuple):
    """How far estimates of one kind are off on one family, as shares: on average, and the worst with its sign."""

    mean: float
    worst: float
    points: int


def errors() -> dict[Key, Error]:
    if not FILE.exists():
        return {}
    rows = json.loads(FILE.read_text())
    return {
        Key(row["kind"], row["family"], row["whose"]): Error(row["mean"], row["worst"], row["points"]) for row in rows
    }


def write(found: dict[Key, Error]) -> None:
    rows = [
        key._asdict() | {"mean": round(e.mean, 4), "worst": round(e.worst, 4), "points": e.points}
        for key, e in sorted(found.items())
    ]
    FILE.write_text("[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n")


def error_of(kind: str, family: str) -> float:
    """The share that is stated with an estimate of this kind: the mean error of what was compared, theirs and ours."""
    found = [e for key, e in errors().items() if (key.kind, key.family) == (kind, family)]
    points = sum(e.points for e in found)
    if not points:
        return UNKNOWN
    mean = sum(e.mean * e.points for e in found) / points
    return max(mean, OF_FEW if points < FEW else LEAST)
