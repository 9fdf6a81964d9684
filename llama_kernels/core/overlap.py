"""Whether tensors that are written in place share elements, with other tensors or with themselves.

Two strided tensors share a byte if the distance between their first bytes is a sum of multiples of their strides, each
multiple within its size. That is searched for, from the largest stride to the smallest: in a few steps where the
dimensions are nested in memory, as in all views that slicing, splitting and transposing make. Where the search would
take longer, the answer is no. So a yes is certain: two elements were found at the same address.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

_MOST_STEPS = 4096  # a few milliseconds, once for each pair of layouts and distance between them: results are cached

_Sizes = tuple[int, ...]


def sharing_pair(tensors: Sequence[torch.Tensor], written: int) -> tuple[int, int] | None:
    """The indices of two of `tensors` that have an element in the same memory. None: there are no such two.

    The first of the two is among the first `written` tensors. All tensors are on one device. A tensor at address 0 has
    no data, as a DTensor, and shares none.
    """
    layouts = [(x.shape, x.stride(), x.itemsize) for x in tensors]
    starts = [x.data_ptr() for x in tensors]
    ends = [start + _extent(*layout) if start else 0 for start, layout in zip(starts, layouts, strict=True)]
    for i in range(written):
        for j in range(i + 1, len(tensors)):
            if starts[i] < ends[j] and starts[j] < ends[i] and _meet(layouts[i], layouts[j], starts[j] - starts[i]):
                return i, j
    return None


@functools.lru_cache(maxsize=1024)
def shares_with_itself(shape: _Sizes, strides: _Sizes) -> bool:
    """Whether two elements of a tensor of this shape and these strides are in the same memory."""
    if 0 in shape:
        return False
    steps = [_Step(stride, 1 - n, n - 1) for n, stride in zip(shape, strides, strict=True) if n > 1]
    steps.sort(reverse=True)
    # The first index that differs between the two elements is larger in one of them.
    return any(
        _reaches([step._replace(least=1), *steps[i + 1 :]], 0)  # the others before it are equal
        for i, step in enumerate(steps)
    )


@functools.lru_cache(maxsize=1024)
def _extent(shape: _Sizes, strides: _Sizes, itemsize: int) -> int:
    """Bytes from the first byte of a tensor to its last, included; 0 without elements."""
    if 0 in shape:
        return 0
    return itemsize * (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)))


class _Step(NamedTuple):
    """A stride, and how many times it may be taken."""

    stride: int
    least: int
    most: int


@functools.lru_cache(maxsize=1024)
def _meet(x: tuple[_Sizes, _Sizes, int], y: tuple[_Sizes, _Sizes, int], distance: int) -> bool:
    """Whether two layouts (shape, strides, itemsize), `distance` bytes apart, share a byte."""
    steps: dict[int, _Step] = {}
    for (shape, strides, itemsize), forward in ((x, True), (y, False)):
        in_bytes = [stride * itemsize for stride in strides]
        for n, stride in zip((*shape, itemsize), (*in_bytes, 1), strict=True):
            _, least, most = steps.get(stride, (stride, 0, 0))
            steps[stride] = _Step(stride, least - (0 if forward else n - 1), most + (n - 1 if forward else 0))
    steps.pop(0, None)  # expanded dimensions reach nothing new
    return _reaches(sorted(steps.values(), reverse=True), distance)


def _reaches(steps: Sequence[_Step], distance: int) -> bool:
    """Whether steps of these strides, the largest first, add up to `distance`; False if the search takes too long."""
    least, most = [0], [0]  # of all steps from an index on, the last index first
    for step in reversed(steps):
        least.append(least[-1] + step.stride * step.least)
        most.append(most[-1] + step.stride * step.most)
    searched = 0
    pending = [(0, distance)]
    while pending and searched < _MOST_STEPS:
        searched += 1
        i, left = pending.pop()
        if i == len(steps):
            if left == 0:
                return True
            continue
        stride, rest = steps[i].stride, len(steps) - 1 - i
        if stride == 0:
            pending.append((i + 1, left))
            continue
        first = max(steps[i].least, -((most[rest] - left) // stride))
        last = min(steps[i].most, (left - least[rest]) // stride)
        pending += ((i + 1, left - count * stride) for count in range(first, min(last, first + _MOST_STEPS) + 1))
    return False
