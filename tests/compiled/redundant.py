"""Why nothing shows where a barrier is spoiled: it orders nothing, whatever the schedule.

This is for kernels whose warps wait for each other at barriers of the whole thread block alone. Their results are the
same in every schedule if, between two barriers, no two warps touch one byte of shared memory, one of them writing. The
race check looks for just that, but it takes a store of the value that is there already for no write; here it is one.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

from .parse import Instruction
from .program import Program
from .races import BarrierRaces

NOTHING_BEFORE = "nothing touches shared memory between it and the barriers before it"
NOTHING_AFTER = "nothing touches shared memory between it and the barriers after it"
OTHER_BYTES = "no two warps touch one byte, one of them writing, between the barriers around it"
EQUAL_VALUES = "what it orders are only stores of the value that is there already"


def touches_shared(each: Instruction) -> bool:
    """Whether an instruction reads or writes shared memory, or starts a copy or a product that does."""
    return each.op.startswith(("ldmatrix", "stmatrix", "cp.async.c", "cp.async.bulk.t", "wgmma.mma")) or (
        each.mods[0] in ("ld", "st") and "shared" in each.mods
    )


def _lets_a_copy_land(each: Instruction) -> bool:
    return "wait_group" in each.mods or "wait_all" in each.mods


def reason(program: Program, barrier: Instruction, races: Callable[[], bool]) -> str:
    """Why a kernel is right without a barrier of its, or with it elsewhere. `races`: runs it so, and says whether there
    are findings."""
    block = next(b for b, at in enumerate(program.blocks) if program.code[at.first] is barrier)
    if not _accesses(program, predecessors(program)[block], lambda b: _before(program, b)):
        return NOTHING_BEFORE
    if not _accesses(program, [block], lambda b: _after(program, b)):
        return NOTHING_AFTER
    with mock.patch.object(BarrierRaces, "EQUAL_STORES_RACE", True):
        return EQUAL_VALUES if races() else OTHER_BYTES


def _accesses(program: Program, start: list[int], onwards: Callable[[int], list[int]]) -> bool:
    seen: set[int] = set()
    waiting = list(start)
    while waiting:
        b = waiting.pop()
        if b not in seen:
            seen.add(b)
            at = program.blocks[b]
            if any(touches_shared(each) or _lets_a_copy_land(each) for each in program.code[at.first : at.last]):
                return True
            waiting += onwards(b)
    return False


def _before(program: Program, block: int) -> list[int]:
    """A barrier is the first instruction of its block: backwards, a path ends behind it."""
    return [] if program.blocks[block].barrier else predecessors(program)[block]


def _after(program: Program, block: int) -> list[int]:
    return [b for b in successors(program, block) if not program.blocks[b].barrier]


def successors(program: Program, block: int) -> list[int]:
    """The blocks that may run next."""
    at = program.blocks[block]
    last = program.code[at.last - 1]
    found = list(at.table or ()) + ([] if at.target is None else [at.target])
    if last.guard or last.mods[0] not in ("bra", "brx", "ret", "exit", "trap"):
        found.append(block + 1)
    return [b for b in found if b < len(program.blocks)]


def predecessors(program: Program) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in program.blocks]
    for b in range(len(program.blocks)):
        for after in successors(program, b):
            found[after].append(b)
    return found
