"""Estimates of causal attention with a window. They are not calibrated: no published speed of one is compared."""

from __future__ import annotations

import functools

import torch

from bench.attention_options import attention_options
from bench.estimate import attention
from bench.estimate import tiles as tiling
from bench.estimate.constants import Gpu
from bench.estimate.constants import attention as attention_constants
from bench.estimate.kernels import Kernel, compiled
from bench.estimate.result import Estimate, new_name, together
from bench.estimate.tiles import Shape
from bench.works.attention import pairs
from llama_kernels.core.registry import KERNELS

_PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}  # of a kernel
_KIND = "windows"


def window_flops(shape: Shape, left: int) -> float:
    """The FLOPs of a forward's two products, for the pairs that the mask leaves."""
    return 4.0 * shape.B * shape.Hq * pairs(shape.S, left) * shape.D


def window_estimate(gpu: Gpu, shape: Shape, left: int, direction: str) -> Estimate:
    """The time of the portable kernels. left: keys that a row sees before its own."""
    parts: dict[str, Estimate] = {}
    kernels = _kernels(gpu.family, shape.D, shape.group, left, direction)
    for kernel in kernels:
        name = kernel.name.removesuffix("_kernel")
        if name in _PRODUCTS:
            first = attention.bytes_for_delta(kernel, kernels, shape.D)
            made = _of_kernel(gpu, kernel, name, shape, left, first)
        else:  # delta reads out and do
            bytes_ = 4.0 * shape.B * shape.Hq * shape.S * shape.D
            made = Estimate(bytes_ / (gpu.copy * 1e9), "dram", 0.0)
        parts[new_name(parts, name)] = made if not parts else made.later(attention_constants().launch)
    return together(parts)


def _of_kernel(gpu: Gpu, kernel: Kernel, name: str, shape: Shape, left: int, first: float) -> Estimate:
    (M, N), S, D = kernel.tile, shape.S, shape.D
    if name == "dkdv":
        tiles = tiling.of_rows_that_see(S, left, M, N, shape.B * shape.Hkv, shape.group)
    else:
        tiles = tiling.of_seen_keys(S, S, left, M, N, shape.B * shape.Hq)
    read = tiling.steps(tiles) * (M if name == "dkdv" else N) * D * 2 * 2
    flops = window_flops(shape, left) / 2 * _PRODUCTS[name]
    return attention.kernel_estimate(gpu, kernel, tiles, flops=flops, l2_bytes=read, kind=_KIND, first=first)


@functools.cache
def _kernels(family: str, D: int, group: int, left: int, direction: str) -> list[Kernel]:
    S = 8192
    q, k = (torch.empty(1, S, H, D, dtype=torch.bfloat16).transpose(1, 2) for H in (2 * group, 2))
    rest = attention_options(S, S, D**-0.5, left=left)
    if direction == "forward":
        return compiled(family, lambda: KERNELS["attention_forward"](q, k, k, *rest))
    lse, wanted = torch.empty(1, 2 * group, S), (True, True, True, False, None)
    return compiled(family, lambda: KERNELS["attention_backward"](q, None, q, k, k, q, lse, *rest, *wanted))
