"""wgmma: asynchronous products of a warp group (128 threads).

The numbers are computed at once, but until the group waits for them the result registers hold NaNs that name the
product, whatever moves them meanwhile. Operands count as being read until then. Between a write of a register and its
use by a wgmma there must be a wgmma.fence; a mov of what was fenced needs none, as it makes no new value. A register
that was moved into an operand may get no new value before the wait either: ptxas merges a register with its copy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import fragments
from .floats import tf32, widen
from .global_memory import Fault
from .program import SHARED_BASE
from .warps import Warps

_NAMES = 0x3FFFFF  # a NaN has room for this many products under way


@functools.lru_cache(maxsize=1024)
def _places_and_chunks(descriptor: int, rows: int, k: int, each: int, mn_major: bool) -> tuple[np.ndarray, np.ndarray]:
    """Places of the elements (rows, k), and numbers of the 16 bytes that they lie in, in order."""
    places = fragments.descriptor_places(descriptor, rows, k, each, mn_major) - SHARED_BASE
    return places, np.unique(places // 16)


@dataclasses.dataclass
class Product:
    """One register of a product's result, of one warp group."""

    warp_group: int
    batch: int  # number of its wgmma group (commit_group)
    value: np.ndarray


class Products(Warps):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        groups = -(-self.lanes // 128)
        self.products: dict[int, Product] = {}
        self._last = 0
        self.batches = np.zeros(groups, "i8")  # commit_groups of each warp group
        self.reading: list[tuple[int, int, np.ndarray, int]] = []  # warp group, batch, chunks of 16 bytes, k
        # Of each warp group: registers written since its last wgmma.fence, before the first one all. Of its products
        # under way: the batch, the registers, and those that were moved into the registers of A.
        self.unfenced_registers = [set(self.program.operands) for _ in range(groups)]
        self.busy_registers: list[list[tuple[int, frozenset[str], frozenset[str]]]] = [[] for _ in range(groups)]

    def fence_proxy(self, M: np.ndarray | None) -> None:
        """What these warps stored can now be seen by wgmma and by copies."""
        rows, M = self.shared.unfenced.reshape(-1, self.shared.unfenced.shape[-1]), self._mask(M)
        warps = np.arange(len(rows)) if M is None else np.flatnonzero(M.reshape(-1, 32).all(1))
        if self.clocks:
            self.clocks.fence(warps)
        rows[warps] = 0

    def _check_fenced(self, k: int, cta: int, chunks: np.ndarray, warps: np.ndarray) -> None:
        """Before an asynchronous read, by these warps, of 16 bytes each of a thread block's shared memory."""
        if self.clocks.unfenced(warps, chunks) if self.clocks else self.shared.unfenced[cta][:, chunks].any():
            self.finding(k, "read of shared memory before a fence.proxy.async")

    # --- registers ------------------------------------------------------------------------------------------------

    def fence_products(self, k: int, M: np.ndarray | None) -> None:
        for group in self._warp_groups(k, M):
            self.unfenced_registers[group].clear()

    def write_operands(self, k: int, writes: tuple[tuple[str, tuple[str, ...]], ...], M: np.ndarray | None) -> None:
        """Before instruction k registers that some wgmma uses were written: (register, those moved into it)."""
        M = self._mask(M)
        groups = range(len(self.batches)) if M is None else np.unique(np.flatnonzero(M) // 128)
        for group in groups:
            unfenced = self.unfenced_registers[group]
            for to, moved in writes:
                (unfenced.add if not moved or not unfenced.isdisjoint(moved) else unfenced.discard)(to)
            under_way = self.busy_registers[group]
            if any(not busy.isdisjoint(to for to, _ in writes) for _, busy, _ in under_way):
                self.finding(k, "a register of a wgmma under way is written before")
            # ptxas merges a register with its copy, and then does not keep what the product still reads.
            if any(not copied.isdisjoint(to for to, moved in writes if not moved) for *_, copied in under_way):
                self.finding(k, "a register, of which a wgmma under way reads a copy, is written before")

    def use_operands(self, k: int, registers: list[str], copied: list[str], M: np.ndarray | None) -> None:
        """A wgmma reads or writes these registers. Those `copied` were moved into the ones that it only reads."""
        for group in self._warp_groups(k, M):
            if not self.unfenced_registers[group].isdisjoint(registers):
                self.finding(k, "no wgmma.fence after a write of a register that a wgmma uses")
            self.busy_registers[group].append((int(self.batches[group]), frozenset(registers), frozenset(copied)))

    # --- products -------------------------------------------------------------------------------------------------

    def _warp_groups(self, k: int, M: np.ndarray | None) -> np.ndarray:
        """Those that take part, which all their threads must."""
        M = self._mask(M)
        if M is None:
            return np.arange(len(self.batches))
        rows = M.reshape(-1, 128)
        if (rows.any(1) != rows.all(1)).any():
            raise Fault(f"{self.program.entry.name}: part of a warp group runs {self.program.code[k]}")
        return np.flatnonzero(rows[:, 0])

    def _operand(
        self, k: int, descriptor: np.ndarray, rows: int, kk: int, kind: str, mn_major: bool, group: int
    ) -> np.ndarray:
        """The matrix (rows, kk) that a descriptor describes, as float32."""
        lanes = self._full(descriptor).reshape(-1, 128)[group]
        if (lanes != lanes[0]).any():
            self.fault(k, "a matrix descriptor that differs between the threads", 128 * group)
        shared, each, cta = self.shared, 4 if kind == "tf32" else 2, 128 * group // self.threads
        places, chunks = _places_and_chunks(int(lanes[0]), rows, kk, each, mn_major)
        if chunks[0] < 0 or chunks[-1] * 16 >= shared.size:
            what = f"wgmma reads bytes {places.min()} to {places.max()} of shared memory, which has {shared.size}"
            self.fault(k, what, 128 * group)
        warps = np.arange(4 * group, 4 * group + 4)
        self._check_fenced(k, cta, chunks, warps)
        places, chunks = places + cta * shared.size, chunks + cta * (shared.size // 16)
        self._check_read(k, np.tile(chunks * 16, 4), 16, np.repeat(warps, len(chunks)))
        self.report.counts["shared bytes read"] += rows * kk * each
        shared.busy(chunks, 1)
        self.reading.append((group, int(self.batches[group]), chunks, k))
        if each == 4:
            return tf32(shared.views[4].view("f4")[places // 4])
        return widen(shared.views[2][places // 2], kind)

    def _awaited(self, registers: list[np.ndarray]) -> Iterator[tuple[int, int, int]]:
        """Registers that wait for a product's result: their index, the warp group, and the result's name."""
        full = [i for i, x in enumerate(registers) if len(x) > 1]
        if not full:
            return
        bits = np.stack([registers[i].view("u4")[::128] for i in full])
        names = np.where(bits >> 22 == 0x1FE, bits & np.uint32(_NAMES), 0)
        for i, group in np.argwhere(names).tolist():
            if (name := int(names[i, group])) in self.products:
                yield full[i], group, name

    def product(
        self, k: int, kind: str, kk: int, a: np.ndarray | list[np.ndarray], b: np.ndarray, c: list[np.ndarray],
        kept: np.ndarray, turned: tuple[int, ...], M: np.ndarray | None,
    ) -> list[np.ndarray]:  # fmt: skip
        """D = A B + D if `kept`, else A B, for every warp group that takes part."""
        here = self._warp_groups(k, M)
        columns, before = 2 * len(c), np.stack([self._full(x) for x in c])
        awaited = [(i, g, name) for i, g, name in self._awaited(c) if g in here]
        for i, g, name in awaited:
            before[i, 128 * g : 128 * g + 128] = self.products[name].value
        for *_, name in awaited:
            self.products.pop(name, None)
        sums = fragments.c_fragment(before).reshape(-1, 64, columns)
        kept = self._full(kept).reshape(-1, 128)[:, 0]
        sums = np.where(kept[:, None, None], sums, np.float32(0))
        from_registers = isinstance(a, list)
        if from_registers:
            if any(self._awaited(a)):
                self.finding(k, "read of a register that a wgmma is yet to write")
            rows = fragments.a_fragment([self._full(x) for x in a], kind).reshape(-1, 64, kk)
        for g in here:
            left = rows[g] if from_registers else self._operand(k, a, 64, kk, kind, bool(turned[0]), g)
            right = self._operand(k, b, columns, kk, kind, bool(turned[1]), g)
            sums[g] += left @ right.T
            self.report.counts["tensor core operations"] += 2 * 64 * columns * kk
        return self._stand_ins(np.stack(fragments.c_registers(sums.reshape(-1, 16, columns))), here)

    def _stand_ins(self, values: np.ndarray, here: np.ndarray) -> list[np.ndarray]:
        """NaNs that name what registers will be."""
        out = np.zeros(values.shape, "u4")
        for g in here.tolist():
            lanes, batch = slice(128 * g, 128 * g + 128), int(self.batches[g])
            names = (self._last + np.arange(len(values), dtype="u4")) % np.uint32(_NAMES) + np.uint32(1)
            self._last = int(names[-1])
            out[:, lanes] = np.uint32(0x7F800000) | names[:, None]
            self.products.update(
                (name, Product(g, batch, value)) for name, value in zip(names.tolist(), values[:, lanes], strict=True)
            )
        return list(out.view("f4"))

    def commit_products(self, k: int, M: np.ndarray | None) -> None:
        self.batches[self._warp_groups(k, M)] += 1

    def wait_products(self, k: int, left: int, M: np.ndarray | None) -> None:
        """Finish all but the last `left` groups of these warp groups."""
        here, until = set(self._warp_groups(k, M).tolist()), self.batches - left
        for group in here:
            busy = self.busy_registers[group]
            self.busy_registers[group] = [each for each in busy if each[0] >= until[group]]
        done = {n for n, x in self.products.items() if x.warp_group in here and x.batch < until[x.warp_group]}
        if done:
            variables, pending = self.program.namespace, self.program.pending_names
            for i, group, name in self._awaited([variables[x] for x in pending]):
                if name in done:
                    x = variables[pending[i]] = variables[pending[i]].copy()
                    x[128 * group : 128 * group + 128] = self.products[name].value.view(x.dtype)
            for name in done:
                del self.products[name]
        still, read = [], {}
        for each in self.reading:
            group, batch, chunks, by = each
            if group in here and batch < until[group]:
                self.shared.busy(chunks, -1)
                read.setdefault((group, by), []).append(chunks)
            else:
                still.append(each)
        self.reading = still
        if self.races:
            for (group, by), parts in read.items():
                chunks = np.unique(np.concatenate(parts))
                warps = np.repeat(np.arange(4 * group, 4 * group + 4), len(chunks))
                self._race(by, self.races.read(warps, np.tile(chunks * 16, 4), 16))
