"""What the ops of a layer take: by our models, by a published speed, or by bytes and FLOPs.

A timer gives the time of one op that PyTorch dispatched; each stack of bench.estimate.layer has one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.estimate import memory, ours, published
from bench.estimate.bounds import Op
from bench.estimate.constants import Gpu
from bench.estimate.constants import attention as attention_constants
from bench.estimate.memory import Walk
from bench.estimate.peers import rows as row_peers
from bench.estimate.tiles import Shape
from bench.gpus import MATMUL_SHARE
from bench.works.models import MODELS
from bench.works.norms import AddRMSNorm, RMSNorm
from bench.works.rotations import Rope

NAME, B, S = "Llama 3.1 8B", 1, 8192
_TENSOR_TFLOPS = {"sm_80": 312.0, "sm_90": 989.0}  # dense bfloat16, data sheets


class Time(NamedTuple):
    """What an op takes: seconds, without the gaps between its launches, and the number of launches."""

    seconds: float
    launches: int = 1


Timer = Callable[[Op, bool], Time]  # an op, and whether it runs in the backward


def _plain(gpu: Gpu, op: Op) -> Time:
    products = op.flops / (_TENSOR_TFLOPS[gpu.family] * MATMUL_SHARE * 1e12)
    return Time(max(op.bytes / (gpu.copy * 1e9), products))


def stock_timer(gpu: Gpu, flash: str) -> Timer:
    return lambda op, backward: _attention(gpu, op, backward, flash) if "attention" in op.name else _plain(gpu, op)


def _attention(gpu: Gpu, op: Op, backward: bool, who: str) -> Time:
    """The time of attention at the published speed of `who` at this length, whatever its mask."""
    rate = _published(gpu, who, "backward" if backward else "forward")
    shape = _shape()
    return (
        Time(shape.flops * (2.5 if backward else 1.0) / rate / 1e12, 3 if backward else 1) if rate else _plain(gpu, op)
    )


def _published(gpu: Gpu, who: str, direction: str) -> float | None:
    """TFLOP/s at D = 128; of several, the highest."""
    rates = [
        f.value
        for f in published.figures()
        if (f.who, f.gpu, f.what, f.clock) == (who, gpu.name, f"attention {direction}", None)
        and (f.sizes["S"], f.sizes["D"]) == (S, 128)
    ]
    return max(rates, default=None)


def our_timer(gpu: Gpu, hopper: bool, flash: str = "") -> Timer:
    """flash: whose published speed attention takes, in place of ours."""

    def time(op: Op, backward: bool) -> Time:
        if "attention" in op.name and flash:
            return _attention(gpu, op, backward, flash)
        direction = "backward" if backward else "forward"
        if "attention" in op.name:
            made = ours.attention_estimate(gpu, _shape(), direction, hopper)
        elif op.name.startswith("llama_kernels."):
            made = ours.work_estimate(gpu, _work(op), direction)
        else:
            return _plain(gpu, op)
        return Time(made.seconds - (len(made.parts) - 1) * attention_constants().launch, len(made.parts))

    cache: dict[tuple[str, int, bool], Time] = {}
    return lambda op, backward: cache.setdefault((op.name, op.bytes, backward), time(op, backward))


def liger_timer(gpu: Gpu, flash: str, peers: Path) -> Timer:
    """Liger's kernels in place of ours. Its backward of RMSNorm goes over the rows of an SM one after another."""
    rows = {"M": B * S, "N": MODELS[NAME].hidden, "dtype": torch.bfloat16, "weight": torch.bfloat16}

    def time(op: Op, backward: bool) -> Time:
        if "attention" in op.name:
            return _attention(gpu, op, backward, flash)
        if op.name.startswith("llama_kernels.rms_norm"):
            walk = Walk(-(-rows["M"] // gpu.sms), -(-rows["M"] // gpu.sms)) if backward else Walk()
            one = row_peers.liger_rms_norm_backward if backward else row_peers.liger_rms_norm
            kernel = one(peers, gpu.family, **rows)[0]
            return Time(memory.estimate(gpu, kernel, op.bytes, walk).seconds, 1 + backward)
        if op.name.startswith("llama_kernels.rope"):
            m = MODELS[NAME]
            kernel = row_peers.liger_rope(peers, gpu.family, B, S, m.heads, m.kv_heads, m.head_dim)[0]
            return Time(memory.estimate(gpu, kernel, op.bytes).seconds)
        return _plain(gpu, op)

    return time


def _shape() -> Shape:
    m = MODELS[NAME]
    return Shape(B, S, m.heads, m.kv_heads, m.head_dim)


def _work(op: Op) -> RMSNorm | Rope:
    m = MODELS[NAME]
    if op.name.startswith("llama_kernels.rope"):
        return Rope(shape="", B=B, S=S, Hq=m.heads, Hkv=m.kv_heads, D=m.head_dim)
    rows = 2 * B * S * m.hidden  # bytes
    kind = AddRMSNorm if op.bytes > 3.5 * rows else RMSNorm
    return kind(shape="", M=B * S, N=m.hidden)
