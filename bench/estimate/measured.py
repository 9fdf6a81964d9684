"""Our own kernels as a GPU ran them, beside the estimates of the same calls: how far the models are off for them.

The times are those of the records in bench/results and of the sweeps in the lab book (measured.json). A kernel that has
another tile today, or that another release of Triton compiles, is left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.estimate import ROW_OPS, few_rows, ours, packed
from bench.estimate.calibrate import Point
from bench.estimate.constants import Gpu, gpus
from bench.estimate.errors import OURS
from bench.estimate.few_rows import Few
from bench.estimate.published import Figure
from bench.estimate.result import Estimate
from bench.estimate.tiles import Shape
from bench.measuring import records
from bench.measuring.kernels import has_tile, tile_of
from bench.measuring.records import Record
from bench.providers.provider import OURS as OUR_NAME
from bench.works.attention import AttentionVarlen
from bench.works.norms import AddRMSNorm, RMSNorm
from bench.works.rotations import QKNormRope, Rope, RopeQKV
from llama_kernels.core.language import TRITON_VERSION
from llama_kernels.ops.attention import decode, dispatch, tables
from llama_kernels.ops.attention.hopper.tables import tile_for_width

FILE = Path(__file__).with_name("measured.json")
RESULTS = Path(__file__).parents[1] / "results"
# Of records that do not name their kernels:
_DELTA_IN_DQ = "2026-11-27T12"  # until then a launch of its own computed delta
_WIDE_BACKWARD = "2026-11-28T06"  # until then the backward of heads wider than 128 had other tiles
_WORKS = {work.op: work for work in (RMSNorm, AddRMSNorm, Rope, QKNormRope, RopeQKV)}


class _Missing(Exception):
    """What was measured is not what would run today."""


class _Timed(NamedTuple):
    """A kernel that was timed alone, or a call of several."""

    kernel: str
    B: int
    S: int  # tokens of a sequence; keys of a decoding step
    Hq: int
    Hkv: int
    D: int
    tile: str  # as it was then
    ms: float

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("B", "S", "Hq", "Hkv", "D")}


def points(say: Callable[[str], None], only: str = "") -> Iterator[Point]:
    """A point for each time that was measured. say: gets a line for each reason why some are left out.

    only: of calls whose op, such as "rms_norm forward", begins so.
    """
    told: set[str] = set()
    for what, gpu, sizes, source, ms, estimate in (*_of_records(), *_of_sweeps()):
        if not what.startswith(only):
            continue
        try:
            made = estimate()
        except _Missing as error:
            if str(error) not in told:
                say(f"left out: {error}")
                told.add(str(error))
            continue
        figure = Figure("llama_kernels", what, gpu.name, sizes, ms * 1e3, "us", source, "", None, None)
        yield Point(figure, made.kind, gpu.family, made, ms * 1e-3, OURS)


class _Call(NamedTuple):
    """A time, and what estimates it."""

    what: str
    gpu: Gpu
    sizes: dict[str, Any]
    source: str
    ms: float
    estimate: Callable[[], Estimate]


# --- the records of `python -m bench` --------------------------------------------------------------------------------


def _of_records() -> Iterator[_Call]:
    for path in sorted(RESULTS.glob("*/*.json")):
        run = records.read(path)
        gpu = next((gpu for gpu in gpus().values() if gpu.name in run.machine["gpu"].split()), None)
        for record in run.records if gpu else ():
            alone = record.op in (*ROW_OPS, "attention", "attention_varlen", "decode") and record.direction != "both"
            if alone and gpu and record.provider == OUR_NAME and record.dtype == "bfloat16" and record.ms:
                source = f"{path.parent.name}/{path.name}"
                yield _Call(f"{record.op} {record.direction}", gpu, record.sizes, source, record.ms,
                            lambda record=record, gpu=gpu: _of_record(gpu, record))  # fmt: skip


def _of_record(gpu: Gpu, record: Record) -> Estimate:
    """Records were timed by CUDA graphs: nothing is added for the time around the kernels."""
    _require_triton(record.triton)
    sizes = record.sizes
    if record.op in _WORKS:
        return ours.work_estimate(gpu, _WORKS[record.op](shape="", **sizes), record.direction)
    if record.op == "decode":
        return few_rows.few_rows_estimate(gpu, Few(sizes["B"], 1, sizes["Sk"], sizes["Hq"], sizes["Hkv"], sizes["D"]))
    if record.op == "attention_varlen":
        if record.direction == "forward":
            raise _Missing("attention_varlen forward ran the Hopper kernel; its model has no packed batches")
        work = AttentionVarlen(shape="", **{**sizes, "lengths": tuple(sizes["lengths"])})  # JSON has no tuples
        return packed.packed_estimate(gpu, work, record.direction)
    if sizes["window"] != -1:
        raise _Missing("attention with a window")
    shape = Shape(*(sizes[name] for name in ("B", "S", "Hq", "Hkv", "D")))
    _require_tiles(gpu, record)
    hopper = record.direction == "forward" and dispatch.for_heads("forward", gpu.family, shape.D).tile is not None
    delta_apart = record.date < _DELTA_IN_DQ if record.kernels is None else _ran("delta", record)
    return ours.attention_estimate(gpu, shape, record.direction, hopper, delta_apart)


def _require_tiles(gpu: Gpu, record: Record) -> None:
    """Raise _Missing if a portable kernel of attention ran with another tile than today's."""
    what = f"attention {record.direction}, D = {record.sizes['D']}"
    if record.kernels is None:
        if record.direction == "backward" and record.sizes["D"] > 128 and record.date < _WIDE_BACKWARD:
            raise _Missing(f"{what}: measured with other tiles than today's")
        return
    for pass_ in ("forward", "dq", "dkdv"):
        today = tables.tile(gpu.family, pass_, record.sizes["D"], torch.bfloat16).launch_options
        for kernel in record.kernels:
            if kernel.startswith(f"{pass_}_kernel:") and not has_tile(kernel, today):
                raise _Missing(f"{what}: measured with {kernel}; today its tile is {tile_of(**today)}")


