"""What a launch did, and what it did wrong."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass
class Report:
    """Of one launch. An error that stops a kernel raises a Fault; the others are findings.

    findings: what a sanitizer would print -> how often.
    blocks: basic block -> how many warps ran it.
    counts: instructions (of a warp each), bytes, tensor-core operations; with Checks(banks=True) also the passes that
        accesses of shared memory take, and those that they would take without a bank conflict.
    """

    kernel: str
    findings: dict[str, int] = dataclasses.field(default_factory=dict)
    blocks: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, what: str) -> None:
        self.findings[what] = self.findings.get(what, 0) + 1


@dataclasses.dataclass(frozen=True)
class Checks:
    """What a launch is checked for, and how it is scheduled.

    races: look for races in shared memory.
    seed: None runs warps in lockstep as far as they go; a number draws a schedule of the warps and of the copies.
    banks: count bank conflicts of shared memory.
    clocks: look for races with vector clocks (races.py), which is slower, also where they are not needed.
    equal_stores: with vector clocks, a store of the value that is there already is a write like any other.
    fenced_copies: what cp.async wrote takes a fence.proxy.async before a wgmma reads it, like a store. The PTX ISA asks
        for it. Triton 3.7 and 3.9 put one there; 3.6 does not.
    """

    races: bool = True
    seed: int | None = None
    banks: bool = False
    clocks: bool = False
    equal_stores: bool = False
    fenced_copies: bool = False
