"""Shapes, strides and allocation: how tensors lie in memory, and tensors allocated in the memory order of another."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from llama_kernels.core.device import KERNEL_DEVICES


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is not under `n`, from 1 on."""
    return 1 << max(n - 1, 0).bit_length()


def empty_in_order_of(
    x: torch.Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Uninitialised and dense, its dimensions nested in memory as those of `x` are, the last one innermost."""
    shape = tuple(x.shape if shape is None else shape)
    try:
        strides = _dense_strides(shape, x.stride())
    except TypeError:  # sizes that are symbols, while tracing, have no hash
        strides = _dense_strides.__wrapped__(shape, x.stride())
    return torch.empty_strided(shape, strides, dtype=dtype or x.dtype, device=x.device)


@functools.lru_cache(maxsize=1024)
def _dense_strides(shape: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    outer_to_inner = sorted(range(len(shape) - 1), key=lambda d: like[d] or math.inf, reverse=True)
    strides = [1] * len(shape)
    step = max(shape[-1], 1)
    for d in reversed(outer_to_inner):
        strides[d] = step
        step = step * max(shape[d], 1)
    return tuple(strides)


def sizes_of(x: torch.Tensor) -> tuple[int, int, int]:
    """B, H, S of dense (B, H, S, D); packed (T, H, D) is one batch of T tokens."""
    shape = x.shape
    return (shape[0], shape[1], shape[2]) if len(shape) == 4 else (1, shape[1], shape[0])


def strides_of(x: torch.Tensor) -> tuple[int, int, int]:
    """Of batch, head and token, dense or packed."""
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, strides[1], strides[0])


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` itself when its last dimension is contiguous, else a copy: kernels take any other strides as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on `device`, or None where it is off."""
    if device.type not in KERNEL_DEVICES:  # for some torch has no autocast, and would raise
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
