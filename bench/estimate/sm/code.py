"""Machine code with its control fields: what each instruction waits for, and what waits for it.

NVIDIA's compiler schedules for the hardware. Each instruction of 128 bits says for how many cycles its warp issues
nothing after it (stall), which of six scoreboards it occupies until its result is there (write) or its operands are
read (read), and which of them have to be free before it issues (wait). nvdisasm prints the bits; they are read here.
The layout of the fields is public knowledge since Volta (arXiv 1804.06826).
"""

from __future__ import annotations

import re
from typing import NamedTuple

NONE = 7  # the number of a scoreboard that is not there


class Instruction(NamedTuple):
    text: str  # without its guard
    guard: str  # "@!P0", or empty
    stall: int  # cycles
    write: int  # scoreboard, or NONE
    read: int  # scoreboard, or NONE
    wait: int  # bit mask of scoreboards

    @property
    def op(self) -> str:
        return self.text.split(None, 1)[0]


class Code(NamedTuple):
    """The machine code of one kernel. labels: which instruction each stands before."""

    instructions: list[Instruction]
    labels: dict[str, int]


_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+)?\s*(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
_SECOND_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")


def parsed(text: str) -> Code:
    """The code of one kernel, from what `nvdisasm -c -hex` prints."""
    code = Code([], {})
    pending: tuple[str, str] | None = None
    for line in text.splitlines():
        if pending is not None and (half := _SECOND_HALF.match(line)):
            code.instructions.append(Instruction(pending[1], pending[0], *_fields(int(half[1], 16))))
            pending = None
        elif label := re.match(r"\s*\.(L_x_\d+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif found := _INSTRUCTION.match(line):
            pending = found[1] or "", found[2]
    return code


def _fields(high: int) -> tuple[int, int, int, int]:
    """stall, write, read and wait, from the upper 64 bits of an instruction."""
    control = high >> 41
    return control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63


def loops(code: Code, around: str) -> list[list[Instruction]]:
    """The bodies of the innermost loops with an instruction that matches `around`, in the order of the code.

    A branch back right after a test of an mbarrier is no loop: it repeats the test, or goes on from there.
    """
    ends: dict[int, int] = {}
    for at, instruction in enumerate(code.instructions):
        target = re.match(r"BRA.*`\(\.(L_x_\d+)\)", instruction.text)
        tests = any(x.text.startswith("SYNCS.PHASECHK") for x in code.instructions[max(at - 3, 0) : at])
        if target and not tests and (begin := code.labels.get(target[1], at + 1)) <= at:
            ends[begin] = max(at, ends.get(begin, 0))
    found = [
        (a, b) for a, b in sorted(ends.items()) if any(re.match(around, x.text) for x in code.instructions[a : b + 1])
    ]
    inner = [(a, b) for a, b in found if not any((c, d) != (a, b) and a <= c and d <= b for c, d in found)]
    return [code.instructions[a : b + 1] for a, b in inner]
