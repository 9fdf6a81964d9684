"""Tensor descriptors, and copies that are on their way by one."""

from __future__ import annotations

import dataclasses

import numpy as np

_XOR = {0: 0, 1: 1, 2: 3, 3: 7}  # swizzle of none, 32, 64 and 128 bytes: bits 7 and up mixed into bits 4 and up


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A tensor, and the box of it that one copy moves. Dimensions outermost first, strides in elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    each: int  # bytes of an element
    swizzle: int
    dtype: str  # f4, f2 or bf16

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.each

    def elements(self, at: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The addresses of a box's elements, modulo 2^64, and which of them lie within the tensor."""
        address = np.full(self.box, self.address, "u8")
        inside = np.ones(self.box, bool)
        for axis, (begin, n, size, stride) in enumerate(zip(at, self.box, self.shape, self.strides, strict=True)):
            i = (begin + np.arange(n)).reshape([-1 if d == axis else 1 for d in range(len(self.box))])
            address = address + i.astype("u8") * np.uint64(stride * self.each % 2**64)
            inside = inside & (i >= 0) & (i < size)
        return address.reshape(-1), inside.reshape(-1)

    def places(self, start: int) -> np.ndarray:
        """The shared addresses of a box's elements, where the box begins at `start`."""
        at = start + self.each * np.arange(int(np.prod(self.box)))
        return at ^ ((at >> 7 & _XOR[self.swizzle]) << 4)


@dataclasses.dataclass(eq=False)
class Load:
    """A copy into shared memory that has not yet landed."""

    descriptor: Descriptor
    at: list[int]
    places: np.ndarray
    barrier: int  # place of its mbarrier
    k: int  # index of the instruction


@dataclasses.dataclass(eq=False)
class Store:
    """A copy, or a sum, out of shared memory that has not yet been read from there."""

    descriptor: Descriptor
    at: list[int]
    places: np.ndarray
    how: str  # store, or add
    lane: int
    group: int
    k: int
