"""One SM, warp by warp: when the warps of a loop issue, and how long a step of the loop takes.

All four schedulers of an SM do the same, so one is followed: it has one warp of each warp group. A warp issues in
order. An instruction waits for the stall of the one before it, for the scoreboards that its control field names, for
its pipe, and for the issue slot, which the warps share. An asynchronous product (wgmma) waits for its place in the
queue of the tensor cores, which run products in the order of their issue; WARPGROUP.DEPBAR waits for their results.
Barriers and mbarriers join the warps of a program. Copies by the copy engine are there when they are waited for; other
asynchronous copies take the latency of the L2. What memory's bandwidth allows is counted elsewhere.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

from bench.estimate.sm.barriers import Barriers, Body, barriers_of
from bench.estimate.sm.code import NONE, Instruction
from bench.estimate.sm.pipes import Op, Sm, decoded

STEPS = 10  # of a loop that are followed; the first half is not counted
_QUEUES = {"mufu": 3, "memory": 4}  # instructions that wait before a pipe without holding the issue slot
_START = 10  # cycles from the issue of an asynchronous product to its start
_READ = 8  # cycles that a pipe takes beside its own to read operands


@dataclasses.dataclass(frozen=True)
class Result:
    """The cycles of one step of every warp on the SM."""

    step: float
    busy: dict[str, float]  # by pipe
    lost: dict[str, float]  # that a warp waited on average, by reason

    @property
    def limit(self) -> str:
        """The pipe that is busy for over 85% of the time; "latency" where there is none."""
        pipe = max(self.busy, key=self.busy.__getitem__)
        return pipe if self.busy[pipe] > 0.85 * self.step else "latency"


def run(programs: Sequence[Sequence[Body]], sm: Sm, steps: int = STEPS) -> Result:
    """programs: those on the SM, each with the loop of each of its warp groups.

    Raises:
        RuntimeError: the warps wait for one another; the model does not understand a barrier of these loops.
    """
    warps = [
        _Warp(body, p, barriers_of(body, g, bodies))
        for p, bodies in enumerate(programs)
        for g, body in enumerate(bodies)
    ]
    return _Machine(warps, sm, steps).run()


@dataclasses.dataclass
class _Warp:
    body: Body
    program: int
    barriers: Barriers
    at: int = 0
    step: int = 0
    ready: float = 0.0
    boards: list[float] = dataclasses.field(default_factory=lambda: [0.0] * NONE)  # when each scoreboard is free
    sum: str = ""  # the target of its last product
    products: list[float] = dataclasses.field(default_factory=list)  # ends of its closed groups of products
    copies: list[float] = dataclasses.field(default_factory=list)  # likewise of copies
    waited: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by barrier, how often
    joining: tuple[str, int] | None = None  # a barrier that it has reached, and the arrivals that open it
    starts: list[float] = dataclasses.field(default_factory=list)  # of its steps
    lost: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class _Machine:
    def __init__(self, warps: list[_Warp], sm: Sm, steps: int) -> None:
        self.warps, self.sm, self.steps = warps, sm, steps
        self.slot = 0.0  # when the issue slot is free
        self.pipes: dict[str, float] = collections.defaultdict(float)  # when each is free
        self.busy: collections.Counter[str] = collections.Counter()
        self.products: list[float] = []  # ends of all asynchronous products, in order
        self.arrived: dict[tuple[int, str], list[float]] = collections.defaultdict(list)

    def run(self) -> Result:
        while live := [w for w in self.warps if w.step < self.steps]:
            ready = [(*self._ready(w), w) for w in live]
            when, reason, w = min(ready, key=lambda x: (x[0], x[2].ready))
            if when == math.inf:
                raise RuntimeError(
                    "the warps wait for one another: a barrier of these loops is not as the model has it"
                )
            self._issue(w, when, reason)
        half, n = self.steps // 2, len(self.warps)
        spans = [(w.starts[-1] - w.starts[half]) / (self.steps - 1 - half) for w in self.warps]
        lost: collections.Counter[str] = collections.Counter()
        for w in self.warps:
            lost.update(w.lost)
        return Result(
            sum(spans) / n,
            {pipe: cycles / self.steps for pipe, cycles in self.busy.items()},
            {reason: cycles / self.steps / n for reason, cycles in lost.items()},
        )

    # --- when an instruction issues ----------------------------------------------------------------------------------

    def _ready(self, w: _Warp) -> tuple[float, str]:
        """When the next instruction of `w` can issue, and what it waited for last."""
        x = w.body[w.at]
        when, reason = w.ready, "stall"
        for board in range(6):
            if x.wait >> board & 1 and w.boards[board] > when:
                when, reason = w.boards[board], "scoreboard"
        for need, why in self._needs(w, decoded(x, self.sm)):
            if need > when:
                when, reason = need, why
        return (self.slot, "issue") if self.slot > when else (when, reason)

    def _needs(self, w: _Warp, op: Op) -> list[tuple[float, str]]:
        needs = []
        if w.joining is not None:
            needs.append((self._arrival(w, *w.joining), "barrier"))
        if op.kind == "product":
            if len(self.products) >= self.sm.products_in_flight:
                needs.append((self.products[-self.sm.products_in_flight], "queue of products"))
        elif op.kind == "wait":
            if len(w.products) > op.left:
                needs.append((w.products[-op.left - 1] + self.sm.product_latency, "products"))
        elif op.kind == "wait_copied":
            if len(w.copies) > op.left:
                needs.append((w.copies[-op.left - 1], "copies"))
        elif op.busy:
            needs.append((self.pipes[op.pipe] - _QUEUES.get(op.pipe, 0) * op.busy, op.pipe))
        if (awaited := w.barriers.waits.get(w.at)) and not awaited[0].startswith("all"):
            name, own_step = awaited
            needs.append((self._arrival(w, name, (w.waited[name] + own_step) * w.barriers.arrivals[name]), "barrier"))
        return needs

    def _arrival(self, w: _Warp, name: str, count: int) -> float:
        """When `count` warps have arrived at a barrier of the program of `w`."""
        times = self.arrived[w.program, name]
        if not count:
            return 0.0
        return times[count - 1] if len(times) >= count else math.inf

    # --- what it does ------------------------------------------------------------------------------------------------

    def _issue(self, w: _Warp, now: float, reason: str) -> None:
        x = w.body[w.at]
        op = decoded(x, self.sm)
        if w.at == 0:
            w.starts.append(now)
        w.lost[reason] += now - w.ready
        self.slot = now + 1
        self.busy["issue"] += 1
        if op.kind == "product":
            self._multiply(w, op, now)
        elif op.kind == "copied":
            w.copies.append(now + op.latency)
        else:
            self._use(w, x, op, now)
        w.ready = now + max(x.stall, 1) + self._join(w, x, now)
        w.at = w.barriers.jumps.get(w.at, w.at + 1)
        if w.at >= len(w.body):
            w.at, w.step = 0, w.step + 1

    def _multiply(self, w: _Warp, op: Op, now: float) -> None:
        cycles = op.busy + (self.sm.product_change if op.target != w.sum else 0.0)
        end = max(self.products[-1] if self.products else 0.0, now + _START) + cycles
        self.products.append(end)
        self.busy["tensor"] += cycles
        w.sum = op.target
        if op.closes:
            w.products.append(end)

    def _use(self, w: _Warp, x: Instruction, op: Op, now: float) -> None:
        beside = op.pipe == "mufu" and bool(self.products) and self.products[-1] > now
        cycles = op.busy * (self.sm.mufu_beside if beside else 1.0)
        start = max(self.pipes[op.pipe], now) if cycles else now
        if cycles:
            self.pipes[op.pipe] = start + cycles
            self.busy[op.pipe] += cycles
        if x.write != NONE:
            w.boards[x.write] = max(w.boards[x.write], start + op.latency)
        if x.read != NONE:
            w.boards[x.read] = max(w.boards[x.read], start + cycles + _READ)

    def _join(self, w: _Warp, x: Instruction, now: float) -> float:
        """Arrive and wait at the barrier of this instruction, if it has one. Cycles until the warp goes on, where no
        other warp has to arrive."""
        at, barriers, w.joining = w.at, w.barriers, None
        numbered = x.text.startswith("BAR")
        if name := barriers.arrives.get(at):
            times = self.arrived[w.program, name]
            times.append(now + (self.sm.barrier if numbered else self.sm.mbarrier_arrive))
            times.sort()
        if awaited := barriers.waits.get(at):
            name = awaited[0]
            w.waited[name] += 1
            if name.startswith("all"):
                w.joining = name, w.waited[name] * barriers.arrivals[name]
                return 0.0
        return self.sm.barrier if x.text.startswith("BAR.SYNC") else 0.0
