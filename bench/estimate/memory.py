"""The time of a memory-bound kernel: the slowest of DRAM, the link from the L2 into an SM, issue slots, and the chain
of events that one program goes through, shared by the programs that fit on an SM.

The machine code says how many instructions, bytes, shuffles and barriers a program has; the caller says how often its
loops run. Not a simulation: four numbers are added up, the largest counts most.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from bench.estimate.constants import Gpu, memory
from bench.estimate.errors import error_of
from bench.estimate.kernels import Kernel
from bench.estimate.result import Estimate
from bench.estimate.sm.code import Code

_SHUFFLE, _BARRIER, _SHARED = 23, 25, 8  # cycles of a program's chain, each


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a program goes over its rows. trips: of each loop, in the order of their first instructions; one number:
    of all of them. steps: tiles that a program takes one after another. ahead: how many of them it has asked for before
    it needs them; 0: it waits for each."""

    trips: float | Sequence[float] = 1.0
    steps: float = 1.0
    ahead: int = 0
    waits: float = 1.0  # trips to memory of a step, each of which the next needs


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What one warp does in all its life. Bytes are those of a program."""

    instructions: float
    read: float
    written: float
    local: float
    shuffles: float
    barriers: float
    shared: float


def estimate(gpu: Gpu, kernel: Kernel, dram_bytes: float, walk: Walk | None = None, kind: str = "rows") -> Estimate:
    """The time of one launch, without what a call takes around its kernels."""
    walk, c = walk or Walk(), memory()
    facts = _facts(kernel, walk)
    per_sm = kernel.launched / gpu.sms
    resident = min(kernel.resident, max(1.0, per_sm))
    issue = facts.instructions * kernel.warps / 4
    link = max(facts.read, facts.written) / gpu.l2_rate
    spilled, extra = _spills(gpu, kernel, facts, resident)
    compute = max(issue, facts.instructions * c.dependent) + spilled
    compute += facts.shuffles * _SHUFFLE + facts.barriers * _BARRIER + facts.shared * _SHARED
    if walk.ahead:
        chain = c.start + c.dram_latency + compute + max(0.0, walk.steps * c.dram_latency / walk.ahead - compute)
    else:
        written = facts.written if walk.steps == 1 else 0.0
        chain = c.start + walk.steps * walk.waits * c.dram_latency + (facts.read + written) / gpu.l2_rate + compute
    a_cycle = per_sm / (gpu.clock * 1e9)
    limits = {
        "dram": (dram_bytes + extra) / (gpu.copy * 1e9),
        "latency": a_cycle * chain / resident,
        "issue": a_cycle * issue,
        "l2": a_cycle * link,
    }
    limit = max(limits, key=limits.__getitem__)
    top = limits[limit]
    seconds = top * sum((t / top) ** c.softness for t in limits.values()) ** (1 / c.softness)
    return Estimate(seconds, limit, error_of(kind, gpu.family), kind=kind)


def _spills(gpu: Gpu, kernel: Kernel, facts: _Facts, resident: float) -> tuple[float, float]:
    """Cycles of a program for its spills, and bytes that they move from and to DRAM."""
    stack = kernel.spill * kernel.warps * 32 * resident
    if not facts.local or stack <= gpu.l1 - kernel.shared * resident:
        return facts.local / 128, 0.0
    everyone = stack * gpu.sms
    return facts.local / gpu.l2_rate, (
        facts.local * kernel.launched * min(1.0, everyone / gpu.l2) if everyone > 0.5 * gpu.l2 else 0.0
    )


def _facts(kernel: Kernel, walk: Walk) -> _Facts:
    sums = dict.fromkeys((f.name for f in dataclasses.fields(_Facts)), 0.0)
    threads = 32 * kernel.warps
    for x, weight in zip(kernel.code.instructions, _weights(kernel.code, walk.trips), strict=True):
        sums["instructions"] += weight
        kind = _kind(x.op)
        if kind in ("read", "written", "local"):
            sums[kind] += weight * _width(x.op) * threads
        elif kind:
            sums[kind] += weight
    return _Facts(**sums)


def _kind(op: str) -> str | None:
    for kind, pattern in (
        ("read", r"LDG(?!DEPBAR)"), ("written", r"STG"), ("local", r"LDL|STL"), ("shuffles", r"SHFL"),
        ("barriers", r"BAR"), ("shared", r"LDSM?\b"),
    ):  # fmt: skip
        if re.match(pattern, op):
            return kind
    return None


def _width(op: str) -> int:
    """Bytes of a thread."""
    if found := re.search(r"\.(64|128)(\.|$)", op):
        return int(found[1]) // 8
    return 2 if re.search(r"\.[US]16", op) else 1 if re.search(r"\.[US]8", op) else 4


def loop_places(code: Code) -> list[tuple[int, int]]:
    """The first and last instruction of each loop, in the order of the first."""
    ends: dict[int, int] = {}
    for at, x in enumerate(code.instructions):
        target = re.match(r"BRA.*`\(\.(L_x_\d+)\)", x.text)
        if target and (begin := code.labels.get(target[1], at + 1)) < at:
            ends[begin] = max(at, ends.get(begin, 0))
    return sorted(ends.items())


def _weights(code: Code, trips: float | Sequence[float]) -> list[float]:
    """How often each instruction runs: 0 for those after the last EXIT, and for NOP."""
    weights = [1.0] * len(code.instructions)
    places = loop_places(code)
    of_each = [trips] * len(places) if isinstance(trips, int | float) else trips
    for (begin, end), n in zip(places, of_each, strict=True):
        for at in range(begin, end + 1):
            weights[at] *= n
    last = max(at for at, x in enumerate(code.instructions) if x.text.startswith("EXIT"))
    return [0.0 if at > last or x.text.startswith("NOP") else w
            for at, (x, w) in enumerate(zip(code.instructions, weights, strict=True))]  # fmt: skip


def fitting_trips(kernel: Kernel, read: float, written: float) -> float:
    """How often the loops of a program run, if all run equally often: so often that it moves what the launch moves.

    read, written: bytes of the whole launch. Stores decide if they stand in a loop; if none does, loads do.
    """
    once, twice = (_facts(kernel, Walk(trips=n)) for n in (1.0, 2.0))
    of = "written" if twice.written > once.written else "read"
    wanted = (written if of == "written" else read) / kernel.launched
    if getattr(twice, of) == getattr(once, of):
        return 1.0
    low, high = 1.0, 2.0**20
    while high > 1.001 * low:  # in the middle of orders of magnitude: nested loops multiply
        middle = (low * high) ** 0.5
        low, high = (middle, high) if getattr(_facts(kernel, Walk(trips=middle)), of) < wanted else (low, middle)
    return low
