"""Speeds that others published, from published.json with their sources."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("published.json")


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


def figures() -> Iterator[Figure]:
    for series in json.loads(FILE.read_text())["series"]:
        for row in series["rows"]:
            sizes = dict(zip(series["columns"], row, strict=True))
            value = sizes.pop("value")
            yield Figure(series["who"], series["what"], series["gpu"], {**series["sizes"], **sizes}, value,
                         series["unit"], series["source"], series.get("note", ""), series.get("kernel"),
                         series.get("clock"))  # fmt: skip
