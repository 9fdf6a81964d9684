"""cp.async: a copy from global into shared memory lands when it is waited for, and not before."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .access import SharedAccess
from .shared_memory import PENDING


@dataclasses.dataclass
class Copy:
    """One cp.async of some lanes."""

    k: int
    lanes: np.ndarray
    group: np.ndarray  # which of a lane's groups it belongs to
    places: np.ndarray
    warps: np.ndarray
    size: int
    values: np.ndarray

    def of(self, chosen: np.ndarray) -> Copy:
        return dataclasses.replace(
            self, lanes=self.lanes[chosen], group=self.group[chosen], places=self.places[chosen],
            warps=self.warps[chosen], values=self.values[chosen],
        )  # fmt: skip


class Copies(SharedAccess):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.lanes, "i8")  # groups of each lane

    def copy_async(
        self, k: int, address: np.ndarray, source: np.ndarray, size: int, given: np.ndarray, M: np.ndarray | None
    ) -> None:
        """`given` bytes are read, the rest of `size` is zeros."""
        chosen = self._chosen(M)
        lanes = np.arange(self.lanes) if chosen is None else chosen
        if not len(lanes):
            return
        places, warps = self._shared(k, address, size, chosen), self.warp[lanes]
        self._check_write(k, places, size)
        if self.races:
            self._race(k, self.races.about_to_write(warps, places, size))
        given, source = self._full(given)[lanes], self._full(source)[lanes]
        whole = given == size
        if not (whole | (given == 0)).all():
            raise NotImplementedError(f"a cp.async of a part of its bytes: {self.program.code[k]}")
        values = np.zeros(len(lanes), f"u{size}" if size < 16 else "c16")
        if whole.any():
            real = self.memory.check(source[whole], size, lambda what, i: self.fault(k, what, int(lanes[whole][i])))
            values[whole] = self.memory.load(real, size)
            self.report.counts["global bytes read"] += size * len(real)
        self.report.counts["shared bytes written"] += size * len(lanes)
        self.copies.append(Copy(k, lanes, self.committed[lanes], places, warps, size, values))
        self.shared.set_pending(places, size)

    def commit_copies(self, M: np.ndarray | None) -> None:
        self.committed = self.committed + (1 if M is None else M)

    def wait_copies(self, left: int, everything: bool, M: np.ndarray | None) -> None:
        """Land all but the last `left` groups of these lanes."""
        M, kept = self._mask(M), []
        for each in self.copies:
            done = each.group < self.committed[each.lanes] - left
            if everything:
                done = np.ones(len(each.lanes), bool)
            if M is not None:
                done &= M[each.lanes]
            if done.all():
                self._land(each)
            elif done.any():
                self._land(each.of(done))
                kept.append(each.of(~done))
            else:
                kept.append(each)
        self.copies = kept

    def _land(self, copy: Copy) -> None:
        if self.checks.fenced_copies:
            self._unfence(copy.warps, copy.places)
        if self.races:
            self._race(copy.k, self.races.write(copy.warps, copy.places, copy.size, copy.values))
        self.shared.store(copy.places, copy.size, copy.values)

    def _unfinished_copies(self) -> None:
        for each in self.copies:
            if (self.shared.states(each.places, each.size) & PENDING).any():
                self.finding(each.k, "a cp.async is not waited for")
