"""The loops of a kernel in its machine code: the instructions of a step of attention, and the least cycles it takes.

This is a model, not a measurement: pipes have the rates of NVIDIA's tables, warps run in lockstep, and no instruction
waits for its operands or for memory. So the cycles are a lower bound, and the share of the tensor cores' rate is an
upper bound. They serve to compare two loops and do not predict a time.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton


@dataclasses.dataclass(frozen=True)
class Processor:
    """An SM. Rates are per cycle."""

    tensor_flops: int | None  # in half precision with float32 sums; None if instructions do not show their sizes
    float32: int  # operations
    shared: int  # bytes of shared memory for all its programs
    shared_rate: int = 128  # bytes read from shared memory
    registers: int = 65536
    warps: int = 64


COMPUTED_TWICE = "products computed more than once"  # a fault
LOCAL_MEMORY = "local memory in a loop"
PROCESSORS = {
    "sm_80": Processor(2048, 64, 164 * 1024),
    "sm_86": Processor(512, 128, 100 * 1024, warps=48),
    "sm_90": Processor(4096, 128, 228 * 1024),
    "sm_100": Processor(None, 128, 228 * 1024),
}


@dataclasses.dataclass
class Loop:
    """One step of an innermost loop with tensor-core instructions: instructions of a warp, and cycles of a program."""

    instructions: int
    mix: dict[str, int]  # number of instructions by kind
    cycles: dict[str, int]  # by pipe
    ideal: int  # cycles of the tensor cores if each product of a tile is computed once
    covered: float  # share of the exponentials issued while a product is running; known only for Hopper
    step: int  # cycles of a step if the program is alone on its SM
    programs: int  # programs that fit on an SM
    share: float  # upper bound of the share of the tensor cores' rate, with that many programs


# --- instructions ----------------------------------------------------------------------------------------------------

_TENSOR = r"HMMA|HGMMA|UTC\w*MMA"
_KINDS = {
    "tensor": _TENSOR,
    "exp": r"MUFU\.EX2",
    "fp": r"FFMA|FMUL|FADD|FMNMX",
    "select": r"FSEL|FSET\b",
    "alu": r"IMAD|ISETP|FSETP|SEL|LOP3|IADD3|LEA|SHF|PRMT|VIADD|MOV|V?IMNMX|F2FP|PLOP3",
    "shared": r"LDSM?\b|STSM?\b",
    "local": r"LDL|STL",
    "copy": r"LDGSTS|LDG|UTMALDG",
    "barrier": r"BAR\b",
    "shuffle": r"SHFL",
}


TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def disassembled(cubin: bytes, *options: str) -> str:
    """The output of nvdisasm. -ndf, no dataflow analysis, is a third faster; only notes are missing."""
    return _tool(cubin, "nvdisasm", "-c", "-ndf", *options)


def usage(cubin: bytes) -> str:
    """The output of cuobjdump about registers and stack."""
    return _tool(cubin, "cuobjdump", "--dump-resource-usage")


@functools.lru_cache(maxsize=32)  # many cases compile the same small kernels
def _tool(cubin: bytes, name: str, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([TOOLS / name, *options, path], capture_output=True, text=True).stdout


def instructions(text: str) -> tuple[list[str], dict[str, int]]:
    """From the output of nvdisasm: the instructions without guards, and for each label the index of the next one."""
    lines, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            lines.append(found[1])
    return lines, labels


def innermost(lines: list[str], labels: dict[str, int], around: str) -> Iterator[list[str]]:
    """The bodies of the innermost loops with an instruction that matches `around`, in the order of the code."""
    ends: dict[int, int] = {}
    for at, line in enumerate(lines):
        target = re.match(r"BRA.*`\(\.(L_x_\d+)\)", line)
        # A loop that waits for a barrier is not a loop of the kernel.
        spins = any("SYNCS.PHASECHK" in x for x in lines[max(at - 3, 0) : at])
        if target and (begin := labels.get(target[1], at + 1)) <= at and not spins:
            ends[begin] = max(at, ends.get(begin, 0))
    loops = [(a, b) for a, b in sorted(ends.items()) if any(re.match(around, x) for x in lines[a : b + 1])]
    for a, b in loops:
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops):
            yield lines[a : b + 1]


def _pipe(line: str, on: Processor) -> tuple[str, float]:
    """The pipe of an instruction, and the cycles that it takes there for one warp. Not for tensor-core instructions."""
    if line.startswith("MUFU"):
        return "mufu", 8
    if re.match(r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2", line):
        return "float32", 128 / on.float32
    if line.startswith("IMAD"):  # runs on the same units
        return "float32", 1 if line.startswith("IMAD.MOV") else 2
    if re.match(r"FMNMX|FSEL|FSETP?|ISETP|SEL|LOP3|IADD3|SHF|LEA|PRMT|PLOP3|V?IMNMX|VIADD|F2FP|MOV", line):
        return "alu", 2
    if re.match(r"SHFL|LDSM?|STSM?|LDG|LDL|STL|STG|RED|ATOM", line):
        return "memory", 4
    return "issue", 0


def _product(line: str, on: Processor) -> tuple[float, float]:
    """The cycles in which a tensor-core instruction computes, and those that it needs to read shared memory.

    The instruction is that of one warpgroup; for HMMA, that of one warp on each scheduler.
    """
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\S*\s+\w+,\s*(gdesc)?", line):
        m, n, k = map(int, found.groups()[:3])
        operands = 2 * k * (n + (m if found[4] else 0))
        return 2 * m * n * k / on.tensor_flops, operands / on.shared_rate
    if found := re.match(r"HMMA\.(16)(8)(\d+)", line):
        m, n, k = map(int, found.groups())
        return 4 * 2 * m * n * k / on.tensor_flops, 0
    return 0, 0


# --- the model -------------------------------------------------------------------------------------------------------


def covered(body: list[str]) -> float:
    """The share of a loop's exponentials that are issued while a product is running.

    Counted in the second of two iterations, since products of the first may still be running then.
    """
    running, exps, beneath = 0, 0, 0
    for iteration in range(2):
        for line in body:
            if line.startswith("HGMMA"):
                running += 1
            elif wait := re.match(r"WARPGROUP\.DEPBAR\S*\s+gsb0,\s*0x(\w+)", line):
                running = min(running, int(wait[1], 16))
            elif line.startswith("MUFU.EX2") and iteration:
                exps, beneath = exps + 1, beneath + (running > 0)
    return beneath / exps if exps else 1.0


def _step(body: list[str], turns: int, on: Processor) -> float:
    """Cycles of a step in steady state. Each scheduler has `turns` warps, whose instructions are issued in order.

    A product runs until there is a wait for it (HGMMA), or while later instructions are issued (HMMA).
    """
    asynchronous = any(line.startswith("HGMMA") for line in body)
    now, tensor, starts = 0.0, 0.0, []
    pipes: collections.Counter[str] = collections.Counter()
    for _ in range(4):
        starts.append(now)
        for line in body:
            now += turns
            if re.match(_TENSOR, line):
                tensor = max(tensor, now) + max(_product(line, on)) * turns
            elif line.startswith("WARPGROUP.DEPBAR"):
                now = max(now, tensor)
            else:
                pipe, cycles = _pipe(line, on)
                pipes[pipe] = max(pipes[pipe], now) + cycles * turns
                now = max(now, pipes[pipe] - 8 * cycles * turns)  # eight instructions may wait for a pipe
        now = max(now, *pipes.values(), 0 if asynchronous else tensor)
    return starts[3] - starts[2]


def _programs(registers: int, shared: int, warps: int, on: Processor) -> int:
    """The number of programs that fit on an SM, which allocates the registers of a warp in units of 256."""
    by_registers = on.registers // (math.ceil(max(registers, 24) * 32 / 256) * 256 * warps)
    return min(by_registers, on.shared // (shared + 1024), on.warps // warps)


def loops(text: str, target: str, registers: int, shared: int, warps: int, flops: int) -> list[Loop]:
    """The loops in the output of nvdisasm for one kernel. `flops`: those of a step's products, each computed once."""
    on, found = PROCESSORS[target], []
    turns = max(warps // 4, 1)
    programs = _programs(registers, shared, warps, on)
    for body in innermost(*instructions(text), _TENSOR):
        mix = {kind: sum(bool(re.match(pattern, x)) for x in body) for kind, pattern in _KINDS.items()}
        cycles = collections.Counter(issue=float(len(body) * turns))
        for line in body:
            pipe, taken = _pipe(line, on)
            cycles[pipe] += taken * turns
        loop = Loop(len(body), mix, {}, 0, covered(body), 0, programs, 0.0)
        if on.tensor_flops:
            cycles["tensor"] = sum(_product(line, on)[0] for line in body) * turns
            cycles["operands"] = sum(max(_product(line, on)) for line in body) * turns
            loop.ideal = flops // on.tensor_flops
            busiest = max(cycles.values())
            step = max(_step(body, turns, on), busiest)
            loop.step, loop.share = round(step), programs * loop.ideal / max(step, programs * busiest)
        loop.cycles = {pipe: round(n) for pipe, n in cycles.items()}
        found.append(loop)
    return found


def flops(kernel: str, constants: dict[str, Any]) -> int:
    """FLOPs of the products in a step of `kernel`, at the padded widths of its tiles."""
    D, DV = constants["BLOCK_D"], constants["BLOCK_DV"]
    # dk and dv: q @ k^T for both, v @ do^T and dS^T @ q for dk, P^T @ do for dv. The pointer of a gradient that is not
    # wanted is a constant.
    dkdv = D + ("dk_ptr" not in constants) * (D + DV) + ("dv_ptr" not in constants) * DV
    widths = {"forward_kernel": D + DV, "dq_kernel": 2 * D + DV, "dkdv_kernel": dkdv}
    return 2 * constants["BLOCK_M"] * constants["BLOCK_N"] * widths[kernel]


def faults(found: list[Loop], target: str, kernel: str, plain: bool) -> list[str]:
    """The faults of loops. `plain`: of a causal call without other options, for which there are more rules."""
    if not found:
        return ["no loop around tensor-core instructions"]
    said = []
    if any(loop.ideal and loop.cycles["tensor"] > loop.ideal for loop in found):
        said.append(COMPUTED_TWICE)
    if not plain:
        return said
    if any(loop.mix["local"] for loop in found):
        said.append(LOCAL_MEMORY)
    inner = min(found, key=lambda loop: loop.instructions)  # the loop without a mask
    if kernel != "dkdv_kernel" and inner.mix["select"]:
        said.append("a select in the unmasked loop")
    return said