def _ran(kernel: str, record: Record) -> bool:
    return any(each.startswith(f"{kernel}_kernel:") for each in record.kernels or ())


def _require_triton(release: str) -> None:
    if not release.startswith(".".join(map(str, TRITON_VERSION))):
        raise _Missing(f"measured with Triton {release}; installed is {'.'.join(map(str, TRITON_VERSION))}")


# --- the sweeps of the lab book --------------------------------------------------------------------------------------


def _of_sweeps() -> Iterator[_Call]:
    file = json.loads(FILE.read_text())
    gpu = gpus()[file["gpu"]]
    for series in file["series"]:
        for row in series["rows"]:
            timed = _Timed(**dict(zip(series["columns"], row, strict=True)))
            yield _Call(_what(timed.kernel), gpu, timed.sizes, series["source"], timed.ms,
                        lambda timed=timed: _of_sweep(gpu, timed, file["triton"]))  # fmt: skip


def _what(kernel: str) -> str:
    return "decode forward" if kernel == "decode" else f"attention {kernel.replace('_', ' ')}"


def _of_sweep(gpu: Gpu, timed: _Timed, triton: str) -> Estimate:
    _require_triton(triton)
    today = _tile(gpu, timed)
    if today != timed.tile:
        raise _Missing(f"{_what(timed.kernel)}, D = {timed.D}: measured with {timed.tile}; today it is {today}")
    if timed.kernel == "decode":
        return few_rows.few_rows_estimate(gpu, Few(timed.B, 1, timed.S, timed.Hq, timed.Hkv, timed.D))
    shape = Shape(timed.B, timed.S, timed.Hq, timed.Hkv, timed.D)
    hopper = timed.kernel.startswith("hopper")
    direction = "forward" if timed.kernel.endswith("forward") else "backward"
    whole = ours.attention_estimate(gpu, shape, direction, hopper, delta_apart=True)
    if timed.kernel == "hopper_backward":
        return ours.timed(whole)
    alone = sum(seconds for name, seconds in whole.parts if name.rstrip("'") == timed.kernel)
    return dataclasses.replace(whole, seconds=alone)


def _tile(gpu: Gpu, timed: _Timed) -> str:
    if timed.kernel == "decode":
        return f"chunks of {decode.chunk_of(timed.S, timed.Hkv)}"
    if timed.kernel.startswith("hopper"):
        return str(tile_for_width(timed.kernel.removeprefix("hopper_"), timed.D))
    return str(tables.tile(gpu.family, timed.kernel, timed.D, torch.bfloat16))
