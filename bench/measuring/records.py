"""The records of a run, and their file: one JSON object, whose fields docs/bench.md describes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
NOT_RUN = "not run"  # how the reason begins where a run had no time, or ended, before it came to the row


@dataclasses.dataclass
class Record:
    """One provider at one piece of work in one direction. What was not measured is None, and `reason` says why."""

    op: str
    direction: str  # forward, backward, both; step for training
    shape: str  # the work's name
    sizes: dict[str, Any]
    dtype: str
    provider: str
    ms: float | None = None  # median of a call
    spread: float | None = None  # middle half of the samples over the median
    samples: int | None = None
    method: str | None = None  # graph, events or model
    rate: float | None = None  # the work's floor of bytes or FLOPs, over ms
    unit: str | None = None  # of rate and ceiling: GB/s, TFLOP/s or tokens/s
    ceiling: float | None = None  # the rate of this machine at best, measured in the same run
    percent: float | None = None  # rate of ceiling
    ratio: float | None = None  # ms of the fastest other provider over ms: over 1 is faster than all
    memory: int | None = None  # bytes allocated at the peak, beyond the arguments
    saved: int | None = None  # bytes kept for the backward, arguments among them
    error: float | None = None  # largest relative error, of outputs and gradients, against float64
    reason: str | None = None
    estimate: bool = False  # from a model of the GPU, not from a clock
    clock: int | None = None  # MHz of the multiprocessors after the samples
    torch: str = ""
    triton: str = ""
    gpu: str = ""
    driver: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What two runs are matched by."""
        sizes = json.dumps(self.sizes, sort_keys=True)
        where = self.gpu if self.estimate else ""
        return self.op, self.direction, self.shape, sizes, self.dtype, where, self.provider

    @property
    def work(self) -> str:
        """The piece of work, in words."""
        sizes = ", ".join(f"{name}={n}" for name, n in self.sizes.items())
        return f"{self.op}, {self.shape} ({sizes}), {self.dtype}"

    @property
    def finished(self) -> bool:
        """Whether a run that resumes need not measure it again."""
        return not (self.reason or "").startswith(NOT_RUN)


class Run(NamedTuple):
    """Where the records come from, the machine's ceilings, and the records."""

    machine: dict[str, Any]
    ceilings: dict[str, float]
    records: list[Record]
    extra: dict[str, Any]  # what a run without a GPU adds: host cost, machine code


# --- files -----------------------------------------------------------------------------------------------------------


def replace_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text` atomically: a reader finds all of the old text or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def write(run: Run, path: Path) -> None:
    """Replace `path` atomically: a reader, also after this process was killed, finds the whole old or new file."""
    whole = {"schema": SCHEMA, "machine": run.machine, "ceilings": run.ceilings, **run.extra}
    whole["records"] = [{name: _known(x) for name, x in dataclasses.asdict(r).items()} for r in run.records]
    replace_text(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")


def _known(x: Any) -> Any:
    """An error that is infinite or not a number is in the reason; JSON has no such numbers."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read(path: Path) -> Run:
    """Raises ValueError where the file is not ours, naming what is wrong."""
    try:
        whole = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("records"), list):
        raise ValueError(f"{path}: no object with `records`")
    if whole.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {whole.get('schema')}; this is {SCHEMA}")
    records = [_record(path, i, fields) for i, fields in enumerate(whole.pop("records"))]
    del whole["schema"]
    return Run(whole.pop("machine", {}), whole.pop("ceilings", {}), records, whole)


_KINDS = {"str": (str,), "float": (float, int), "int": (int,), "bool": (bool,), "None": (type(None),)}


def _record(path: Path, i: int, fields: Any) -> Record:
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: record {i} is no object")
    known = {f.name: f for f in dataclasses.fields(Record)}
    if unknown := fields.keys() - known.keys():
        raise ValueError(f"{path}: record {i} has unknown fields: {', '.join(sorted(unknown))}")
    for name, field in known.items():
        kinds = tuple(kind for part in field.type.split(" | ") for kind in _KINDS.get(part, (dict,)))
        optional = field.default is not dataclasses.MISSING
        if name not in fields:
            if optional:
                continue
            raise ValueError(f"{path}: record {i} has no {name}")
        value = fields[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{path}: record {i}: {name} is {value!r}; wanted {field.type}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path}: record {i}: {name} is {value}")
    return Record(**fields)


def folder(gpu: str) -> Path:
    """bench/results/<gpu>."""
    return Path(__file__).parents[1] / "results" / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "unknown")


def latest(gpu: str) -> Path | None:
    """The newest run that is kept for `gpu`."""
    return max(folder(gpu).glob("*.json"), default=None, key=lambda p: p.name)


def with_ratios(records: Iterable[Record]) -> list[Record]:
    """The records, with `ratio`: to the fastest other provider of the same work."""
    records = list(records)
    groups: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        groups.setdefault((*r.key[:-1], r.gpu), []).append(r)
    for group in groups.values():
        for r in group:
            others = [o.ms for o in group if o.ms is not None and o.provider != r.provider]
            r.ratio = min(others) / r.ms if others and r.ms else None
    return records
