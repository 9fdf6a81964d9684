"""Speeds that others published, from published.json with their sources, and the errors of our estimates beside them.

errors.json is written by `python -m bench calibrate PEERS --record`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("published.json")
ERRORS = Path(__file__).with_name("errors.json")
UNKNOWN = 0.3  # the error that is stated where nothing published can be compared
FEW, OF_FEW = 10, 0.1  # of fewer points than these, no smaller error is stated than this
LEAST = 0.04  # nor of many: sources that measured the same kernel differ by more


class Figure(NamedTuple):
    """One published speed."""

    who: str
    what: str  # "rms_norm forward", "attention backward", ...
    gpu: str
    sizes: dict[str, Any]
    value: float
    unit: str  # us, GB/s or TFLOP/s
    source: str
    note: str
    kernel: str | None  # of bench.estimate.peers: what compiles to the published kernel
    clock: float | None  # GHz, where the GPU was held at it


class Error(NamedTuple):
    """Of estimates of one kind on one family. Shares: mean size, the worst with its sign."""

    mean: float
    worst: float
    points: int


def figures() -> Iterator[Figure]:
    for series in json.loads(FILE.read_text())["series"]:
        for row in series["rows"]:
            sizes = dict(zip(series["columns"], row, strict=True))
            value = sizes.pop("value")
            yield Figure(series["who"], series["what"], series["gpu"], {**series["sizes"], **sizes}, value,
                         series["unit"], series["source"], series.get("note", ""), series.get("kernel"),
                         series.get("clock"))  # fmt: skip


def errors() -> dict[tuple[str, str], Error]:
    """By kind of estimate and family."""
    if not ERRORS.exists():
        return {}
    rows = json.loads(ERRORS.read_text())
    return {(row["kind"], row["family"]): Error(row["mean"], row["worst"], row["points"]) for row in rows}


def error_of(kind: str, family: str) -> float:
    """The share that is stated with an estimate of this kind: the mean error of what was compared."""
    found = errors().get((kind, family))
    if not found:
        return UNKNOWN
    return max(found.mean, OF_FEW if found.points < FEW else LEAST)
