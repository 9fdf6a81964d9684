"""The minimum of three integers, in PTX: ptxas drops a minus there.

Hopper and Blackwell GPUs have one instruction for min(min(x, y), z), VIMNMX3, and for max. Where x or y is minus a
kernel argument, ptxas 12.8 to 13.0 gives this instruction the argument itself, without the minus; it also drops abs, to
13.3 (pytorch#190973). The machine code does not show that anything is missing, so this looks for the pattern in PTX, of
which it is made.
"""

from __future__ import annotations

import re
from collections import defaultdict

DROPPED_SIGN = "a minus or abs in a minimum of three integers, which ptxas drops"  # a fault

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s+(%\w+),\s*(.*?);")
_EXTREME = re.compile(r"(min|max)(?:\.relu)?\.s32")
_SIGN = re.compile(r"(neg|abs)\.s32")


def at_risk(ptx: str) -> list[str]:
    """The inner of two nested minima, or maxima, of which an operand is minus or abs of a value."""
    signs: dict[str, str] = {}  # register -> the instruction that made it
    extremes: dict[str, tuple[str, str, list[str]]] = {}  # register -> min or max, the instruction, its operands
    outer: dict[str, set[str]] = defaultdict(set)  # register -> min, max where it is an operand
    copies: dict[str, str] = {}
    for line in ptx.splitlines():
        if not (found := _INSTRUCTION.match(line)):
            continue
        operation, result, operands = found[1], found[2], re.split(r",\s*", found[3])
        text = " ".join(line.split())
        if _SIGN.fullmatch(operation) or (operation == "sub.s32" and operands[0] == "0"):
            signs[result] = text
        elif operation.startswith("mov.") and operands[0].startswith("%"):
            copies[result] = operands[0]
        elif extreme := _EXTREME.fullmatch(operation):
            extremes[result] = extreme[1], text, operands
            for operand in operands:
                outer[_origin(operand, copies)].add(extreme[1])
    return [
        text
        for result, (kind, text, operands) in extremes.items()
        if kind in outer[result] and any(_origin(operand, copies) in signs for operand in operands)
    ]


def _origin(register: str, copies: dict[str, str]) -> str:
    """The register of which `register` is a copy, through any number of copies. The values of a loop form circles."""
    seen = {register}
    while copies.get(register, register) not in seen:
        register = copies[register]
        seen.add(register)
    return register


def faults(ptx: str) -> list[str]:
    """The fault of a kernel, if it has it: how many such minima, and the first."""
    found = at_risk(ptx)
    return [f"{DROPPED_SIGN}: {len(found)} of them, the first {found[0]}"] if found else []
