"""The records of a run and their JSON file, whose fields docs/bench.md describes."""

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
NOT_RUN = "not run"  # the reason of a row begins so if the run ended before it measured the row


@dataclasses.dataclass
class Record:
    """One provider at one piece of work in one direction. A value that was not measured is None; `reason` says why."""

    op: str
    direction: str  # forward, backward, both; step for training
    shape: str  # name of the work's shape
    sizes: dict[str, Any]
    dtype: str
    provider: str
    ms: float | None = None  # milliseconds a call, median of the samples
    spread: float | None = None  # range of the middle half of the samples, divided by the median
    samples: int | None = None
    method: str | None = None  # graph, events or model
    rate: float | None = None  # the least bytes or FLOPs of the work, divided by the time
    unit: str | None = None  # of rate and ceiling: GB/s, TFLOP/s or tokens/s
    ceiling: float | None = None  # the best rate of this machine, measured in the same run
    percent: float | None = None  # 100 rate / ceiling
    ratio: float | None = None  # ms of the fastest other provider / ms; over 1: faster than all others
    memory: int | None = None  # peak of the allocated bytes, without the arguments
    saved: int | None = None  # bytes kept for the backward, with the arguments among them
    error: float | None = None  # largest relative error, of outputs and gradients, against float64
    reason: str | None = None
    kernels: list[str] | None = None  # of ours, on a GPU: the kernels that ran, each with its tile
    estimate: bool = False  # ms is computed from a model of the GPU, not measured
    clock: int | None = None  # MHz of the SMs after the samples
    torch: str = ""
    triton: str = ""
    gpu: str = ""
    driver: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the row: compare and --resume match rows of two runs by it."""
        sizes = json.dumps(self.sizes, sort_keys=True)
        where = self.gpu if self.estimate else ""
        return self.op, self.direction, self.shape, sizes, self.dtype, where, self.provider

    @property
    def work(self) -> str:
        """The piece of work in words, as messages name it."""
        sizes = ", ".join(f"{name}={n}" for name, n in self.sizes.items())
        return f"{self.op}, {self.shape} ({sizes}), {self.dtype}"

    @property
    def finished(self) -> bool:
        """Whether a resumed run keeps the row instead of measuring it again."""
        return not (self.reason or "").startswith(NOT_RUN)


class Run(NamedTuple):
    """The machine that measured, its ceilings, and the records."""

    machine: dict[str, Any]
    ceilings: dict[str, float]
    records: list[Record]
    extra: dict[str, Any]  # other parts of the file: providers, stopped, host, codegen


# --- files -----------------------------------------------------------------------------------------------------------


def replace_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text` atomically: a reader finds the whole old or the whole new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def write(run: Run, path: Path) -> None:
    """Write `run` to `path`, atomically as `replace_text` does."""
    whole = {"schema": SCHEMA, "machine": run.machine, "ceilings": run.ceilings, **run.extra}
    whole["records"] = [{name: _known(x) for name, x in dataclasses.asdict(r).items()} for r in run.records]
    replace_text(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")


def _known(x: Any) -> Any:
    """None for an infinity or NaN, which JSON does not have; the reason of such an error names it."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read(path: Path) -> Run:
    """Read a file that `write` wrote. Raises ValueError, which names the fault, for any other file."""
    try:
        whole = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON ({e})") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("records"), list):
        raise ValueError(f"{path} is no JSON object with a list of `records`")
    if whole.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {whole.get('schema')}; this bench reads schema {SCHEMA}")
    records = [_record(path, i, fields) for i, fields in enumerate(whole.pop("records"))]
    del whole["schema"]
    return Run(whole.pop("machine", {}), whole.pop("ceilings", {}), records, whole)


_KINDS = {
    "str": (str,),
    "float": (float, int),
    "int": (int,),
    "bool": (bool,),
    "None": (type(None),),
    "list[str]": (list,),
}


def _record(path: Path, i: int, fields: Any) -> Record:
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: record {i} is no JSON object")
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
    """bench/results/<gpu>, where results of this GPU are kept."""
    return Path(__file__).parents[1] / "results" / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "unknown")


def latest(gpu: str) -> Path | None:
    """The newest file of results of `gpu`, or None."""
    return max(folder(gpu).glob("*.json"), default=None, key=lambda p: p.name)


def with_ratios(records: Iterable[Record]) -> list[Record]:
    """The records, with `ratio` filled in."""
    records = list(records)
    groups: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        groups.setdefault((*r.key[:-1], r.gpu), []).append(r)
    for group in groups.values():
        for r in group:
            others = [o.ms for o in group if o.ms is not None and o.provider != r.provider]
            r.ratio = min(others) / r.ms if others and r.ms else None
    return records
