"""The minimum of three integers, in PTX: ptxas drops a minus there.

Hopper and Blackwell GPUs have one instruction for min(min(x, y), z), VIMNMX3, and for max. Where x or y is minus a
kernel argument, ptxas 12.8 to 13.0 gives this instruction the argument itself, without the minus; it also drops abs, to
13.3 (pytorch#190973). The machine code does not show that anything is missing, so this looks for the pattern in PTX, of
which it is made.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

DROPPED_SIGN = "a minus or abs in a minimum of three integers, which ptxas drops"  # a fault

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s+(%\w+),\s*(.*?);")
_EXTREME = re.compile(r"(min|max)(?:\.relu)?\.s32")
_SIGN = re.compile(r"(neg|abs)\.s32")


class _Extreme(NamedTuple):
    kind: str  # min or max
    text: str
    result: str
    operands: list[str]


def at_risk(ptx: str) -> list[str]:
    """The inner of two nested minima, or maxima, of which an operand may be minus or abs of a value."""
    signs: set[str] = set()  # registers
    extremes: list[_Extreme] = []
    copies: dict[str, set[str]] = defaultdict(set)  # register -> those of which it is a copy, on one path or another
    for line in ptx.splitlines():
        if not (found := _INSTRUCTION.match(line)):
            continue
        operation, result, operands = found[1], found[2], re.split(r",\s*", found[3])
        if _SIGN.fullmatch(operation) or (operation == "sub.s32" and operands[0] == "0"):
            signs.add(result)
        elif operation.startswith("mov.") and operands[0].startswith("%"):
            copies[result].add(operands[0])
        elif extreme := _EXTREME.fullmatch(operation):
            extremes.append(_Extreme(extreme[1], " ".join(line.split()), result, operands))
    outer = {(each.kind, value) for each in extremes for x in each.operands for value in _values(x, copies)}
    return [
        each.text
        for each in extremes
        if (each.kind, each.result) in outer and any(signs & _values(x, copies) for x in each.operands)
    ]


def _values(register: str, copies: dict[str, set[str]]) -> set[str]:
    """`register`, and all registers of which it may be a copy, through any number of copies."""
    found, left = {register}, [register]
    while left:
        more = copies.get(left.pop(), set()) - found
        found |= more
        left += more
    return found


def faults(ptx: str) -> list[str]:
    """The fault of a kernel, if it has it: how many such minima, and the first."""
    found = at_risk(ptx)
    return [f"{DROPPED_SIGN}: {len(found)} of them, the first {found[0]}"] if found else []
