"""Guards around tensors: a read or a write out of bounds shows, and so does a changed input."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from unittest import mock

import torch

_BAND = 256  # elements of NaN before and after


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` with its strides, between NaN. A kernel that reads past its ends has NaN in its result."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    fill = math.nan if x.dtype.is_floating_point else torch.iinfo(x.dtype).max
    buffer = torch.full((extent + 2 * _BAND,), fill, dtype=x.dtype, device=x.device)
    inner = buffer.as_strided(x.shape, x.stride(), _BAND)
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())
    with torch.no_grad():
        inner[once].copy_(x[once])
    return inner.requires_grad_(x.requires_grad)


@contextlib.contextmanager
def guarded_allocations() -> Iterator[None]:
    """Allocations inside lie between guards. Raise on leaving where a guard was written to."""
    buffers: list[tuple[torch.Tensor, int]] = []
    new_empty = torch.Tensor.new_empty

    def allocate(
        shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
        buffer = torch.zeros(extent + 2 * _BAND, dtype=dtype, device=device)
        if dtype.is_floating_point:
            buffer[_BAND : _BAND + extent] = math.nan
        buffer[:_BAND] = buffer[_BAND + extent :] = 7
        buffers.append((buffer, extent))
        return buffer.as_strided(shape, strides, _BAND)

    def guarded_new_empty_strided(self, shape, strides, *, dtype=None):
        return allocate(tuple(shape), tuple(strides), dtype or self.dtype, self.device)

    def guarded_new_empty(self, *shape, dtype=None, **elsewhere):
        if elsewhere:  # not a launcher's: Triton's interpreter allocates too
            return new_empty(self, *shape, dtype=dtype, **elsewhere)
        shape = tuple(shape[0]) if shape and isinstance(shape[0], (tuple, list, torch.Size)) else tuple(shape)
        strides = torch.empty(shape, device="meta").stride()
        return allocate(shape, strides, dtype or self.dtype, self.device)

    with (
        mock.patch.object(torch.Tensor, "new_empty_strided", guarded_new_empty_strided),
        mock.patch.object(torch.Tensor, "new_empty", guarded_new_empty),
    ):
        yield
    for buffer, extent in buffers:
        untouched = (buffer[:_BAND] == 7).all() and (buffer[_BAND + extent :] == 7).all()
        assert untouched, f"written outside of an allocation of {extent} elements"


def relaid(x: torch.Tensor, seed: int | None) -> torch.Tensor:
    """`x` with its leading dimensions in another memory order, and random strides of dimensions of one element.
    With seed None, `x` itself."""
    if seed is None or not x.numel():
        return x
    generator = torch.Generator().manual_seed(seed)
    order = [*torch.randperm(x.ndim - 1, generator=generator).tolist(), x.ndim - 1]
    dense = x.detach().permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])
    strange = torch.randint(0, 10**8, (x.ndim,), generator=generator).tolist()
    strides = [s if n > 1 else t for n, s, t in zip(x.shape[:-1], dense.stride(), strange, strict=False)]
    return dense.as_strided(x.shape, (*strides, 1)).requires_grad_(x.requires_grad)


def memory_order(x: torch.Tensor) -> list[int]:
    """The strides, except of dimensions of one element, which may have any."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


@contextlib.contextmanager
def unchanged(*tensors: torch.Tensor | None) -> Iterator[None]:
    """Raise on leaving where one of `tensors` has changed."""
    before = [None if x is None else x.detach().clone() for x in tensors]
    yield
    for i, (x, copy) in enumerate(zip(tensors, before, strict=True)):
        if x is not None:
            assert torch.equal(x.detach().nan_to_num(nan=1.5), copy.nan_to_num(nan=1.5)), f"tensor {i} was changed"
