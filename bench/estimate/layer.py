"""A decoder layer of Llama 3.1 8B, forward and backward: its launches, and where the estimated time goes.

The layer of Transformers runs on tensors without data, and each op that PyTorch dispatches is noted. Our ops take what
their models say, FlashAttention its published speed, matrix products 80% of the tensor cores' rate, all other ops the
bytes that they move at the speed of a copy. Each launch adds a gap.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from torch import nn

from bench.estimate import bounds
from bench.estimate.bounds import Op
from bench.estimate.constants import Gpu
from bench.estimate.constants import attention as attention_constants
from bench.estimate.layer_times import NAME, B, S, Timer, liger_timer, our_timer, stock_timer
from bench.training.scale import Scale
from bench.training.step import Step, llama
from bench.training.variations import Stock, Variation
from bench.works.models import MODELS

TITLE = f"a layer of {NAME}, {B} x {S:,} tokens, bfloat16, forward and backward"
PARTS = ("attention", "projections and MLP", "RMSNorm and residual", "RoPE", "element-wise")
_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm")


class Part(NamedTuple):
    """One part of a layer in a stack. forward, backward: seconds."""

    name: str
    launches: int
    forward: float
    backward: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class Stack:
    """A way to compute the layer."""

    name: str
    parts: tuple[Part, ...]

    @property
    def launches(self) -> int:
        return sum(part.launches for part in self.parts)

    @property
    def forward(self) -> float:
        return sum(part.forward for part in self.parts)

    @property
    def backward(self) -> float:
        return sum(part.backward for part in self.parts)

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


def stacks(gpu: Gpu, hopper: bool = False, peers: Path | None = None) -> list[Stack]:
    """Stock with FlashAttention, with Liger's RoPE and RMSNorm if `peers` has Liger, and ours."""
    stock, patched, apart = (_ops(v) for v in (Stock(False), _Patched(True), _Patched(False)))
    flash = "FlashAttention-2" if gpu.family == "sm_90" else ""
    found = [_stack(f"stock, {flash or 'SDPA at the rate of products'}", stock, stock_timer(gpu, flash))]
    if peers is not None:
        found.append(_stack(f"Liger's RoPE and RMSNorm, {flash}", apart, liger_timer(gpu, flash, peers)))
    found.append(_stack("ours, portable attention", patched, our_timer(gpu, False)))
    if hopper and gpu.family == "sm_90":
        found.append(_stack("ours, Hopper kernels", patched, our_timer(gpu, True)))
    if gpu.family == "sm_90":
        found.append(_stack("ours, with FlashAttention-3", patched, our_timer(gpu, False, "FlashAttention-3")))
    return found


# --- ops -------------------------------------------------------------------------------------------------------------


class _Patched(Variation):
    """Our patch. fuse: also across ops."""

    def __init__(self, fuse: bool) -> None:
        self.name, self.fuse = "patched", fuse

    def change(self, model: nn.Module) -> nn.Module:
        from llama_kernels.integrations.transformers import patch

        return patch(model, fuse=self.fuse)


class _Ops(NamedTuple):
    forward: list[Op]
    backward: list[Op]


def _scale() -> Scale:
    return Scale(NAME, False, MODELS[NAME]._replace(layers=1, vocab=64), B, S)


def _ops(variation: Variation) -> _Ops:
    scale = _scale()
    step = Step(scale, variation, "meta", scale.dtype, llama(scale, "meta", scale.dtype))
    no_mask = mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", lambda *_, **__: None)
    with bounds.counting_flash(), no_mask, bounds.Tally() as forward:
        y = step.forward()
    with bounds.Tally() as backward:
        step.backward(y)
    return _Ops(forward.ops, backward.ops)


def _stack(name: str, ops: _Ops, time: Timer) -> Stack:
    sums = {part: [0, 0.0, 0.0] for part in PARTS}
    for backward, those in ((False, ops.forward), (True, ops.backward)):
        for op in those:
            if not op.bytes:  # it asks something of tensors
                continue
            seconds, launches = time(op, backward)
            row = sums[_part(op)]
            row[0] += launches
            row[1 + backward] += seconds + launches * attention_constants().launch
    return Stack(name, tuple(Part(part, int(n), f, b) for part, (n, f, b) in sums.items() if n))


def _part(op: Op) -> str:
    if "attention" in op.name:
        return "attention"
    if op.name.startswith("llama_kernels.rms_norm"):
        return "RMSNorm and residual"
    if op.name.startswith("llama_kernels.rope"):
        return "RoPE"
    return "projections and MLP" if op.name in _PRODUCTS else "element-wise"
