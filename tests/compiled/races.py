"""Finds races between warps in shared memory: two accesses to one place, one of them a write, that nothing orders.

A store of the value that is there already, by another warp, is no race: Triton lets several warps store copies of one
value. `BarrierRaces` is for kernels in which only barriers of the whole thread block order warps: there two accesses
are ordered if a barrier lies between them. `ClockRaces` is for all others, and follows named barriers and mbarriers
with vector clocks. Both find a race in any schedule that takes the same branches, not only where it changes the result.
`ClockRaces` also finds what a schedule could change without a race: who meets at a named barrier, which phase a wait on
an mbarrier gets, and whether an asynchronous read comes after a fence. So a launch of which it finds nothing executes
the same instructions on the same values in every schedule.

Agents are the warps, and each mbarrier for the copies that arrive on it.
"""

from __future__ import annotations

import numpy as np

from .shared_memory import Shared, wide


def _same(shared: Shared, places: np.ndarray, size: int, containers: np.ndarray) -> np.ndarray:
    """Which of these stores would change nothing."""
    bits = containers.view("u8" if size > 8 else containers.dtype).reshape(len(places), -1)
    return (shared.load(places, size).view(bits.dtype).reshape(bits.shape) == bits).all(1)


class BarrierRaces:
    """Two accesses race if no barrier of the whole thread block lies between them."""

    def __init__(self, shared: Shared) -> None:
        self.shared, size = shared, shared.size
        self.reads = np.zeros((shared.ctas, shared.warps, size // 2), "u1")  # since the last barrier
        self.writes = np.zeros((shared.ctas, shared.warps, size // 2), "u1")
        self.written = np.zeros(shared.ctas * size // 2, "u1")  # by any warp
        self._owner = np.zeros(shared.ctas * size, "i4")  # scratch

    def _mark(self, what: np.ndarray, warps: np.ndarray, places: np.ndarray, size: int) -> None:
        dtype, ones, unit = wide(size)
        what.reshape(-1).view(dtype)[(warps * self.shared.size + places % self.shared.size) // unit] = ones

    def read(self, warps: np.ndarray, places: np.ndarray, size: int) -> str | None:
        self._mark(self.reads, warps, places, size)
        return None

    def about_to_write(self, warps: np.ndarray, places: np.ndarray, size: int) -> str | None:
        """A copy that will write there was issued."""
        self._mark(self.writes, warps, places, size)
        return None

    def write(self, warps: np.ndarray, places: np.ndarray, size: int, containers: np.ndarray) -> str | None:
        """Store, and remember it."""
        shared = self.shared
        dtype, ones, unit = wide(size)
        written, at = self.written.view(dtype), places // size
        again = written[places // unit] == ones
        if again.any():
            again &= _same(shared, places, size, containers)
        self._owner[at] = warps
        twins = self._owner[at] != warps  # several warps, one place, one instruction
        shared.store(places, size, containers)
        agree = not twins.any() or bool(_same(shared, places, size, containers).all())
        new = ~(again | twins)
        self._mark(self.writes, warps[new], places[new], size)
        written[places // unit] = ones
        return None if agree else "warps store different values to one place"

    def barrier(self, ctas: np.ndarray) -> list[str]:
        """The races of these thread blocks since their last barrier. Then forget."""
        shared, found = self.shared, []
        reads, writes = self.reads.view("u8"), self.writes.view("u8")
        if len(ctas) < shared.ctas:
            reads, writes = reads[ctas], writes[ctas]
        wrote = np.bitwise_or.reduce(writes, axis=1)
        if wrote.any():
            once, twice = np.zeros_like(wrote), np.zeros_like(wrote)
            for w in range(shared.warps):
                touched = reads[:, w] | writes[:, w]
                twice |= once & touched
                once |= touched
            twice &= wrote
            if twice.any():
                i, slot = np.argwhere(np.ascontiguousarray(twice).view("u1"))[0]
                cta = int(ctas[i])
                found.append(
                    f"byte {2 * int(slot)}: warps {np.flatnonzero(self.writes[cta, :, slot]).tolist()} write, "
                    f"warps {np.flatnonzero(self.reads[cta, :, slot]).tolist()} read"
                )
        each = slice(None) if len(ctas) == shared.ctas else ctas
        self.reads[each] = 0
        self.writes[each] = 0
        self.written.reshape(shared.ctas, -1)[each] = 0
        return found


class ClockRaces:
    """Two accesses race if the second agent's vector clock does not cover the first access.

    One thread block. `clock[a, b]` is how much of agent b's past agent a is known to come after.
    equal_stores: whether a store of the value that is there already counts as a write.
    """

    MBARRIERS = 96

    def __init__(self, shared: Shared, equal_stores: bool = False) -> None:
        self.shared, self.warps, self.equal_stores = shared, shared.warps, equal_stores
        agents = shared.warps + self.MBARRIERS
        self.clock = np.zeros((agents, agents), "i4")
        self.clock[np.arange(agents), np.arange(agents)] = 1
        places = shared.size // 2
        self.writer = np.zeros(places, "i2")  # the agent of the last write
        self.write_clock = np.zeros(places, "i4")  # and its clock; 0: never
        self.read_clock = np.zeros((shared.warps, places), "i4")
        self.read_before = np.zeros((shared.warps, places), "i4")  # read_clock at the time of that write
        self.store_clock = np.zeros((shared.warps, shared.size // 16), "i4")  # of a warp's last store in 16 bytes
        self.fenced = np.zeros_like(self.clock)  # as clock, of what a fence.proxy.async lies behind
        self.meetings: dict[int, tuple[np.ndarray, int]] = {}  # of each named barrier: who met there last, and when

    def _each(self, agents: np.ndarray, places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Agent and place of each two bytes."""
        if size <= 2:
            return agents, places // 2
        at = (places[:, None] // 2 + np.arange(size // 2)).reshape(-1)
        return np.repeat(agents, size // 2), at

    def read(self, warps: np.ndarray, places: np.ndarray, size: int) -> str | None:
        agent, at = self._each(warps, places, size)
        late = self.write_clock[at] > self.clock[agent, self.writer[at]]
        self.read_clock[agent, at] = self.clock[agent, agent]
        return self._found(late, agent, at, "reads")

    def about_to_write(self, warps: np.ndarray, places: np.ndarray, size: int) -> str | None:
        return self._ordered(*self._each(warps, places, size))

    def _ordered(self, agent: np.ndarray, at: np.ndarray, same: np.ndarray | bool = False) -> str | None:
        """same: stores of the value that another warp's store left there, which may come before or after that store,
        but not before a read of the value before it."""
        late = (self.write_clock[at] > self.clock[agent, self.writer[at]]) & np.logical_not(same)
        if found := self._found(late, agent, at, "writes"):
            return found
        for w in range(self.warps):
            read_clock = np.where(same, self.read_before[w, at], self.read_clock[w, at])
            unseen = (read_clock > self.clock[agent, w]) & (agent != w)
            if unseen.any():
                i = int(np.flatnonzero(unseen)[0])
                return f"byte {2 * int(at[i])}: warp {w} reads, warp {int(agent[i])} writes"
        return None

    def _found(self, late: np.ndarray, agent: np.ndarray, at: np.ndarray, does: str) -> str | None:
        if not late.any():
            return None
        i = int(np.flatnonzero(late)[0])
        writer = int(self.writer[at[i]])
        by = f"warp {writer}" if writer < self.warps else "a copy"
        return f"byte {2 * int(at[i])}: {by} writes, warp {int(agent[i])} {does}"

    def write(self, warps: np.ndarray, places: np.ndarray, size: int, containers: np.ndarray) -> str | None:
        """Store, and remember it."""
        agent, at = self._each(warps, places, size)
        same = np.repeat(_same(self.shared, places, size, containers), max(1, size // 2))
        self.shared.store(places, size, containers)
        late = self.write_clock[at] > self.clock[agent, self.writer[at]]
        copies = late & same & (not self.equal_stores)  # of what another warp stored: it stays that warp's
        found = self._ordered(agent, at, copies)
        new, agent = at[~copies], agent[~copies]
        self.writer[new] = agent
        self.write_clock[new] = self.clock[agent, agent]
        self.read_before[:, new] = self.read_clock[:, new]
        if self.equal_stores:  # several warps, one place, one instruction
            found = found or self._found(self.writer[new] != agent, agent, new, "writes")
        return found or (
            None if _same(self.shared, places, size, containers).all() else "warps store different values to one place"
        )

    def copy_lands(self, places: np.ndarray, size: int, mbarrier: int, phase: int) -> None:
        """A copy wrote there, which whoever waits for this phase of the mbarrier comes after."""
        _, at = self._each(places, places, size)
        self.writer[at] = self.warps + mbarrier
        self.write_clock[at] = phase + 1

    # --- what orders ----------------------------------------------------------------------------------------------

    def barrier(self, number: int, warps: np.ndarray) -> str | None:
        """These warps have met at a barrier. Others may not do so while these could still be on their way there."""
        before, at = self.meetings.get(number, (warps, 0))
        found = None
        if strangers := [w for w in warps.tolist() if w not in before and self.clock[w, before[0]] < at]:
            found = f"warp {strangers[0]} may meet warps {before.tolist()} at barrier {number}"
        self.clock[warps] = self.clock[warps].max(0)
        self.fenced[warps] = self.fenced[warps].max(0)
        self.meetings[number] = warps, int(self.clock[warps[0], warps[0]])
        self.clock[warps, warps] += 1
        return found

    def fence(self, warps: np.ndarray) -> None:
        """A fence.proxy.async: asynchronous units see what these warps stored, and what they know of others' stores."""
        self.fenced[warps] = np.maximum(self.fenced[warps], self.clock[warps])
        self.clock[warps, warps] += 1

    def unfenced(self, warps: np.ndarray, chunks: np.ndarray) -> bool:
        """Whether some store in these 16 bytes each may have no fence before an asynchronous read by these warps."""
        return bool((self.store_clock[:, chunks].max(1) > self.fenced[warps, : self.warps].min(0)).any())

    def release(self, warp: int) -> np.ndarray:
        """What comes before the next thing that this warp does: rows of `clock` and of `fenced`."""
        past = np.stack([self.clock[warp], self.fenced[warp]])
        self.clock[warp, warp] += 1
        return past

    def acquire(self, warp: int, past: np.ndarray) -> None:
        self.clock[warp] = np.maximum(self.clock[warp], past[0])
        self.fenced[warp] = np.maximum(self.fenced[warp], past[1])
