"""The global accesses of a memory-bound kernel in its machine code: their widths, and the instructions for each byte.

A model, not a measurement: a processor issues four warps of 32 a cycle, and memory is as fast as a copy. A kernel
with fewer instructions can be bound by memory; that it is, this does not show.
"""

from __future__ import annotations

import dataclasses
import re

from bench.codegen import sass
from bench.gpus import GPUS


@dataclasses.dataclass(frozen=True)
class Processors:
    """Of the GPU that stands for a family: how many, and GHz."""

    gpu: str
    count: int
    clock: float

    def instructions_a_byte(self) -> float:
        """That all processors together issue to threads while memory moves a byte, at the bandwidth of a copy."""
        return self.count * 4 * 32 * self.clock / GPUS[self.gpu].ceilings["copy"]


PROCESSORS = {
    "sm_80": Processors("A100", 108, 1.41),
    "sm_90": Processors("H200", 132, 1.755),
    "sm_100": Processors("B200", 148, 1.85),
}


# Of the instructions that could issue; what is over it would be waiting for them, not for memory.
MOST_ISSUE = 1.0


@dataclasses.dataclass(frozen=True)
class Loop:
    """A step of an innermost loop that touches global memory, or all of a kernel that has none. Of one thread."""

    instructions: int
    loads: dict[int, int]  # by width in bits, how many
    stores: dict[int, int]

    @property
    def bytes(self) -> int:
        return sum(bits // 8 * n for widths in (self.loads, self.stores) for bits, n in widths.items())

    @property
    def instructions_a_byte(self) -> float:
        return self.instructions / self.bytes

    def share_of_issue(self, target: str) -> float | None:
        """Of the instructions that could issue at the bandwidth of a copy, those that this takes."""
        if target not in PROCESSORS:
            return None
        return self.instructions_a_byte / PROCESSORS[target].instructions_a_byte()


def width(op: str) -> int:
    """Bits that a global access of one thread moves."""
    found = re.search(r"\.(64|128)(\.|$)", op)
    return int(found[1]) if found else 16 if ".U16" in op else 8 if re.search(r"\.[US]8", op) else 32


def loops(text: str) -> list[Loop]:
    """Of what nvdisasm prints of one kernel."""
    lines, labels = sass.instructions(text)
    bodies = list(sass.innermost(lines, labels, "LDG|STG")) or [lines]
    return [loop for loop in map(_loop, bodies) if loop.bytes]


def _loop(body: list[str]) -> Loop:
    loads: dict[int, int] = {}
    stores: dict[int, int] = {}
    for line in body:
        op = line.split()[0]
        into = loads if re.match(r"LDG(STS)?\b(?!DEPBAR)", op) else stores if op.startswith("STG") else None
        if into is not None:
            into[width(op)] = into.get(width(op), 0) + 1
    return Loop(sum(not line.startswith("NOP") for line in body), loads, stores)


def heaviest(found: list[Loop]) -> Loop | None:
    """The loop that takes most instructions for its bytes."""
    return max(found, key=lambda loop: loop.instructions_a_byte, default=None)


def faults(found: list[Loop], target: str) -> list[str]:
    """What a loop over rows must not show."""
    said = []
    for what, widths in (("load", [loop.loads for loop in found]), ("store", [loop.stores for loop in found])):
        if any(of and 128 not in of for of in widths):
            said.append(f"a loop without a 128-bit {what}")
    shares = [loop.share_of_issue(target) or 0 for loop in found]
    if any(share > MOST_ISSUE for share in shares):
        said.append(f"{max(shares):.0%} of the instructions that fit beside its bytes")
    return said


def assumption() -> str:
    """How many fit beside a byte, by family."""
    return ", ".join(
        f"{p.instructions_a_byte():.1f} on {family} ({p.gpu}, {p.count} processors at {p.clock} GHz)"
        for family, p in PROCESSORS.items()
    )
