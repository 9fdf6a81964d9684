"""Loads, stores and atomics of the machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from .global_memory import CONTAINER, pack, unpack
from .program import SHARED_BASE
from .state import State

COMBINE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
           "xor": np.bitwise_xor}  # fmt: skip


class GlobalAccess(State):
    def _global(self, k: int, address: np.ndarray, size: int, chosen: np.ndarray | None) -> np.ndarray:
        """The process's addresses, checked."""
        address = self._full(address)
        if chosen is not None:
            address = address[chosen]

        def fault(what: str, i: int) -> None:
            self.fault(k, what, i if chosen is None else int(chosen[i]))

        return self.memory.check(address, size, fault)

    def load_global(
        self, k: int, address: np.ndarray, dtype: Any, count: int, M: np.ndarray | None
    ) -> list[np.ndarray]:
        chosen, size = self._chosen(M), dtype.itemsize * count
        if chosen is not None and not len(chosen):
            return [np.zeros(self.lanes, dtype)] * count
        real = self._global(k, address, size, chosen)
        self.report.counts["global bytes read"] += size * len(real)
        return self._spread(self.memory.load(real, size), dtype, count, chosen)

    def _spread(self, containers: np.ndarray, dtype: Any, count: int, chosen: np.ndarray | None) -> list[np.ndarray]:
        """Values of some lanes as arrays of all; the others have NaN."""
        values = unpack(containers, dtype, count)
        if chosen is None:
            return values
        out = [np.full(dtype.itemsize * self.lanes, 0xFF, "u1").view(dtype) for _ in values]
        for to, x in zip(out, values, strict=True):
            to[chosen] = x
        return out

    def store_global(self, k: int, address: np.ndarray, values: list[np.ndarray], M: np.ndarray | None) -> None:
        chosen, size = self._chosen(M), values[0].itemsize * len(values)
        if chosen is not None and not len(chosen):
            return
        containers = pack(values, self.lanes, size)
        real = self._global(k, address, size, chosen)
        self.report.counts["global bytes written"] += size * len(real)
        self.memory.store(real, size, containers if chosen is None else containers[chosen])

    def atomic(
        self, k: int, address: np.ndarray, operands: list[list[np.ndarray]], how: str, M: np.ndarray | None
    ) -> list[np.ndarray]:
        """Lane after lane. Of cas the operands are what it compares with, and the new values."""
        out = []
        chosen = self._chosen(M)
        lanes = np.arange(self.lanes) if chosen is None else chosen
        address = self._full(address)
        for j, value in enumerate(operands[-1]):
            each = value.itemsize
            value, old = self._full(value), np.zeros(self.lanes, value.dtype)
            compared = self._full(operands[0][j])
            if len(lanes):
                places = self._global(k, address + np.uint64(j * each), each, chosen)
                self.report.counts["global atomics"] += len(places)
                for lane, place in zip(lanes, places, strict=True):
                    now = self.memory.load(place[None], each).view(value.dtype)
                    old[lane], x = now[0], value[lane : lane + 1]
                    if how == "cas":
                        new = x if now[0] == compared[lane] else now
                    else:
                        new = x if how == "exch" else COMBINE[how](now, x)
                    self.memory.store(place[None], each, new.view(CONTAINER[each]))
            out.append(old)
        return out


