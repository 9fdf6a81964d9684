"""The barriers in the loops of one program: which wait belongs to which arrivals.

Numbered barriers (BAR) are told apart by their number, mbarriers by the constant in their address, which is the same
for all slots of a ring. A wait for an mbarrier that no loop arrives at waits for a copy; copies are there in time.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

from bench.estimate.sm.code import Instruction

Body = Sequence[Instruction]


@dataclasses.dataclass(frozen=True)
class Barriers:
    """The barriers in the loop of one warp group, by place in its body. Names with "all" join all warp groups."""

    waits: dict[int, tuple[str, int]]  # name, and whether the wait needs the arrivals of its own step (1 or 0)
    arrives: dict[int, str]
    arrivals: dict[str, int]  # by name: how many end a phase
    jumps: dict[int, int]  # where the loop goes on after a branch


def barriers_of(body: Body, group: int, bodies: Sequence[Body]) -> Barriers:
    """bodies: of all warp groups of the program; that of `group` is `body`."""
    everyone = [_arrives(x, i, len(bodies)) for i, x in enumerate(bodies)]
    own = everyone[group]
    arrivals = collections.Counter(name for arrives in everyone for name in set(arrives.values()))
    waits: dict[int, tuple[str, int]] = {}
    for at, x in enumerate(body):
        name = _awaited(x, group)
        if name in arrivals and len(bodies) > 1:
            before = [place for place, other in own.items() if other == name]
            # Warp groups that take turns: the first one passes at once.
            waits[at] = name, int(min(before) < at) if before else int(group > 0)
    return Barriers(waits, own, arrivals, _jumps(body))


def _awaited(x: Instruction, group: int) -> str | None:
    if found := re.match(r"BAR\.SYNC\S*\s+(\w+)(?:,\s*0x(\w+))?", x.text):
        number, threads = found[1], int(found[2], 16) if found[2] else None
        if threads is not None and threads <= 128:
            return None  # of one warp group, whose warps do the same
        return f"turn {group}" if number.startswith("R") else f"all {number}"
    found = re.match(r"SYNCS\.PHASECHK\S*\s+\w+,\s*\[\w+\+(0x\w+)\]", x.text)
    return f"mbarrier {found[1]}" if found else None


def _arrives(body: Body, group: int, groups: int) -> dict[int, str]:
    """The barriers that a loop arrives at, by place."""
    arrives: dict[int, str] = {}
    for at, x in enumerate(body):
        if x.text.startswith("BAR.ARV"):
            arrives[at] = f"turn {(group + 1) % groups}"
        elif x.text.startswith("BAR.SYNC") and (name := _awaited(x, group)) and name.startswith("all"):
            arrives[at] = name
        elif found := re.match(r"SYNCS\.ARRIVE\S*\s+RZ,\s*\[\w+\+(0x\w+)\]", x.text):
            arrives[at] = f"mbarrier {found[1]}"
    return arrives


def _jumps(body: Body) -> dict[int, int]:
    """A wait for an mbarrier that is tested twice: the first test succeeds, and the second is passed over."""
    return {
        at + 1: at + 4
        for at, x in enumerate(body[:-3])
        if x.text.startswith("SYNCS.PHASECHK")
        and body[at + 1].text.startswith("BRA")
        and body[at + 1].guard.startswith("@P")
        and body[at + 2].text.startswith("SYNCS.PHASECHK")
    }
