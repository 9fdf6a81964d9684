"""Shared memory of the thread blocks (CTAs) that run at once, and what is known of each pair of bytes.

Places are flat: bytes from the first CTA's first. State is kept for each two bytes, since no type here is narrower but
for 8-bit ones, whose neighbours then count as one place.
"""

from __future__ import annotations

import numpy as np

from .global_memory import CONTAINER

PENDING, UNDEFINED = 1, 2  # an asynchronous copy is yet to write it; nothing has written it
_WIDE = {1: ("u1", 1, 2), 2: ("u1", 1, 2), 4: ("u2", 0x0101, 4), 8: ("u4", 0x01010101, 8),
         16: ("u8", 0x0101010101010101, 16)}  # fmt: skip


def wide(size: int) -> tuple[str, int, int]:
    """How to see the state of `size` bytes as one number: its type, a one in each byte, the bytes of memory."""
    return _WIDE[size]


class Shared:
    """`size` bytes for each of `ctas` thread blocks of `warps` warps, filled with NaN."""

    def __init__(self, ctas: int, warps: int, size: int) -> None:
        self.size = size = max(-(-size // 16) * 16, 16)
        self.ctas, self.warps = ctas, warps
        self.bytes = np.full(ctas * size, 0xFF, "u1")
        self.views = {n: self.bytes.view(dtype) for n, dtype in CONTAINER.items()}
        self.state = np.full(ctas * size // 2, UNDEFINED, "u1")
        self.async_reads = np.zeros(ctas * size // 16, "i2")  # how many wgmma and copies are reading 16 bytes
        self.async_reads_any = 0
        self.unfenced = np.zeros((ctas, warps, size // 16), "u1")  # a warp's stores that no fence.proxy.async followed

    def load(self, places: np.ndarray, size: int) -> np.ndarray:
        return self.views[size][places // size]

    def store(self, places: np.ndarray, size: int, containers: np.ndarray) -> None:
        self.views[size][places // size] = containers
        dtype, _, unit = _WIDE[size]
        self.state.view(dtype)[places // unit] = 0

    def states(self, places: np.ndarray, size: int) -> np.ndarray:
        """0 where everything is defined and nothing is pending."""
        dtype, _, unit = _WIDE[size]
        return self.state.view(dtype)[places // unit]

    def is_pending(self, places: np.ndarray, size: int) -> bool:
        states = self.states(places, size)
        return bool(states.any() and (states & states.dtype.type(PENDING * _WIDE[size][1])).any())

    def set_pending(self, places: np.ndarray, size: int) -> None:
        dtype, ones, unit = _WIDE[size]
        self.state.view(dtype)[places // unit] = PENDING * ones

    def busy(self, chunks: np.ndarray, by: int) -> None:
        """An asynchronous unit begins (1) or ends (-1) to read these 16 bytes each."""
        self.async_reads[chunks] += by
        self.async_reads_any += by
