"""What `python -m bench estimate` is about: our ops at the shapes of published figures, each with its estimates."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from bench.estimate import ours, packed
from bench.estimate.constants import Gpu
from bench.estimate.result import Estimate
from bench.estimate.tiles import Shape
from bench.works.attention import AttentionVarlen
from bench.works.norms import NORMS, RMSNorm
from bench.works.rotations import QKNormRope, Rope, RopeQKV
from bench.works.work import Work

ROWS = 32768  # of RMSNorm
_WIDTHS = (1024, 4096, 8192, 16384, 65536)
_LENGTHS = (1024, 2048, 4096, 8192, 16384)  # of 32k tokens
_DOCUMENTS = {"16 of 2,048": (2048,) * 16, "1 of 8,192 and 64 of 384": (8192, *(384,) * 64)}
_DIRECTIONS = ("forward", "backward")


class Line(NamedTuple):
    """One call. amount: of what `unit` counts, GB or TFLOP. made: by which kernels of ours, and its estimate."""

    gpu: Gpu
    what: str
    sizes: dict[str, Any]
    amount: float
    unit: str
    made: dict[str, Estimate]


def lines(gpu: Gpu, ops: Collection[str], hopper: bool) -> Iterator[Line]:
    for work, direction in _works():
        if work.op in ops:
            made = {"ours": ours.timed(ours.work_estimate(gpu, work, direction))}
            yield Line(gpu, f"{work.op} {direction}", work.sizes, work.bytes(direction) / 1e9, "GB/s", made)
    if "attention" in ops:
        yield from _attention(gpu, hopper)
    if "attention_varlen" in ops:
        yield from _packed(gpu)


def _works() -> Iterator[tuple[Work, str]]:
    norms = (kind(shape="", M=ROWS, N=N) for kind, N in itertools.product(NORMS, _WIDTHS))
    heads = {"B": 4, "S": 8192, "Hq": 32, "Hkv": 8, "D": 128}
    rotations = (kind(shape="", **heads) for kind in (Rope, QKNormRope, RopeQKV))
    for work in itertools.chain(norms, rotations):
        # The backward of longer rows takes three launches, whose loops the model does not know.
        long = isinstance(work, RMSNorm) and work.N > 16384
        for direction in _DIRECTIONS[:1] if long else _DIRECTIONS:
            yield work, direction


def _attention(gpu: Gpu, hopper: bool) -> Iterator[Line]:
    kinds = {"ours, portable": False} | ({"ours, Hopper kernels": True} if hopper and gpu.family == "sm_90" else {})
    for D, direction, S in itertools.product((128, 64), _DIRECTIONS, _LENGTHS):
        shape = Shape(ROWS // S, S, 32, 8, D)
        flops = shape.flops * (2.5 if direction == "backward" else 1) / 1e12
        made = {who: ours.timed(ours.attention_estimate(gpu, shape, direction, on)) for who, on in kinds.items()}
        sizes = {"B": shape.B, "S": S, "Hq": 32, "Hkv": 8, "D": D, "causal": True}
        yield Line(gpu, f"attention {direction}", sizes, flops, "TFLOP/s", made)


def _packed(gpu: Gpu) -> Iterator[Line]:
    for (name, lengths), direction in itertools.product(_DOCUMENTS.items(), _DIRECTIONS):
        work = AttentionVarlen(shape="", lengths=lengths, Hq=32, Hkv=8, D=128)
        made = {"ours": ours.timed(packed.packed_estimate(gpu, work, direction))}
        sizes = {"documents": name}
        yield Line(gpu, f"attention_varlen {direction}", sizes, work.flops(direction) / 1e12, "TFLOP/s", made)
