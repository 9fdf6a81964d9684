"""Estimates of attention over packed documents: programs without work are counted beside those that have some.

How many programs a kernel launches is read from its launch. What is more than the documents have tiles is empty.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from bench.estimate import attention
from bench.estimate import tiles as tiling
from bench.estimate.constants import Gpu
from bench.estimate.constants import attention as attention_constants
from bench.estimate.errors import error_of
from bench.estimate.kernels import Kernel, compiled
from bench.estimate.result import Estimate, new_name, together
from bench.estimate.tiles import Shape, Tile
from bench.works.attention import AttentionVarlen
from llama_kernels.core.registry import KERNELS

_FLOPS = {"forward": 1.0, "dq": 1.5, "dkdv": 2.0}  # products of a kernel, in those of a forward


def packed_estimate(gpu: Gpu, work: AttentionVarlen, direction: str) -> Estimate:
    """The time of a causal call without other options, by the portable kernels."""
    parts: dict[str, Estimate] = {}
    group = work.Hq // work.Hkv
    kernels = _kernels(gpu, work.lengths, group, work.D, direction)
    for kernel in kernels:
        name = kernel.name.removesuffix("_kernel")
        if name in _FLOPS:
            made = _kernel(gpu, kernel, work, attention.bytes_for_delta(kernel, kernels, work.D))
        else:  # delta, lists of tiles and other small ones: out and do are read
            elements = sum(work.lengths) * work.Hq * work.D
            bytes_ = 4 * elements if name == "delta" else 0
            made = Estimate(bytes_ / (gpu.copy * 1e9), "dram", error_of("rows", gpu.family))
        seconds = made.seconds + attention_constants().launch * bool(parts)
        parts[new_name(parts, name)] = dataclasses.replace(made, seconds=seconds)
    return together(parts)


def empty_programs(kernel: Kernel, live: int, heads: int) -> int:
    """How many programs have no work. kernel: a launch for one key head, repeated for each of `heads`.

    live: how many programs have work.
    """
    return max(kernel.launched * heads - live, 0)


def _kernel(gpu: Gpu, kernel: Kernel, work: AttentionVarlen, first: float) -> Estimate:
    BLOCK_M, BLOCK_N = kernel.tile
    shapes = [Shape(1, n, work.Hq, work.Hkv, work.D) for n in work.lengths]
    name = kernel.name.removesuffix("_kernel")
    tiles: list[Tile] = []
    for shape in shapes:
        if name == "dkdv":
            tiles += tiling.of_keys(shape, BLOCK_M, BLOCK_N, work.Hkv, shape.group)
        else:
            tiles += tiling.of_rows(shape, BLOCK_M, BLOCK_N, work.Hq)
    tiles.sort(key=lambda t: t.plain + t.masked, reverse=True)
    block = BLOCK_M if name == "dkdv" else BLOCK_N
    read = tiling.steps(tiles) * block * work.D * 2 * 2
    flops = _FLOPS[name] * sum(shape.flops for shape in shapes)
    kind = "packed forward" if name == "forward" else "packed backward"
    empty = empty_programs(kernel, attention.kernel_programs(tiles), work.Hkv)
    return attention.kernel_estimate(
        gpu, kernel, tiles, flops=flops, l2_bytes=read, kind=kind, empty=empty, first=first
    )


@functools.lru_cache(maxsize=16)
def _kernels(gpu: Gpu, lengths: tuple[int, ...], group: int, D: int, direction: str) -> list[Kernel]:
    """What a call with one key head launches."""
    tokens, longest = sum(lengths), max(lengths)
    q, k = (torch.empty(tokens, H, D, dtype=torch.bfloat16) for H in (group, 1))
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    rest = (None, None, None, starts, starts, longest, longest, D**-0.5, None, None, 0)
    if direction == "forward":
        return compiled(gpu.family, lambda: KERNELS["attention_forward"](q, k, k, *rest), gpu)
    lse, gradients = torch.empty(group, tokens), (True, True, True, False, None)
    backward = KERNELS["attention_backward"]
    return compiled(gpu.family, lambda: backward(q, None, q, k, k, q, lse, *rest, *gradients), gpu)
