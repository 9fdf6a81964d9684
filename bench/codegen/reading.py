"""Reads the machine code of a compiled kernel with Triton's cuobjdump and nvdisasm, and finds faults in it."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

from bench.codegen import dropped_signs, hopper, product_registers, sass, traffic
from bench.codegen.compiling import TARGETS, Case
from llama_kernels.core import device


@dataclasses.dataclass
class Report:
    """One compiled kernel. `loads` and `stores` count its global accesses by their width in bits."""

    target: str
    op: str
    kernel: str
    label: str
    warps: int
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    instructions: int = 0
    tensor_core: int = 0
    loads: dict[int, int] = dataclasses.field(default_factory=dict)
    stores: dict[int, int] = dataclasses.field(default_factory=dict)
    moves: list[traffic.Loop] = dataclasses.field(default_factory=list)  # of memory-bound kernels on NVIDIA GPUs
    loops: list[sass.Loop] = dataclasses.field(default_factory=list)  # of attention in half precision on NVIDIA GPUs
    faults: list[str] = dataclasses.field(default_factory=list)


_SPILL_LIMITS = {"dkdv_kernel": 64}  # bytes; its two accumulators fill the registers


def read(name: str, case: Case, kernel: str, compiled: Any) -> Report:
    """The report of a kernel that `compile_case` compiled for target `name`."""
    reader = _read_nvidia if TARGETS[name].backend == "cuda" else _read_amd
    metadata = compiled.metadata
    report = Report(name, case.op, kernel, case.label, metadata.num_warps, shared_bytes=metadata.shared)
    serialised = reader(compiled, report)
    if report.shared_bytes > 1024 * device.SHARED_KIB[name]:
        report.faults.append(f"{report.shared_bytes} bytes of shared memory, over {device.SHARED_KIB[name]} KiB")
    if case.ones:
        return report
    if report.spill_bytes > _spill_limit(name, kernel, case.label):
        report.faults.append(f"spills {report.spill_bytes} bytes")
    if case.op in ("attention", "decode", "hopper") and not re.search("delta|combine|round|tile_list", kernel):
        if "float32" not in case.label and not report.tensor_core:
            report.faults.append("no tensor-core instruction")
        if case.op == "attention" and "float32" not in case.label and TARGETS[name].backend == "cuda":
            plain = case.label.endswith(" causal") and not case.wide
            found = sass.faults(report.loops, name, kernel, plain)
            report.faults += [fault for fault in found if not (case.wide and fault == sass.COMPUTED_TWICE)]
        if serialised:
            report.faults.append("tensor-core pipeline serialised")
        if kernel.startswith("hopper"):
            report.faults += hopper.faults(kernel, case.label, compiled)
    elif not re.search("combine|sum_partials|tile_list", kernel):
        writes_rows = case.op not in ("attention", "decode", "hopper") and "weight" not in kernel
        if 128 not in report.loads or (writes_rows and 128 not in report.stores):
            report.faults.append("no 128-bit global access")
        report.faults += traffic.faults(report.moves, name)
    return report


def _spill_limit(name: str, kernel: str, label: str) -> int:
    """Bytes that a kernel may spill on target `name`."""
    if kernel.startswith("hopper"):
        return hopper.spill_limit(kernel, label)
    return _SPILL_LIMITS.get(kernel, 0) if TARGETS[name].backend == "cuda" else 0


# Both fill in the report, and return whether the tensor-core pipeline is serialised.


def _read_nvidia(compiled: Any, report: Report) -> bool:
    usage, code = sass.usage(compiled.asm["cubin"]), sass.disassembled(compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    report.registers, report.spill_bytes = registers, stack
    report.instructions = len(sass.instructions(code)[0])
    ops = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code))
    report.tensor_core = sum(n for op, n in ops.items() if re.match(r"(HMMA|HGMMA|UTC\w*MMA)", op))
    for into, pattern in ((report.loads, r"LDG(?!DEPBAR)"), (report.stores, r"STG")):
        for op, n in ops.items():
            if re.match(pattern, op):
                bits = traffic.width(op)
                into[bits] = into.get(bits, 0) + n
    if report.op not in ("attention", "decode", "hopper"):
        report.moves = traffic.loops(code)
    if report.tensor_core and report.op == "attention":
        constants = {compiled.src.fn.arg_names[at[0]]: x for at, x in compiled.src.constants.items() if len(at) == 1}
        report.loops = sass.loops(code, report.target, registers, report.shared_bytes, report.warps,
                                  sass.flops(report.kernel, constants))  # fmt: skip
    report.faults += product_registers.faults(code) + dropped_signs.faults(compiled.asm["ptx"])
    matmuls = sum(n for op, n in ops.items() if op.startswith("HGMMA"))
    return bool(matmuls) and ops["WARPGROUP.ARRIVE"] >= matmuls


def _read_amd(compiled: Any, report: Report) -> bool:
    text = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

    report.registers = number("vgpr_count")
    report.spill_bytes = number("private_segment_fixed_size")  # scalar registers spill into vector registers at no cost
    report.instructions = len(re.findall(r"^\t[a-z]\w+\b", text, re.MULTILINE))
    report.tensor_core = len(re.findall(r"\bv_mfma_", text))
    for into, verb in ((report.loads, "load"), (report.stores, "store")):
        for width in re.findall(rf"\b(?:global|buffer)_{verb}_(\w+)", text):
            dwords = re.match(r"dwordx(\d)", width)
            bits = 32 * int(dwords[1]) if dwords else 32 if width.startswith("dword") else 16
            into[bits] = into.get(bits, 0) + 1
    return False
