"""Peers' kernels, compiled and put through the models, beside their published speeds: how far the models are off.

measured.py does the same for ours, beside what a GPU measured.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.estimate import attention, memory, ours, published
from bench.estimate.constants import Gpu, gpus
from bench.estimate.constants import attention as attention_constants
from bench.estimate.constants import memory as memory_constants
from bench.estimate.errors import PEERS, Error, Key
from bench.estimate.kernels import Kernel
from bench.estimate.peers import attention as attention_peers
from bench.estimate.peers import rows as row_peers
from bench.estimate.peers.loading import Missing
from bench.estimate.published import Figure
from bench.estimate.result import Estimate
from bench.estimate.tiles import Shape
from bench.works.norms import RMSNorm
from bench.works.rotations import Rope

_KERNELS: dict[str, Callable[..., list[Kernel]]] = {
    f.__name__: f
    for f in (
        row_peers.liger_rms_norm, row_peers.liger_rms_norm_backward, row_peers.liger_add_rms_norm,
        row_peers.liger_add_rms_norm_backward, row_peers.liger_rope, attention_peers.tutorial_06_descriptors,
        attention_peers.tutorial_06_pointers, attention_peers.flash_attention_3_forward,
        attention_peers.flash_attention_3_backward,
    )
}  # fmt: skip


class Point(NamedTuple):
    """One known speed, and what the model says of it."""

    figure: Figure
    kind: str  # of estimate; errors are kept for each
    family: str
    estimate: Estimate
    known: float  # seconds, published or measured
    whose: str = PEERS  # kernels, as in errors.json

    @property
    def error(self) -> float:
        return self.estimate.seconds / self.known - 1


def points(peers: Path, say: Callable[[str], None], only: str = "") -> Iterator[Point]:
    """A point for each published figure whose kernel is in the folder `peers`. say: gets a line for each that is not.

    only: of figures whose op, such as "rms_norm forward", begins so.
    """
    missing: set[str] = set()
    for figure in published.figures():
        if figure.kernel is None or not figure.what.startswith(only):
            continue
        try:
            yield _point(peers, figure)
        except Missing as error:
            if figure.kernel not in missing:
                say(f"left out: {figure.kernel}: {error}")
                missing.add(figure.kernel)


def unpublished(peers: Path, say: Callable[[str], None]) -> Iterator[tuple[str, str, Estimate, Estimate]]:
    """Peers' kernels of which no speed is known for an H100: whose, what, its estimate and that of ours."""
    gpu, half = gpus()["H100"], torch.bfloat16
    norm, rope = RMSNorm(shape="", M=8192, N=4096), Rope(shape="", B=4, S=8192, Hq=32, Hkv=8, D=128)
    rows = {"M": 8192, "N": 4096, "dtype": half, "weight": half}
    for who, work, kernel, sizes in (
        ("Unsloth", norm, row_peers.unsloth_rms_norm, rows),
        ("flash-linear-attention", norm, row_peers.fla_rms_norm, rows),
        ("Unsloth", rope, row_peers.unsloth_rope, rope.sizes),
        ("Liger", rope, row_peers.liger_rope, rope.sizes),
    ):
        try:
            theirs = memory.estimate(gpu, kernel(peers, gpu.family, **sizes)[0], work.bytes("forward"))
        except Missing as error:
            say(f"left out: {kernel.__name__}: {error}")
        else:
            yield who, f"{work.op} forward, {gpu.name}", theirs, ours.work_estimate(gpu, work, "forward")


def errors(found: Iterable[Point]) -> dict[Key, Error]:
    by: dict[Key, list[float]] = {}
    for point in found:
        by.setdefault(Key(point.kind, point.family, point.whose), []).append(point.error)
    return {key: Error(statistics.mean(map(abs, e)), max(e, key=abs), len(e)) for key, e in by.items()}


def _point(peers: Path, figure: Figure) -> Point:
    gpu = gpus()[figure.gpu]
    op = figure.what.split()[0]
    if op == "attention":
        return _attention_point(peers, figure, gpu)
    return _rows_point(peers, figure, gpu)


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows_point(peers: Path, figure: Figure, gpu: Gpu) -> Point:
    assert figure.kernel
    sizes = {k: getattr(torch, v) if isinstance(v, str) else v for k, v in figure.sizes.items()}
    kernel = _KERNELS[figure.kernel](peers, gpu.family, **sizes)[0]
    bytes_, backward = row_bytes(figure.what, sizes, gpu), figure.what.endswith("backward")
    # A program of Liger's backwards takes its rows one after another, without a prefetch.
    steps = -(-sizes["M"] // gpu.sms) if backward else 1
    made = memory.estimate(gpu, kernel, bytes_, memory.Walk(trips=steps, steps=steps))
    made = dataclasses.replace(made, seconds=made.seconds + memory_constants().call)
    kind = "rows, one after another" if backward else "rows" if sizes.get("N", 512) >= 512 else "short rows"
    seconds = figure.value * 1e-6 if figure.unit == "us" else bytes_ / figure.value / 1e9
    return Point(figure, kind, gpu.family, made, seconds)


def row_bytes(what: str, sizes: dict[str, Any], gpu: Gpu) -> float:
    """That an op on rows, or RoPE, reads from and writes to DRAM."""
    if what.startswith("rope"):
        width = sizes["D"] * 2
        return 2 * sizes["B"] * sizes["S"] * (sizes["Hq"] + sizes["Hkv"]) * width + sizes["S"] * width
    elements = sizes["M"] * sizes["N"] * sizes["dtype"].itemsize
    moved = {"rms_norm forward": 2, "rms_norm backward": 3, "add_rms_norm forward": 4, "add_rms_norm backward": 4}
    sums = 8 * gpu.sms * sizes["N"] if what.endswith("backward") else 0  # of dw, float32, written and read
    return moved[what] * elements + sums


# --- attention -------------------------------------------------------------------------------------------------------


def _attention_point(peers: Path, figure: Figure, gpu: Gpu) -> Point:
    assert figure.kernel
    s = figure.sizes
    shape = Shape(s["B"], s["S"], s["Hq"], s["Hq"], s["D"], s["causal"])
    held = figure.clock is not None
    if held:
        gpu = dataclasses.replace(gpu, clock=figure.clock, loaded_clock=figure.clock)
    kernels = _KERNELS[figure.kernel](peers, gpu.family, shape)
    backward = figure.what.endswith("backward")
    one = attention.flash_backward if backward else attention.forward
    made = min((one(gpu, kernel, shape) for kernel in kernels), key=lambda e: e.seconds)
    if not held:  # a duration at a held clock is that of the kernel alone
        made = dataclasses.replace(made, seconds=made.seconds + attention_constants().call)
    specialised = figure.kernel.startswith("flash_attention_3")
    kind = figure.what + ", specialised" * specialised + ", clock held" * held
    flops = shape.flops * (2.5 if backward else 1)
    seconds = figure.value * 1e-6 if figure.unit == "us" else flops / figure.value / 1e12
    return Point(figure, kind, gpu.family, made, seconds)
