"""The global accesses of a memory-bound kernel in its machine code: their widths, and the instructions for each byte.

This is a model, not a measurement: an SM issues instructions for four warps of 32 threads a cycle, and memory is as
fast as a copy. A kernel with more instructions than that cannot be bound by memory; one with fewer may be.
"""

from __future__ import annotations

import dataclasses
import re

from bench.codegen import sass
from bench.gpus import GPUS


@dataclasses.dataclass(frozen=True)
class Processors:
    """The SMs of the GPU that represents a family: their number, and their clock in GHz."""

    gpu: str
    count: int
    clock: float

    def instructions_a_byte(self) -> float:
        """Instructions of threads that all SMs issue while memory moves a byte, at the bandwidth of a copy."""
        return self.count * 4 * 32 * self.clock / GPUS[self.gpu].ceilings["copy"]


PROCESSORS = {
    "sm_80": Processors("A100", 108, 1.41),
    "sm_90": Processors("H200", 132, 1.755),
    "sm_100": Processors("B200", 148, 1.85),
}


MOST_ISSUE = 1.0  # a larger share of the instructions that can issue would limit the kernel, not memory


@dataclasses.dataclass(frozen=True)
class Loop:
    """A step of an innermost loop with global accesses, or a whole kernel without loops. All is of one thread."""

    instructions: int
    loads: dict[int, int]  # number by width in bits
    stores: dict[int, int]

    @property
    def bytes(self) -> int:
        return sum(bits // 8 * n for widths in (self.loads, self.stores) for bits, n in widths.items())

    @property
    def instructions_a_byte(self) -> float:
        return self.instructions / self.bytes

    def share_of_issue(self, target: str) -> float | None:
        """Its instructions / those that can issue while its bytes move. None for a family without a GPU above."""
        if target not in PROCESSORS:
            return None
        return self.instructions_a_byte / PROCESSORS[target].instructions_a_byte()


def width(op: str) -> int:
    """Bits that a global access of one thread moves."""
    found = re.search(r"\.(64|128)(\.|$)", op)
    return int(found[1]) if found else 16 if ".U16" in op else 8 if re.search(r"\.[US]8", op) else 32


def loops(text: str) -> list[Loop]:
    """The loops in the output of nvdisasm for one kernel."""
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
    """The loop with the most instructions a byte."""
    return max(found, key=lambda loop: loop.instructions_a_byte, default=None)


def faults(found: list[Loop], target: str) -> list[str]:
    """The faults of loops over rows."""
    said = []
    for what, widths in (("load", [loop.loads for loop in found]), ("store", [loop.stores for loop in found])):
        if any(of and 128 not in of for of in widths):
            said.append(f"a loop without a 128-bit {what}")
    shares = [loop.share_of_issue(target) or 0 for loop in found]
    if any(share > MOST_ISSUE for share in shares):
        said.append(f"{max(shares):.0%} of the instructions that fit beside its bytes")
    return said


def assumption() -> str:
    """The instructions that can issue while a byte moves, for each family."""
    return ", ".join(
        f"{p.instructions_a_byte():.1f} on {family} ({p.gpu}, {p.count} processors at {p.clock} GHz)"
        for family, p in PROCESSORS.items()
    )
