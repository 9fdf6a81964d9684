"""What `python -m bench estimate` is about: our ops at the shapes of published figures, each with its estimates."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from bench.estimate import few_rows, ours, packed, windows
from bench.estimate.constants import SM_FAMILIES, Gpu
from bench.estimate.few_rows import Few
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
_WINDOWS = (128, 1024, 4096)
_BATCHES, _KEYS = (1, 8, 64), (1024, 8192, 32768, 131072)  # of decoding
_CHUNKS = (64, 128, 256, 512)  # rows of a chunk of a prompt
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
    """Without attention, except decoding, where there is no model of an SM of `gpu`."""
    for work, direction in _works():
        if work.op in ops:
            made = {"ours": ours.timed(ours.work_estimate(gpu, work, direction))}
            yield Line(gpu, f"{work.op} {direction}", work.sizes, work.bytes(direction) / 1e9, "GB/s", made)
    if "decode" in ops:
        yield from _decoding(gpu)
    if gpu.family not in SM_FAMILIES:
        return
    if "attention" in ops:
        yield from _attention(gpu, hopper)
    if "attention_varlen" in ops:
        yield from _packed(gpu)
    if "windows" in ops:
        yield from _windows(gpu)
    if "chunks" in ops:
        yield from _chunks(gpu)


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


def _windows(gpu: Gpu) -> Iterator[Line]:
    for D, direction, window in itertools.product((128, 64), _DIRECTIONS, _WINDOWS):
        shape = Shape(4, 8192, 32, 8, D)
        flops = windows.window_flops(shape, window - 1) * (2.5 if direction == "backward" else 1) / 1e12
        made = {"ours": ours.timed(windows.window_estimate(gpu, shape, window - 1, direction))}
        sizes = {"B": shape.B, "S": shape.S, "Hq": 32, "Hkv": 8, "D": D, "window": window}
        yield Line(gpu, f"attention with a window, {direction}", sizes, flops, "TFLOP/s", made)


def _decoding(gpu: Gpu) -> Iterator[Line]:
    for B, Sk in itertools.product(_BATCHES, _KEYS):
        few = Few(B, 1, Sk, 32, 8, 128)
        made = {"ours": ours.timed(few_rows.few_rows_estimate(gpu, few))}
        yield Line(gpu, "decode", {"B": B, "Sk": Sk, "Hq": 32, "Hkv": 8, "D": 128}, few.bytes / 1e9, "GB/s", made)


def _chunks(gpu: Gpu) -> Iterator[Line]:
    for (Hq, Hkv), Sq, Sk in itertools.product(((32, 8), (8, 2)), _CHUNKS, (8192, 32768, 131072)):
        few = Few(1, Sq, Sk, Hq, Hkv, 128)
        kinds = {"ours": True, "without a split of the keys": False}
        made = {who: ours.timed(few_rows.few_rows_estimate(gpu, few, split)) for who, split in kinds.items()}
        sizes = {"Sq": Sq, "Sk": Sk, "Hq": Hq, "Hkv": Hkv, "D": 128}
        yield Line(gpu, "a chunk of a prompt", sizes, few.flops / 1e12, "TFLOP/s", made)
