"""mbarriers, and the tensor memory accelerator (TMA) that copies boxes of tensors by descriptors.

A copy into shared memory completes at a random moment, at the latest when no warp can continue without it. A copy out
of shared memory reads when it is waited for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .descriptors import Descriptor, Load, Store
from .program import SHARED_BASE
from .wgmma import Products


@dataclasses.dataclass
class Barrier:
    """An mbarrier. A phase completes when no arrival is pending and all expected bytes have been copied."""

    index: int
    count: int
    left: int  # arrivals of this phase
    bytes: int = 0  # expected, less landed
    phase: int = 0
    past: np.ndarray | None = None  # what comes before the arrivals (ClockRaces.release)
    over: np.ndarray | None = None  # of the last phase that is over
    fenced: bool = False  # a fence has made its initialisation visible to copies
    waited: dict[int, int] = dataclasses.field(default_factory=dict)  # who has waited for that phase, and when


class Bulk(Products):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.barriers: dict[int, Barrier] = {}  # by place
        self.loads: list[Load] = []
        self.stores: list[Store] = []
        self.bulk_groups = np.zeros(self.lanes, "i8")
        self.polled: set[int] = set()  # mbarriers that the running block found not yet over

    def _lanes_of(self, M: np.ndarray | None) -> list[int]:
        chosen = self._chosen(M)
        return list(range(self.lanes)) if chosen is None else chosen.tolist()

    # --- mbarriers ------------------------------------------------------------------------------------------------

    def _barrier(self, k: int, place: int, lane: int) -> Barrier:
        if place not in self.barriers:
            self.fault(k, f"no mbarrier was initialised at byte {place % self.shared.size} of shared memory", lane)
        return self.barriers[place]

    def _barrier_place(self, k: int, address: np.ndarray, lane: int) -> int:
        return int(self._shared(k, address, 8, np.array([lane]))[0])

    def _ordered_after_init(self, k: int, place: int, lane: int) -> None:
        """Who uses an mbarrier must come after its initialisation."""
        if self.clocks:
            reads = self.clocks.read_clock[:, place // 2 : place // 2 + 4].copy()
            self._race(k, self.clocks.read(self.warp[[lane]], np.array([place]), 8))
            self.clocks.read_clock[:, place // 2 : place // 2 + 4] = reads  # no plain read: nothing need follow it

    def barrier_init(self, k: int, address: np.ndarray, count: np.ndarray, M: np.ndarray | None) -> None:
        for lane in self._lanes_of(M):
            place, n = self._barrier_place(k, address, lane), int(self._full(count)[lane])
            if self.clocks:
                at = np.array([place])
                self._race(k, self.clocks.write(self.warp[[lane]], at, 8, np.array([k], "u8")))
            self.shared.store(np.array([place]), 8, np.zeros(1, "u8"))
            index = len(self.barriers) if place not in self.barriers else self.barriers[place].index
            if self.clocks and index >= self.clocks.MBARRIERS:
                raise NotImplementedError(f"more than {self.clocks.MBARRIERS} mbarriers: {self.program.code[k]}")
            past = np.zeros((2, len(self.clocks.clock)), "i4") if self.clocks else None
            self.barriers[place] = Barrier(index, n, n, past=past)

    def barrier_inval(self, k: int, address: np.ndarray, M: np.ndarray | None) -> None:
        for lane in self._lanes_of(M):
            place = self._barrier_place(k, address, lane)
            self._barrier(k, place, lane)
            if any(load.barrier == place for load in self.loads):
                self.finding(k, "an mbarrier that a copy is yet to arrive on is invalidated")

    def fence_barrier_init(self, M: np.ndarray | None) -> None:
        for barrier in self.barriers.values():
            barrier.fenced = True

    def fence_proxy(self, M: np.ndarray | None) -> None:
        super().fence_proxy(M)
        self.fence_barrier_init(M)

    def _column(self, barrier: Barrier) -> int:
        return self.warps + barrier.index

    def _step(self, k: int, barrier: Barrier) -> None:
        """Go on to the next phase if this one is over."""
        if barrier.left or barrier.bytes:
            return
        barrier.phase += 1
        barrier.left = barrier.count
        if self.clocks:
            late = [warp for warp, at in barrier.waited.items() if barrier.past[0, warp] < at]
            if late:
                self.finding(k, f"a phase of an mbarrier may be over before warp {late[0]} has waited for the last")
            barrier.waited.clear()
            barrier.past[0, self._column(barrier)] = barrier.phase
            barrier.over = barrier.past.copy()

    def _waited(self, k: int, barrier: Barrier, warp: int) -> None:
        """A warp has found a phase over. It must know of the phase before, whose parity is that of the phase after."""
        if barrier.over is not None:
            if self.clocks.clock[warp, self._column(barrier)] < barrier.phase - 1:
                self.finding(k, "a wait for an mbarrier may take an earlier phase for the one that it waits for")
            self.clocks.acquire(warp, barrier.over)
        barrier.waited[warp] = int(self.clocks.clock[warp, warp])

    def barrier_arrive(
        self, k: int, address: np.ndarray, count: np.ndarray, expect: bool, M: np.ndarray | None
    ) -> None:
        """`count` arrivals, or one arrival that expects `count` bytes."""
        for lane in self._lanes_of(M):
            place = self._barrier_place(k, address, lane)
            barrier = self._barrier(k, place, lane)
            self._ordered_after_init(k, place, lane)
            n = int(self._full(count)[lane])
            barrier.bytes += n if expect else 0
            barrier.left -= 1 if expect else n
            if barrier.left < 0:
                self.fault(k, "more threads arrive on an mbarrier than it counts", lane)
            if self.clocks:
                barrier.past = np.maximum(barrier.past, self.clocks.release(int(self.warp[lane])))
            self._step(k, barrier)

    def barrier_over(self, k: int, address: np.ndarray, parity: np.ndarray, M: np.ndarray | None) -> np.ndarray:
        """Whether the phase of this parity is over."""
        address, parity, out = self._full(address), self._full(parity), np.zeros(self.lanes, bool)
        lanes = np.array(self._lanes_of(M), "i8")
        places = self._shared(k, address, 8, lanes)
        for place in np.unique(places).tolist():
            at = lanes[places == place]
            barrier = self._barrier(k, place, int(at[0]))
            out[at] = (parity[at] & np.uint32(1)) != barrier.phase % 2
            for warp in np.unique(self.warp[at]).tolist():
                self._ordered_after_init(k, place, 32 * warp)
                if self.clocks and out[32 * warp : 32 * warp + 32].any():
                    self._waited(k, barrier, warp)
            if not out[at].all():
                self.polled.add(place)
        return out

    # --- copies ---------------------------------------------------------------------------------------------------

    def _box(
        self, k: int, to: np.ndarray, tensor: np.ndarray, at: list[np.ndarray], lane: int
    ) -> tuple[Descriptor, list[int], np.ndarray]:
        """The descriptor, the box's first element, and its places in shared memory."""
        descriptor = self.descriptors.get(int(self._full(tensor)[lane]))
        if descriptor is None:
            self.fault(k, "an address that is not one of a tensor descriptor", lane)
        start = int(self._full(to)[lane])
        if start % 128:
            self.fault(k, f"misaligned: a box at shared address {start:#x}, which is no multiple of 128", lane)
        places = descriptor.places(start) - SHARED_BASE
        if places.min() < 0 or places.max() + descriptor.each > self.shared.size:
            what = f"a box of bytes {places.min()} to {places.max()} of shared memory, which has {self.shared.size}"
            self.fault(k, f"out of bounds: {what}", lane)
        return descriptor, [int(self._full(x)[lane]) for x in reversed(at)], places + int(self.base[lane])

    def bulk_load(
        self, k: int, to: np.ndarray, tensor: np.ndarray, at: list[np.ndarray], barrier: np.ndarray,
        M: np.ndarray | None,
    ) -> None:  # fmt: skip
        shared = self.shared
        for lane in self._lanes_of(M):
            descriptor, where, places = self._box(k, to, tensor, at, lane)
            chunks = np.unique(places // 16)
            self._check_write(k, chunks * 16, 16)
            if self.races:
                warps = np.full(len(chunks), self.warp[lane])
                self._race(k, self.races.about_to_write(warps, chunks * 16, 16))
            place = self._barrier_place(k, barrier, lane)
            on = self._barrier(k, place, lane)
            self._ordered_after_init(k, place, lane)
            if not on.fenced:
                self.finding(k, "no fence.mbarrier_init or fence.proxy.async between an mbarrier.init and a copy")
            shared.views[descriptor.each][places // descriptor.each] = 2 ** (8 * descriptor.each) - 1  # NaN
            shared.set_pending(chunks * 16, 16)
            if self.clocks:
                self.clocks.copy_lands(chunks * 16, 16, on.index, on.phase)
            self.loads.append(Load(descriptor, where, places, place, k))

    def land(self, load: Load) -> None:
        """Do a copy into shared memory; what lies outside of the tensor is zeros."""
        self.loads.remove(load)
        shared, each = self.shared, load.descriptor.each
        addresses, inside = load.descriptor.elements(load.at)
        values = np.zeros(len(addresses), f"u{each}")
        if inside.any():
            real = self.memory.check(addresses[inside], each, lambda what, i: self.fault(load.k, what, 0))
            values[inside] = self.memory.load(real, each)
            self.report.counts["global bytes read"] += each * len(real)
        self.report.counts["shared bytes written"] += load.descriptor.bytes
        shared.store(load.places, each, values)
        barrier = self.barriers[load.barrier]
        barrier.bytes -= load.descriptor.bytes
        self._step(load.k, barrier)

    def bulk_store(
        self, k: int, tensor: np.ndarray, at: list[np.ndarray], source: np.ndarray, how: str, M: np.ndarray | None
    ) -> None:
        for lane in self._lanes_of(M):
            descriptor, where, places = self._box(k, source, tensor, at, lane)
            chunks = np.unique(places // 16)
            per_cta = self.shared.size // 16
            self._check_fenced(k, int(chunks[0]) // per_cta, chunks % per_cta, self.warp[[lane]])
            self._check_read(k, chunks * 16, 16, np.full(len(chunks), self.warp[lane]))
            self.shared.busy(chunks, 1)
            self.stores.append(Store(descriptor, where, places, how, lane, int(self.bulk_groups[lane]), k))

    def commit_bulk(self, M: np.ndarray | None) -> None:
        self.bulk_groups = self.bulk_groups + (1 if M is None else M)

    def wait_bulk(self, left: int, M: np.ndarray | None) -> None:
        M = self._mask(M)
        for each in list(self.stores):
            if (M is None or M[each.lane]) and each.group < self.bulk_groups[each.lane] - left:
                self.stored(each)

    def stored(self, store: Store) -> None:
        """Do a copy out of shared memory."""
        self.stores.remove(store)
        each, chunks = store.descriptor.each, np.unique(store.places // 16)
        self.shared.busy(chunks, -1)
        if self.races:
            warps = np.full(len(chunks), self.warp[store.lane])
            self._race(store.k, self.races.read(warps, chunks * 16, 16))
        addresses, inside = store.descriptor.elements(store.at)
        values, addresses = self.shared.views[each][store.places // each][inside], addresses[inside]
        if not len(addresses):
            return
        real = self.memory.check(addresses, each, lambda what, i: self.fault(store.k, what, store.lane))
        self.report.counts["global bytes written"] += each * len(real)
        if store.how == "add":
            if store.descriptor.dtype != "f4":
                raise NotImplementedError(str(self.program.code[store.k]))
            values = (self.memory.load(real, each).view("f4") + values.view("f4")).view("u4")
        elif store.how != "store":
            raise NotImplementedError(str(self.program.code[store.k]))
        self.memory.store(real, each, values)

    def _unfinished_bulk(self) -> None:
        for store in list(self.stores):
            self.finding(store.k, "shared memory is given up before a copy out of it is waited for")
            self.stored(store)
        for load in self.loads:
            self.finding(load.k, "a copy is not waited for")
