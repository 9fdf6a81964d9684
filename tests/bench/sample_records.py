"""Records of the bench, made up."""

from __future__ import annotations

from typing import Any

from bench.measuring.records import Record
from bench.providers.provider import OURS

HEADS = {"B": 4, "S": 4096, "Hq": 32, "Hkv": 8, "D": 128}


def record(op: str, direction: str, ms: float | None, provider: str = OURS, **more: Any) -> Record:
    values = {"shape": "Llama 3.1 8B", "sizes": HEADS, "dtype": "bfloat16", "spread": 0.01, **more}
    return Record(op=op, direction=direction, ms=ms, provider=provider, **values)


def norm(N: int, percent: float, **more: Any) -> Record:
    return record("rms_norm", "forward", 1.0, sizes={"M": 16384, "N": N}, shape=f"rows of {N}", unit="GB/s",
                  percent=percent, **more)  # fmt: skip
