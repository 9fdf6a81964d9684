"""Shapes, strides and allocation of tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llama_kernels.core.device import KERNEL_DEVICES


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def empty_in_order_of(
    x: torch.Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An uninitialised dense tensor in the memory order of `x`, but with the last dimension innermost.

    shape, dtype: those of the tensor; None: those of `x`.
    """
    shape = x.shape if shape is None else tuple(shape)
    try:
        strides = _dense_strides(shape, x.stride())
    except TypeError:  # sizes that are symbols, while tracing, have no hash
        strides = _dense_strides.__wrapped__(shape, x.stride())
    return x.new_empty_strided(shape, strides, dtype=dtype)


@functools.lru_cache(maxsize=1024)
def _dense_strides(shape: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    outer_to_inner = sorted(range(len(shape) - 1), key=lambda d: like[d] or math.inf, reverse=True)
    strides = [1] * len(shape)
    step: Any = torch.sym_max(shape[-1], 1)  # an int, or while tracing perhaps a symbol without a value
    for d in reversed(outer_to_inner):
        strides[d] = step
        step = step * torch.sym_max(shape[d], 1)
    return tuple(strides)


def sizes_of(x: torch.Tensor) -> tuple[int, int, int]:
    """B, H, S of dense (B, H, S, D); packed (T, H, D) is one batch of T tokens."""
    shape = x.shape
    return (shape[0], shape[1], shape[2]) if len(shape) == 4 else (1, shape[1], shape[0])


def strides_of(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token, dense or packed.

    Raises:
        NotContiguous: the last dimension of x is not contiguous.
    """
    require_contiguous(x)
    strides = x.stride()
    return (strides[0], strides[1], strides[2]) if len(strides) == 4 else (0, strides[1], strides[0])


def optional_strides_of(x: torch.Tensor | None) -> tuple[int, int, int] | None:
    return None if x is None else strides_of(x)


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its last dimension is contiguous, otherwise a copy. The other strides may be any."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


class NotContiguous(ValueError):
    """The last dimension of a tensor is not contiguous. `registry.register` then runs the op on copies."""


def require_contiguous(*tensors: torch.Tensor | None) -> None:
    """Raise NotContiguous unless the last dimension of each tensor is contiguous, as kernels need it.

    Public functions pass such tensors. Exported graphs and calls of torch.ops.llama_kernels may pass others.
    """
    for x in tensors:
        # `contiguous` keeps the strides of an empty tensor, of which nothing is read.
        if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
            got = f"a tensor of shape {tuple(x.shape)} and strides {x.stride()}"
            raise NotContiguous(f"llama_kernels: the kernels need a contiguous last dimension; got {got}.")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on `device`; None: it is off."""
    if device.type not in KERNEL_DEVICES:  # for some torch has no autocast, and would raise
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class Rows(NamedTuple):
    """The rows of tensors with the same leading dimensions, in three dimensions; each tensor has its own strides."""

    tensors: tuple[torch.Tensor | None, ...]
    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    sizes: tuple[int, int]  # of the two inner dimensions
    strides: tuple[tuple[int, int, int] | None, ...]  # one for each tensor


MAX_ROW_DIMS = 3  # leading dimensions that a kernel takes


def rows_of(lead: torch.Tensor, *others: torch.Tensor | None) -> Rows:
    """The rows of `lead` and `others`. Leading dimensions are merged where the strides of all tensors allow it.

    Where more dimensions are left than a kernel takes, tensors that are not dense in the memory order of `lead` are
    copied. So a result must be dense in it (`is_dense_in_order_of`): otherwise a kernel would write to the copy.

    Raises:
        NotContiguous: the last dimension of a tensor with the dimensions of `lead` is not contiguous.
    """
    tensors = (lead, *others)
    require_contiguous(*(t for t in tensors if t is not None and t.ndim == lead.ndim))
    merged = _merged_rows(lead.shape[:-1], tuple(None if t is None else t.stride() for t in tensors))
    if merged is None:
        dense = (None if t is None else dense_in_order_of(lead, t) for t in others)
        return rows_of(dense_in_order_of(lead, lead), *dense)
    return Rows(tensors, *merged)


@functools.lru_cache(maxsize=1024)
def _merged_rows(
    shape: tuple[int, ...], strides: tuple[Any, ...]
) -> tuple[int, tuple[int, int], tuple[tuple[int, int, int] | None, ...]] | None:
    """count, sizes and strides of `Rows`, or None where more than three dimensions are left."""
    lead, present = strides[0], [s for s in strides if s is not None]
    merged: list[tuple[int, list[int]]] = []  # (size, strides of the tensors present), outermost first
    for d in sorted(range(len(shape)), key=lambda d: lead[d] or math.inf, reverse=True):
        size, steps = shape[d], [s[d] for s in present]
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    if len(merged) > MAX_ROW_DIMS:
        return None
    merged += [(1, [0] * len(present))] * (MAX_ROW_DIMS - len(merged))
    sizes, inner_steps = zip(*merged, strict=True)
    each = iter(zip(*inner_steps, strict=True))
    return math.prod(sizes), sizes[1:], tuple(None if s is None else next(each) for s in strides)


def is_dense_in_order_of(lead: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `x` is dense, its dimensions nested in memory as those of `lead` are."""
    return x.stride() == _dense_strides(tuple(x.shape), lead.stride())


def dense_in_order_of(lead: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x` itself where it is dense in the order of `lead`, else a copy that is."""
    return x if is_dense_in_order_of(lead, x) else empty_in_order_of(lead, x.shape, x.dtype).copy_(x)
