"""The numbers of the models, from constants.json, where each stands with its unit and its source."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("constants.json")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU. Bytes a second are in GB/s, clocks in GHz."""

    name: str
    family: str
    sms: int
    clock: float
    loaded_clock: float  # that it holds while the tensor cores are busy
    copy: float
    l2_rate: float  # bytes a cycle into one SM
    l2_rate_together: float  # the same while all SMs read
    l2: float
    l1: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """The constants of the model of memory-bound kernels: cycles, and the seconds of a call."""

    start: float
    dram_latency: float
    l2_latency: float
    dependent: float
    softness: float
    call: float


@dataclasses.dataclass(frozen=True)
class Attention:
    """The constants of the model of attention: cycles of a tile and an empty program, seconds of a call and launch."""

    tile: float
    call: float
    launch: float
    unloaded: float  # the share of the tensor cores' rate up to which the full clock holds
    reduce: float  # GB/s that one SM adds to sums in the L2
    empty: float


@dataclasses.dataclass(frozen=True)
class Network:
    """Between GPUs, each way, as NCCL reaches it: GB/s of a GPU, and seconds from a start to the first byte."""

    nvlink: float
    network: float
    nvlink_latency: float
    network_latency: float
    gpus_of_a_node: int
    nvlink_low: float  # what a machine that is not tuned reaches
    network_low: float

    @property
    def low(self) -> Network:
        """The same, not tuned."""
        return dataclasses.replace(self, nvlink=self.nvlink_low, network=self.network_low)


@functools.cache
def _read() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def _values(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: row["value"] for name, row in rows.items()}


def sm_constants(family: str) -> dict[str, Any]:
    """The constants of an SM of `family`: the fields of `bench.estimate.sm.pipes.Sm`.

    Raises:
        ValueError: there is no model of `family`; there are sm_80 and sm_90.
    """
    known = _read()["sm"]
    if family not in known:
        raise ValueError(f"there is no model of an SM of {family}; there are {', '.join(known)}")
    return _values(known[family])


SM_FAMILIES = tuple(_read()["sm"])  # whose SM is modelled


@functools.cache
def gpus() -> dict[str, Gpu]:
    return {name: Gpu(name, **_values(rows)) for name, rows in _read()["gpus"].items()}


def gpu_of(family: str) -> Gpu:
    """The first GPU of `family`."""
    return next(gpu for gpu in gpus().values() if gpu.family == family)


@functools.cache
def memory() -> Memory:
    return Memory(**_values(_read()["memory"]))


@functools.cache
def attention() -> Attention:
    return Attention(**_values(_read()["attention"]))


@functools.cache
def network() -> Network:
    return Network(**_values(_read()["network"]))
