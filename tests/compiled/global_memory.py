"""Global memory: each tensor argument is a region of its own, and nothing else may be touched.

The kernel is given addresses 16 TiB apart, one for each tensor argument, so an access that leaves a tensor never lands
in another one, however close they lie in the process. The machine turns them into the process's addresses.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CONTAINER = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}  # a NumPy type of each size of access
_APART = 2**44


class Fault(Exception):
    """An access or a synchronisation that is an error on any GPU, with the instruction and its source line."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A tensor argument."""

    name: str
    address: int  # as the kernel sees it
    real: int  # in this process
    bytes: int  # from the first element to the last
    itemsize: int = 1
    owned: np.ndarray | None = None  # which elements of that extent belong to the tensor; None: all

    @staticmethod
    def of(index: int, name: str, real: int, nbytes: int, itemsize: int = 1, owned: Any = None) -> Region:
        """The region of argument `index`; its address has the alignment of the process's, up to 4096 bytes."""
        return Region(name, (index + 1) * _APART + real % 4096, real, nbytes, itemsize, owned)


class _Address:
    def __init__(self, at: int, count: int, dtype: str) -> None:
        self.__array_interface__ = {"version": 3, "data": (at, False), "shape": (count,), "typestr": "<" + dtype}


_BASE = 4096  # NumPy takes no array at address 0
_ALL = {size: np.asarray(_Address(_BASE, 2**47 // size, dtype)) for size, dtype in CONTAINER.items()}


def pack(values: Sequence[np.ndarray], lanes: int, size: int) -> np.ndarray:
    """The values of a vector access, one container a lane."""
    out = np.empty((lanes, len(values)), values[0].dtype)
    for i, x in enumerate(values):
        out[:, i] = x
    return out.reshape(-1).view(CONTAINER[size])


def unpack(containers: np.ndarray, dtype: Any, count: int) -> list[np.ndarray]:
    flat = containers.view(dtype)
    return [flat] if count == 1 else list(np.ascontiguousarray(flat.reshape(-1, count).T))


class Global:
    """The regions that a launch may touch."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = sorted((r for r in regions if r.bytes), key=lambda r: r.address)
        self._begins = [r.address for r in self.regions]
        self._begin_array = np.array(self._begins, "u8")
        self._ends = np.array([r.address + r.bytes for r in self.regions], "u8")
        self._moves = np.array([(r.real - r.address) % 2**64 for r in self.regions], "u8")

    def check(self, addresses: np.ndarray, size: int, fault: Callable[[str, int], None]) -> np.ndarray:
        """Checked host addresses. `fault` is called with the error and the index of the address at fault."""
        if size > 1 and (addresses & np.uint64(size - 1)).any():
            i = int(np.flatnonzero(addresses & np.uint64(size - 1))[0])
            fault(f"misaligned address {int(addresses[i]):#x} of an access of {size} bytes", i)
        low, high = int(addresses.min()), int(addresses.max())
        i = bisect.bisect_right(self._begins, low) - 1
        if i >= 0 and high + size <= self._ends[i]:
            self._check_owned(self.regions[i], addresses, size, fault)
            return addresses + self._moves[i]
        at = np.searchsorted(self._begin_array, addresses, "right").astype("i8") - 1
        inside = at >= 0
        if self.regions:
            inside &= addresses + np.uint64(size) <= self._ends[at]
        if not inside.all():
            j = int(np.flatnonzero(~inside)[0])
            fault(self._outside(int(addresses[j]), size), j)
        for i in np.unique(at):
            here = np.flatnonzero(at == i)
            self._check_owned(self.regions[i], addresses[here], size, lambda what, j, here=here: fault(what, here[j]))
        return addresses + self._moves[at]

    def _check_owned(self, r: Region, addresses: np.ndarray, size: int, fault: Callable[[str, int], None]) -> None:
        if r.owned is None:
            return
        first = ((addresses - np.uint64(r.address)) // np.uint64(r.itemsize)).astype("i8")
        for i in range(max(1, size // r.itemsize)):
            if not (owned := r.owned[first + i]).all():
                j = int(np.flatnonzero(~owned)[0])
                fault(f"{size} bytes at {int(addresses[j]) - r.address} of {r.name}: between the tensor's elements", j)

    def _outside(self, address: int, size: int) -> str:
        if not self.regions:
            return f"out of bounds: {size} bytes at {address:#x}; the launch has no tensor"

        def distance(r: Region) -> int:
            return max(r.address - address, address + size - r.address - r.bytes)

        r = min(self.regions, key=distance)
        if distance(r) > _APART // 2:
            return f"out of bounds: {size} bytes at {address:#x}, which is no address of a tensor"
        at = address - r.address
        place = f"{-at} bytes before" if at < 0 else f"byte {at} of"
        return f"out of bounds: {size} bytes at {place} {r.name}, which has {r.bytes} bytes"

    @staticmethod
    def load(real: np.ndarray, size: int) -> np.ndarray:
        return _ALL[size][(real - np.uint64(_BASE)).view("i8") // size]

    @staticmethod
    def store(real: np.ndarray, size: int, containers: np.ndarray) -> None:
        _ALL[size][(real - np.uint64(_BASE)).view("i8") // size] = containers
