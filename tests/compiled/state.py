"""The state of a running machine, and helpers that all its parts use.

All threads of some thread blocks (CTAs) run at once: a lane is a thread, numbered over all of these CTAs. A mask `M` of
lanes is None where all take part, else an array of booleans, which may have length 1.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from .descriptors import Descriptor
from .global_memory import Fault, Global
from .program import Program
from .races import BarrierRaces, ClockRaces
from .report import Checks, Report
from .shared_memory import Shared


class State:
    def __init__(
        self, program: Program, grid: tuple[int, ...], ctas: np.ndarray, params: dict[str, np.ndarray],
        descriptors: dict[int, Descriptor], memory: Global, dynamic_shared: int, checks: Checks, report: Report,
    ) -> None:  # fmt: skip
        self.program, self.report, self.params, self.memory = program, report, params, memory
        self.descriptors, self.checks = descriptors, checks
        self.threads = threads = program.entry.threads
        self.ctas, self.lanes, self.warps = len(ctas), len(ctas) * threads, threads // 32
        self.shared = Shared(self.ctas, self.warps, program.static_shared() + dynamic_shared)
        self.races: BarrierRaces | ClockRaces | None = None
        if checks.races:
            if program.specialised or checks.clocks:
                self.races = ClockRaces(self.shared, checks.equal_stores)
            else:
                self.races = BarrierRaces(self.shared)
        self.clocks = self.races if isinstance(self.races, ClockRaces) else None
        self.random = None if checks.seed is None else random.Random(checks.seed)
        lane = np.arange(self.lanes)
        self.warp = lane // 32  # over all CTAs
        self.base = (lane // threads * self.shared.size).astype("i8")  # place of its CTA's shared memory
        self.specials = _special_registers(grid, ctas, threads)
        self.live = np.ones(self.lanes, bool)
        self.left: np.ndarray | None = None  # lanes that the running block ended

    def _full(self, x: np.ndarray) -> np.ndarray:
        return x if len(x) == self.lanes else np.repeat(x, self.lanes)

    def _mask(self, M: np.ndarray | None) -> np.ndarray | None:
        """None, or one boolean a lane."""
        if M is None or (len(M) == 1 and M[0]):
            return None
        return self._full(M)

    def _chosen(self, M: np.ndarray | None) -> np.ndarray | None:
        """The lanes that take part; None: all."""
        if M is None or (len(M) == 1 and M[0]):
            return None
        return np.flatnonzero(M) if len(M) > 1 else np.zeros(0, "i8")

    def _warp_of(self, chosen: np.ndarray | None) -> np.ndarray:
        return self.warp if chosen is None else self.warp[chosen]

    def _whole_warps(self, k: int, M: np.ndarray | None) -> None:
        """Raise if only a part of a warp runs an instruction of the whole warp."""
        if M is not None and len(M) > 1:
            rows = M.reshape(-1, 32)
            if (rows.any(1) != rows.all(1)).any():
                raise Fault(f"{self.program.entry.name}: part of a warp runs {self.program.code[k]}")

    def fault(self, k: int, what: str, lane: int) -> None:
        thread = lane % self.threads
        place = tuple(int(self._full(self.specials[f"ctaid.{axis}"])[lane]) for axis in "xyz")
        raise Fault(f"{self.program.entry.name}: {what}; thread {thread} of program {place}: {self.program.code[k]}")

    def finding(self, k: int, what: str | None) -> None:
        if what is not None:
            self.report.add(f"{what}: {self.program.code[k]}")

    def param(self, name: str, offset: int, dtype: Any) -> np.ndarray:
        return self.params[name].view("u1")[offset : offset + dtype.itemsize].view(dtype)

    def leave(self, guard: np.ndarray) -> np.ndarray:
        self.left = np.broadcast_to(guard, self.lanes)
        return guard

    def trap(self, k: int, M: np.ndarray | None) -> None:
        if M is None or M.any():
            raise Fault(f"{self.program.entry.name}: trap: {self.program.code[k]}")


def _special_registers(grid: tuple[int, ...], ctas: np.ndarray, threads: int) -> dict[str, np.ndarray]:
    tid = (np.arange(len(ctas) * threads) % threads).astype("u4")
    zero, one = np.zeros(1, "u4"), np.ones(1, "u4")
    out = {"tid.x": tid, "tid.y": zero, "tid.z": zero, "laneid": tid % np.uint32(32), "warpid": tid // np.uint32(32),
           "ntid.x": np.array([threads], "u4"), "ntid.y": one, "ntid.z": one, "cluster_ctarank": zero}  # fmt: skip
    rest = ctas
    for axis, n in zip("xyz", grid, strict=True):
        ids, rest = (rest % n).astype("u4"), rest // n
        out[f"ctaid.{axis}"] = out[f"clusterid.{axis}"] = np.repeat(ids, threads) if len(ctas) > 1 else ids
        out[f"nctaid.{axis}"] = np.array([n], "u4")
    return out