class SharedAccess(GlobalAccess):
    def _shared(self, k: int, address: np.ndarray, size: int, chosen: np.ndarray | None) -> np.ndarray:
        """Places, checked."""
        places = self._full(address).astype("i8") - SHARED_BASE
        base = self.base
        if chosen is not None:
            places, base = places[chosen], base[chosen]
        bad = (places < 0) | (places + size > self.shared.size) | (places & (size - 1) != 0)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            what = "misaligned" if 0 <= places[i] <= self.shared.size - size else "out of bounds"
            what = f"{what}: {size} bytes at byte {int(places[i])} of shared memory, which has {self.shared.size} bytes"
            self.fault(k, what, i if chosen is None else int(chosen[i]))
        return places + base

    def _count_banks(self, lanes: np.ndarray, places: np.ndarray, size: int) -> None:
        """A pass serves one 4-byte word of each of 32 banks, to 32 lanes, or to 16 or 8 of 8 or 16 bytes each."""
        if not self.checks.banks:
            return
        group, each = lanes // (32 if size <= 4 else 128 // size), max(1, size // 4)
        words = (places[:, None] // 4 + np.arange(each)).reshape(-1)
        _, group = np.unique(np.repeat(group, each), return_inverse=True)
        pairs = np.unique(group << 40 | words)
        group, words = pairs >> 40, pairs & (1 << 40) - 1
        passes = np.bincount(group * 32 + words % 32, minlength=32 * (group.max() + 1)).reshape(-1, 32).max(1)
        self.report.counts["shared passes"] += int(passes.sum())
        self.report.counts["shared passes without conflicts"] += len(passes)

    def _check_read(
        self, k: int, places: np.ndarray, size: int, warps: np.ndarray, used: tuple[np.ndarray, int] | None = None
    ) -> None:
        """used: places and size of the elements whose value is used later; None: all."""
        at = (places, size) if used is None else used
        if self.shared.states(places, size).any() and self.shared.states(*at).any():
            pending = self.shared.is_pending(*at)
            what = "an asynchronous copy is yet to write" if pending else "nothing has written"
            self.finding(k, f"read of shared memory that {what}")
        if self.races:
            self._race(k, self.races.read(warps, places, size))

    def _check_write(self, k: int, places: np.ndarray, size: int) -> None:
        if self.shared.is_pending(places, size):
            self.finding(k, "write of shared memory that an asynchronous copy is yet to write")
        if self.shared.async_reads_any and self.shared.async_reads[places // 16].any():
            self.finding(k, "write of shared memory that is still being read")

    def _race(self, k: int, found: str | None) -> None:
        if found:
            self.finding(k, f"race in shared memory, {found}")

    def _unfence(self, warps: np.ndarray, places: np.ndarray) -> None:
        """Asynchronous units see what these warps wrote here, at most 16 bytes each, behind a fence.proxy.async."""
        if self.clocks:
            self.clocks.store_clock[warps, places // 16] = self.clocks.clock[warps, warps]
        elif self.program.asynchronous:
            self.shared.unfenced.reshape(-1)[warps * (self.shared.size // 16) + places % self.shared.size // 16] = 1

    def _store(self, k: int, warps: np.ndarray, places: np.ndarray, size: int, containers: np.ndarray) -> None:
        """By st or stmatrix, which asynchronous units see only behind a fence.proxy.async."""
        shared = self.shared
        self._check_write(k, places, size)
        self.report.counts["shared bytes written"] += size * len(places)
        self._unfence(warps, places)
        if self.races:
            self._race(k, self.races.write(warps, places, size, containers))
        shared.store(places, size, containers)

    def load_shared(
        self, k: int, address: np.ndarray, dtype: Any, count: int, M: np.ndarray | None, used: tuple[int, ...]
    ) -> list[np.ndarray]:
        """used: the elements of the vector that an instruction reads."""
        chosen, size = self._chosen(M), dtype.itemsize * count
        if chosen is not None and not len(chosen):
            return [np.zeros(self.lanes, dtype)] * count
        places = self._shared(k, address, size, chosen)
        self.report.counts["shared bytes read"] += size * len(places)
        self._count_banks(np.arange(self.lanes) if chosen is None else chosen, places, size)
        each = dtype.itemsize
        needed = np.concatenate([places + i * each for i in used]) if used else places[:0]
        self._check_read(k, places, size, self._warp_of(chosen), (needed, each))
        return self._spread(self.shared.load(places, size), dtype, count, chosen)

    def store_shared(self, k: int, address: np.ndarray, values: list[np.ndarray], M: np.ndarray | None) -> None:
        chosen, size = self._chosen(M), values[0].itemsize * len(values)
        if chosen is not None and not len(chosen):
            return
        containers = pack(values, self.lanes, size)
        places = self._shared(k, address, size, chosen)
        self._count_banks(np.arange(self.lanes) if chosen is None else chosen, places, size)
        self._store(k, self._warp_of(chosen), places, size, containers if chosen is None else containers[chosen])

    # --- matrices of 8 x 8 16-bit elements ------------------------------------------------------------------------

    def _matrix_rows(
        self, k: int, address: np.ndarray, count: int, M: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places of matrix i's rows, whose addresses lanes 8 i to 8 i + 7 hold: (warps, count, 8); and the warps."""
        self._whole_warps(k, M)
        M = self._mask(M)
        warps = np.arange(self.lanes // 32) if M is None else np.flatnonzero(M.reshape(-1, 32)[:, 0])
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        places = self._shared(k, self._full(address), 16, lanes)
        return places.reshape(len(warps), count, 8), warps

    def load_matrix(
        self, k: int, address: np.ndarray, count: int, transposed: bool, M: np.ndarray | None
    ) -> list[np.ndarray]:
        rows, warps = self._matrix_rows(k, address, count, M)
        if not len(warps):
            return [np.zeros(self.lanes, "u4")] * count
        self.report.counts["shared bytes read"] += 16 * rows.size
        self._count_banks(np.arange(rows.size), rows.reshape(-1), 16)  # 8 rows of 16 bytes are a pass
        self._check_read(k, rows.reshape(-1), 16, np.repeat(warps, 8 * count))
        tiles = self.shared.load(rows.reshape(-1), 16).view("u2").reshape(-1, count, 8, 8)  # warp, matrix, row, column
        tiles = tiles.transpose(1, 0, 3, 2) if transposed else tiles.transpose(1, 0, 2, 3)
        values = np.ascontiguousarray(tiles).view("u4").reshape(count, -1)  # lane 4 g + t: row g, columns 2 t, 2 t + 1
        if len(warps) * 32 == self.lanes:
            return list(values)
        out = np.full((count, self.lanes // 32, 32), 0xFFFFFFFF, "u4")
        out[:, warps] = values.reshape(count, -1, 32)
        return list(out.reshape(count, -1))

    def store_matrix(
        self, k: int, address: np.ndarray, values: list[np.ndarray], transposed: bool, M: np.ndarray | None
    ) -> None:
        count = len(values)
        rows, warps = self._matrix_rows(k, address, count, M)
        if not len(warps):
            return
        tiles = np.stack([self._full(x) for x in values]).view("u2").reshape(count, -1, 8, 8)[:, warps]
        tiles = tiles.transpose(1, 0, 3, 2) if transposed else tiles.transpose(1, 0, 2, 3)
        containers = np.ascontiguousarray(tiles).reshape(-1).view("c16")
        self._count_banks(np.arange(rows.size), rows.reshape(-1), 16)
        self._store(k, np.repeat(warps, 8 * count), rows.reshape(-1), 16, containers)
