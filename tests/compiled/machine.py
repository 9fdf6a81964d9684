"""The scheduler: runs all lanes of some thread blocks to their end, basic block by basic block.

Every live lane stands at the beginning of a basic block. The first block that a lane can run is run for all lanes that
stand there, so lanes that part at a branch meet again behind it. With a seed warps run in an order drawn by chance.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .bulk import Bulk
from .global_memory import Fault


class Machine(Bulk):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.released = np.zeros(self.lanes, bool)  # lanes whose barrier let them go
        self.asleep = np.zeros(self.lanes, bool)  # lanes whose mbarrier's phase is not over, as far as is known
        self.asked: set[int] = set()  # the mbarriers that those wait for
        unit = 128 if self.program.has_wgmma else 32
        # Of a schedule drawn by chance: lanes that it keeps together, and who runs first, as far as it can go.
        self.units = np.arange(self.lanes) // unit
        self.priorities = list(range(-(-self.lanes // unit)))
        if self.random:
            self.random.shuffle(self.priorities)

    def run(self) -> None:
        self.program.namespace.update(self.program.poisoned())
        at: dict[int, np.ndarray] = {0: self.live}  # block -> lanes that stand at its beginning
        with np.errstate(all="ignore"):
            while at:
                b, here = self._next(at)
                rest = at.pop(b) & ~here
                if rest.any():
                    at[b] = rest
                self.released = self.released & ~here
                self._run_block(b, here, at)
                at.pop(len(self.program.blocks), None)
            self._unfinished_bulk()
        self._barrier_races(np.arange(self.ctas), "the end")
        self._unfinished_copies()

    def _run_block(self, b: int, here: np.ndarray, at: dict[int, np.ndarray]) -> None:
        """Run a block for these lanes, and send them on."""
        block = self.program.blocks[b]
        self.report.blocks[b] += int(here.reshape(-1, 32).any(1).sum())
        self.left = None
        self.polled.clear()
        taken = self.program.function(b, bool(at))(self, None if here.all() else here)
        if self.left is not None:
            self.live = self.live & ~(here & self.left)
            here = here & self.live
            if here.any():
                _join(at, b + 1, here)
        elif taken is None:
            _join(at, b + 1, here)
        elif block.table is not None:
            for i, target in enumerate(block.table):
                if (there := here & (taken == i)).any():
                    _join(at, target, there)
        else:
            yes = here & taken
            if yes.any():
                _join(at, block.target, yes)
            if (no := here & ~yes).any():
                _join(at, b + 1, no)
            if block.polls and (yes == here).all():
                self.asleep = self.asleep | here
                self.asked |= self.polled
                return
        self._wake()

    def _wake(self) -> None:
        """Something has happened: those who wait look again."""
        if self.asked:
            self.asleep = np.zeros(self.lanes, bool)
            self.asked.clear()

    # --- who runs next --------------------------------------------------------------------------------------------

    def _next(self, at: dict[int, np.ndarray]) -> tuple[int, np.ndarray]:
        """A block, and the lanes to run it for."""
        if self.random and self.loads and self.random.random() < 0.05:
            self.land(self.random.choice(self.loads))
            self._wake()
        while True:
            if found := self._runnable(at):
                return found
            if self._release(at):
                continue
            if not self.loads:
                where = [str(self.program.code[self.program.blocks[b].first]) for b in sorted(at)]
                raise Fault(f"{self.program.entry.name}: deadlock: all threads that are left wait at {where}")
            # A copy that somebody waits for; the others may take as long as they like.
            asked = [load for load in self.loads if load.barrier in self.asked] or self.loads
            self.land(self.random.choice(asked) if self.random else asked[0])
            self._wake()

    def _runnable(self, at: dict[int, np.ndarray]) -> tuple[int, np.ndarray] | None:
        blocks = self.program.blocks
        can = {}
        for b in sorted(at):
            lanes = at[b]
            if blocks[b].barrier:
                lanes = lanes & self.released
            elif blocks[b].polls and self.asked:
                lanes = lanes & ~self.asleep
            if lanes.any():
                if not self.random:
                    return b, lanes
                can[b] = lanes
        if not can:
            return None
        if self.random.random() < 0.1:
            self.random.shuffle(self.priorities)
        able = set(np.unique(self.units[functools.reduce(np.logical_or, can.values())]).tolist())
        chosen = self.units == next(unit for unit in self.priorities if unit in able)
        b = min(b for b, lanes in can.items() if (lanes & chosen).any())
        return b, can[b] & chosen

    def _release(self, at: dict[int, np.ndarray]) -> bool:
        """Open the barriers at which as many lanes stand as they are for."""
        waiting: dict[int, list[int]] = {}
        for b in at:
            if self.program.blocks[b].barrier:
                waiting.setdefault(self.program.blocks[b].barrier[0], []).append(b)
        live = self.live.reshape(self.ctas, -1).sum(1)
        opened = False
        for number, blocks in waiting.items():
            there = functools.reduce(np.logical_or, (at[b] for b in blocks))
            counts = {self.program.blocks[b].barrier[1] for b in blocks}
            if len(counts) > 1:
                raise Fault(f"{self.program.entry.name}: barrier {number} for different counts: {sorted(counts)}")
            arrived, count = there.reshape(self.ctas, -1).sum(1), counts.pop() or self.threads
            if (arrived > count).any():
                raise Fault(f"{self.program.entry.name}: {arrived.max()} threads at barrier {number} for {count}")
            ready = (arrived > 0) & (arrived >= np.minimum(live, count))
            if ready.any():
                opened = True
                there &= np.repeat(ready, self.threads)
                self.released = self.released | there
                if self.clocks:
                    if found := self.clocks.barrier(number, np.unique(self.warp[there])):
                        self.report.add(found)
                else:
                    first = self.program.code[self.program.blocks[blocks[0]].first]
                    self._barrier_races(np.flatnonzero(ready), str(first))
        return opened

    def _barrier_races(self, ctas: np.ndarray, where: str) -> None:
        if self.races and not self.clocks:
            for found in self.races.barrier(ctas):
                self.report.add(f"race in shared memory before {where}: {found}")


def _join(at: dict[int, np.ndarray], block: int, lanes: np.ndarray) -> None:
    at[block] = at[block] | lanes if block in at else lanes
