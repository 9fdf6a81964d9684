"""Estimates of forwards of few rows and many keys: decoding, and a chunk of a prompt.

Decoding is estimated by the model of memory-bound kernels. A chunk is estimated by the model of attention, and the
kernel that adds up its parts by the model of memory-bound kernels. No known speed of a chunk can be compared.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from bench.attention_options import attention_options
from bench.estimate import attention, memory
from bench.estimate import tiles as tiling
from bench.estimate.constants import Gpu
from bench.estimate.constants import attention as attention_constants
from bench.estimate.kernels import Kernel, compiled
from bench.estimate.result import Estimate, together
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention import tables

_DECODING, _CHUNKS_OF_PROMPT = "decoding", "chunks of a prompt"  # kinds of estimates


@dataclasses.dataclass(frozen=True)
class Few:
    """B sequences of Sq causal rows with Sk keys, the rows the last; Hq query heads, Hkv key heads, heads of D."""

    B: int
    Sq: int
    Sk: int
    Hq: int
    Hkv: int
    D: int

    @property
    def flops(self) -> float:
        return 4.0 * self.B * self.Hq * self.D * (self.Sq * self.Sk - self.Sq * (self.Sq - 1) / 2)

    @property
    def bytes(self) -> float:
        """The bytes of k and v."""
        return 4.0 * self.B * self.Hkv * self.Sk * self.D


def few_rows_estimate(gpu: Gpu, few: Few, split: bool = True) -> Estimate:
    """split: False: as if the forward kernel did not split the keys; with few queries, they are always split."""
    one = dataclasses.replace(few, B=1)
    first, *rest = _kernels(gpu, one, split or few.Sq == 1)
    first = dataclasses.replace(first, grid=(first.launched * few.B,))
    make, kind = (_decode, _DECODING) if first.name == "decode_kernel" else (_forward, _CHUNKS_OF_PROMPT)
    parts = {first.name.removesuffix("_kernel"): make(gpu, first, few)}
    for combine in rest:
        combine = dataclasses.replace(combine, grid=(combine.launched * few.B,))
        written = 0.0 if (bytes_ := _bytes_of_parts(first, few)) < 0.5 * gpu.l2 else 2 * bytes_
        made = memory.estimate(gpu, combine, written, memory.Walk(waits=2.0), kind)
        parts["combine"] = made.later(attention_constants().launch)
    return together(parts)


def _chunks(kernel: Kernel, few: Few) -> int:
    programs = few.B * few.Hkv if kernel.name == "decode_kernel" else few.B * few.Hq * -(-few.Sq // kernel.tile[0])
    return kernel.launched // programs


def _bytes_of_parts(kernel: Kernel, few: Few) -> float:
    return 4.0 * few.B * few.Hq * few.Sq * few.D * _chunks(kernel, few)


def _decode(gpu: Gpu, kernel: Kernel, few: Few) -> Estimate:
    steps = few.Sk / _chunks(kernel, few) / kernel.constants["BLOCK_N"]
    stages = tables.tile(gpu.family, "decode", few.D, torch.bfloat16).num_stages
    walk = memory.Walk(trips=steps, steps=steps, ahead=stages - 1)
    return memory.estimate(gpu, kernel, few.bytes, walk, _DECODING)


def _forward(gpu: Gpu, kernel: Kernel, few: Few) -> Estimate:
    (M, N), chunks = kernel.tile, _chunks(kernel, few)
    keys = -(-few.Sk // chunks // 128) * 128
    tiles = [
        tile
        for first in range(0, few.Sk, keys)
        for tile in tiling.of_seen_keys(few.Sq, few.Sk, None, M, N, few.B * few.Hq, first, keys)
    ]
    read = tiling.steps(tiles) * N * few.D * 2 * 2
    return attention.kernel_estimate(gpu, kernel, tiles, flops=few.flops, l2_bytes=read, kind=_CHUNKS_OF_PROMPT)


@functools.lru_cache(maxsize=64)
def _kernels(gpu: Gpu, few: Few, split: bool) -> list[Kernel]:
    q, k = (torch.empty(1, S, H, few.D, dtype=torch.bfloat16).transpose(1, 2) for S, H in
            ((few.Sq, few.Hq), (few.Sk if split else min(few.Sk, 2048), few.Hkv)))  # fmt: skip
    rest = attention_options(few.Sq, k.shape[2], few.D**-0.5)
    return compiled(gpu.family, lambda: KERNELS["attention_forward"](q, k, k, *rest), gpu)
