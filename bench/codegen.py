"""What every kernel compiles to, read offline: `python -m bench.codegen [--json FILE]`. No GPU needed.

The package's own launchers run under a driver that stands in for a GPU: Triton specialises and compiles just what it
would there, and the launch is dropped. So nothing here repeats a kernel's signature, and a launcher that does not fit
its kernel fails here. Triton's own cuobjdump and nvdisasm then read the machine code.

Exits with 1 on a spill (of more than 64 bytes in dk and dv), on attention without tensor-core instructions or with a
serialised tensor-core pipeline, on what `bench.sass` and `bench.hopper` find wrong in its loops, on RoPE or RMSNorm
with a loop that has no 128-bit accesses or more instructions than fit beside its bytes, on more shared memory than
a block of the target may have, or where the plain causal kernels of attention are no longer those of
`bench/machine_code.json`: an option that is off costs nothing, or somebody meant it to (`--record`).
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench import hopper, ones, sass, traffic
from llama_kernels.core import device
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention import decode, tables
from llama_kernels.ops.attention.call import AttentionCall

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


# --- what is compiled ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a launcher. `label` names the shape and the options."""

    op: str
    label: str
    launch: Callable[[], Any]
    full: bool = False  # only with --full
    only: str | None = None  # a target; None: all
    ones: bool = False  # with sizes of 1: it must compile and fit; how fast such code is does not matter


def cases() -> Iterator[Case]:
    yield from _rms_norm_cases()
    yield from _rope_cases()
    yield from _qk_norm_rope_cases()
    yield from _attention_cases()
    yield from _rope_attention_cases()
    yield from _decode_cases()
    for call in hopper.calls():
        yield Case("hopper", call.label, call.launch, call.full, only="sm_90")
    for call in ones.calls():
        yield Case(call.op, call.label, call.launch, call.full, ones=True)


def _rms_norm_cases() -> Iterator[Case]:
    half, single = torch.bfloat16, torch.float32
    # Each row of the tile table once, and a width that is no power of two; its neighbours are left to --full.
    for N in (64, 128, 1024, 2048, 4096, 5120, 8192, 14336, 16384, 32768, 65536, 262144):
        yield from _rows_of(N, half, half, N in (64, 2048, 14336, 65536))
    for N in (128, 4096, 8192, 16384, 32768):
        yield from _rows_of(N, single, single, N not in (4096, 16384))
    for N in (16384, 32768):
        yield from _rows_of(N, half, single, N != 16384)


def _rows_of(N: int, dtype: torch.dtype, weight_dtype: torch.dtype, full: bool) -> Iterator[Case]:
    x, weight, rstd = torch.empty(64, N, dtype=dtype), torch.empty(N, dtype=weight_dtype), torch.empty(64, 1)
    for residual in (None, x):
        label = f"N={N}" + " float32" * (dtype == torch.float32) + " float32 weight" * (weight_dtype != dtype)
        label += "" if residual is None else " +residual"
        yield Case("rms_norm", label, lambda a=(x, residual, weight, 1e-6, 0.0): KERNELS["rms_norm_forward"](*a), full)
        grads = (x, residual, x, weight, rstd, 1e-6, 0.0, dtype, True, True)
        yield Case("rms_norm", label, lambda a=grads: KERNELS["rms_norm_backward"](*a), full)


def _rope_cases() -> Iterator[Case]:
    for D, R, Hq, Hkv in ((64, 64, 32, 8), (80, 80, 32, 32), (96, 96, 32, 8), (128, 128, 32, 8), (128, 64, 32, 8),
                          (128, 128, 32, 1), (256, 256, 8, 4)):  # fmt: skip
        for interleaved in (False, True):
            q, k, *angles = _heads(D, R, Hq, Hkv)
            label = f"D={D} R={R} heads={Hq}/{Hkv}" + (" interleaved" if interleaved else "")
            yield Case("rope", label, lambda a=(q, k, *angles, interleaved, False): KERNELS["rope"](*a))
    q, k, *angles = _heads(128, 128, 32, 8)
    yield Case("rope", "D=128 heads=32/8 packed", lambda a=(q, k, k, *angles, False): KERNELS["rope_qkv_backward"](*a))
    cache, slots = torch.empty(1, 8, 64, 128, dtype=q.dtype), angles[-1]
    into = (q, k, k, cache, cache, slots, *angles, False)
    yield Case("rope", "D=128 heads=32/8 into a cache", lambda a=into: KERNELS["rope_into_cache"](*a))
    for interleaved in (False, True):
        label = "D=128 heads=32/8 an angle an element" + " interleaved" * interleaved
        wide = (*_wide_tables(128), angles[-1], interleaved)
        yield Case("rope", label, lambda a=(q, k, *wide, True): KERNELS["rope"](*a), interleaved)


def _qk_norm_rope_cases() -> Iterator[Case]:
    for D, R, Hq, Hkv in ((64, 64, 32, 8), (80, 80, 32, 32), (128, 128, 32, 8), (128, 64, 32, 8), (256, 256, 16, 8)):
        for interleaved in (False, True):
            q, k, *angles = _heads(D, R, Hq, Hkv)
            weights = (torch.empty(D, dtype=q.dtype),) * 2
            label = f"D={D} R={R} heads={Hq}/{Hkv}" + (" interleaved" if interleaved else "")
            rest, full = (*weights, *angles, 1e-6, 0.0, interleaved), D == 80 or (interleaved and (D, R) != (128, 128))
            yield Case("qk_norm_rope", label, lambda a=(q, k, *rest): KERNELS["qk_norm_rope"](*a), full)
            yield Case(
                "qk_norm_rope", label, lambda a=(q, k, q, k, *rest, True): KERNELS["qk_norm_rope_backward"](*a), full
            )
    q, k, *_, position_ids = _heads(128, 128, 32, 8)
    for interleaved in (False, True):
        label = "D=128 heads=32/8 an angle an element" + " interleaved" * interleaved
        weights = (torch.empty(128, dtype=q.dtype),) * 2
        rest = (q, k, q, k, *weights, *_wide_tables(128), position_ids, 1e-6, 0.0, interleaved, True)
        yield Case("qk_norm_rope", label, lambda a=rest: KERNELS["qk_norm_rope_backward"](*a), interleaved)


def _heads(D: int, R: int, Hq: int, Hkv: int) -> tuple[torch.Tensor, ...]:
    """q, k in the memory order of a projection, cos, sin, position_ids."""
    q, k = (torch.empty(1, 32, H, D, dtype=torch.bfloat16).transpose(1, 2) for H in (Hq, Hkv))
    return q, k, torch.empty(32, R // 2), torch.empty(32, R // 2), torch.zeros(1, 32, dtype=torch.int64)


def _wide_tables(D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin as a Hugging Face model in bfloat16 has them."""
    return torch.empty(32, D, dtype=torch.bfloat16), torch.empty(32, D, dtype=torch.bfloat16)


def _attention_cases() -> Iterator[Case]:
    # Every width class with and without masked columns; v narrower than q as multi-head latent attention has it.
    widths = ((16, 16), (32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    for D, DV in widths:
        for dtype in (torch.bfloat16, torch.float32):
            for features in ("causal", "all"):
                # What a class shares with a wider case of its own is left to --full.
                full = (D, DV) not in ((64, 64), (128, 128), (192, 128), (256, 256)) or (
                    dtype == torch.float32 and (features == "all" or D != 128)
                )
                label = f"D={D}" + (f"/{DV}" if DV != D else "") + f" {str(dtype)[6:]} {features}"
                yield Case("attention", label, lambda a=(D, DV, dtype, features == "all"): _attention(*a), full)


def _rope_attention_cases() -> Iterator[Case]:
    """The backward's big kernels, which end with a rotation; the rest is compiled above. Whole heads and parts of them,
    halves and neighbours, the options that hold registers."""
    for D, R, interleaved, dtype, features in (
        (64, 64, False, torch.bfloat16, "causal"), (128, 128, False, torch.bfloat16, "causal"),
        (128, 128, True, torch.bfloat16, "causal"), (128, 64, False, torch.bfloat16, "causal"),
        (256, 128, False, torch.bfloat16, "causal"), (192, 64, True, torch.bfloat16, "causal"),
        (128, 128, False, torch.bfloat16, "all"), (256, 128, True, torch.bfloat16, "all"),
        (128, 128, False, torch.float32, "causal"), (80, 80, True, torch.bfloat16, "causal"),
        (64, 64, True, torch.bfloat16, "all"), (64, 64, False, torch.float32, "causal"),
        (256, 128, False, torch.float32, "causal"), (128, 128, True, torch.bfloat16, "all"),
    ):  # fmt: skip
        label = f"rotated D={D} R={R}" + " interleaved" * interleaved + f" {str(dtype)[6:]} {features}"
        full = (D, R, interleaved, dtype, features) not in (
            (128, 128, False, torch.bfloat16, "causal"), (256, 128, True, torch.bfloat16, "all"),
        )  # fmt: skip
        call = (D, R, interleaved, dtype, features == "all")
        yield Case("attention", label, lambda a=call: _rope_attention(*a), full)


def _decode_cases() -> Iterator[Case]:
    for D in (64, 128, 256):
        for dtype, features in ((torch.bfloat16, "causal"), (torch.bfloat16, "all"), (torch.float32, "all")):
            label = f"D={D} {str(dtype)[6:]} {features}"
            yield Case("decode", label, lambda a=(D, dtype, features == "all"): _decode(*a))
        for dtype in (torch.bfloat16, torch.float32):
            call, full = (D, dtype, True, True), (D, dtype) != (128, torch.bfloat16)
            yield Case("decode", f"D={D} {str(dtype)[6:]} key mask", lambda a=call: _decode(*a), full)


def _decode(D: int, dtype: torch.dtype, everything: bool, masked: bool = False) -> None:
    """One token for four heads a key head, or the most rows that are split, with all options. No call has a window and
    a mask of keys."""
    B, Hkv, Sk = 2, 2, 2048
    Hq, Sq = (8 * Hkv, decode.MOST_ROWS // 8) if everything else (4 * Hkv, 1)
    q, k, v = (torch.empty(B, S, H, D, dtype=dtype).transpose(1, 2) for S, H in ((Sq, Hq), (Sk, Hkv), (Sk, Hkv)))
    bound = torch.zeros(B, Sq, dtype=torch.int32)
    given = (torch.empty(Hq), bound, bound) if everything else (None, None, None)
    softcap, window = 30.0 if everything else None, (64, 0) if everything else (None, 0)
    window = (None, None) if masked else window
    call = AttentionCall(q, k, v, *given, None, None, Sq, Sk, 0.1, softcap, *window)
    decode.launch_decode(call, torch.empty(B, Sk, dtype=torch.bool) if masked else None)


def _attention(D: int, DV: int, dtype: torch.dtype, everything: bool) -> None:
    B, Hq, Hkv, S = 2, 8, 2, 512
    # 512 tokens hold packed sequences too, whose options are compiled together with all the others.
    q, k, v, do = (
        torch.empty(B, S, H, d, dtype=dtype).transpose(1, 2) for H, d in ((Hq, D), (Hkv, D), (Hkv, DV), (Hq, DV))
    )
    lse = torch.empty(B, Hq, S)
    if everything:
        q, k, v, do = (x[0].transpose(0, 1) for x in (q, k, v, do))
        lse = lse[0]
        cu_seqlens, bound = torch.zeros(3, dtype=torch.int32), torch.zeros(S, dtype=torch.int32)
        rest = (bound, bound, cu_seqlens, cu_seqlens, S, S, 0.1, 30.0, 64, 0)
        sinks, dlse = torch.empty(Hq), lse
    else:
        rest = (None, None, None, None, S, S, 0.1, None, None, 0)
        sinks = dlse = None
    KERNELS["attention_forward"](q, k, v, sinks, *rest)
    KERNELS["attention_backward"](do, dlse, q, k, v, do, lse, sinks, *rest, True, True, True, everything, None)


def _rope_attention(D: int, R: int, interleaved: bool, dtype: torch.dtype, everything: bool) -> None:
    B, Hq, Hkv, S = 2, 8, 2, 512
    q, k, v = (torch.empty(B, S, H, D, dtype=dtype).transpose(1, 2) for H in (Hq, Hkv, Hkv))
    lse, bound = torch.empty(B, Hq, S), torch.zeros(B, S, dtype=torch.int32)
    angles = (torch.empty(S, R // 2), torch.empty(S, R // 2), torch.zeros(1, S, dtype=torch.int64), interleaved)
    bounds, numbers = ((bound, bound), (0.1, 30.0, 64, 0)) if everything else ((None, None), (0.1, None, None, 0))
    needed = (True, True, True, False)
    backward = KERNELS["rope_attention_backward"]
    backward(q, None, q, k, v, q, lse, None, *bounds, *angles, *numbers, *needed, None)


# --- compiling under a stand-in driver -------------------------------------------------------------------------------


class StandInDriver:
    """What Triton asks of a driver before it compiles. Each target is a device of its own to Triton's caches."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._name]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_case(name: str, case: Case) -> list[tuple[str, Any]]:
    """The kernels that `case` launches on target `name`: (kernel name, triton's CompiledKernel)."""
    compiled = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.__name__.strip("_"), run(self, *args, grid=grid, warmup=True, **kwargs)))

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tables, "arch_of", lambda _: name),
        mock.patch.object(device, "arch_of", lambda _: name),
    ):
        driver.set_active(StandInDriver(name))
        case.launch()
    return compiled


# --- reading machine code --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """One compiled kernel. Widths are in bits: of global accesses, with how many there are."""

    target: str
    op: str
    kernel: str
    label: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    tensor_core: int
    loads: dict[int, int]
    stores: dict[int, int]
    moves: list[traffic.Loop] = dataclasses.field(default_factory=list)  # of RoPE and RMSNorm on NVIDIA's
    loops: list[sass.Loop] = dataclasses.field(default_factory=list)  # of attention in half precision on NVIDIA's
    faults: list[str] = dataclasses.field(default_factory=list)


_SPILL_LIMITS = {"dkdv_kernel": 64}  # bytes; two accumulators fill the registers


def read(name: str, case: Case, kernel: str, compiled: Any) -> Report:
    reader = _read_nvidia if TARGETS[name].backend == "cuda" else _read_amd
    report = Report(name, case.op, kernel, case.label, compiled.metadata.num_warps, 0, 0, compiled.metadata.shared,
                    0, 0, {}, {})  # fmt: skip
    serialised = reader(compiled, report)
    if report.shared_bytes > 1024 * device.SHARED_KIB[name]:
        report.faults.append(f"{report.shared_bytes} bytes of shared memory, over {device.SHARED_KIB[name]} KiB")
    if case.ones:
        return report
    if report.spill_bytes > _SPILL_LIMITS.get(kernel, 0) * (TARGETS[name].backend == "cuda"):
        report.faults.append(f"spills {report.spill_bytes} bytes")
    if case.op in ("attention", "decode", "hopper") and not re.search("delta|combine|round", kernel):
        if "float32" not in case.label and not report.tensor_core:
            report.faults.append("no tensor-core instruction")
        if case.op == "attention" and "float32" not in case.label and TARGETS[name].backend == "cuda":
            report.faults += sass.faults(report.loops, name, kernel, case.label.endswith(" causal"))
        if serialised:
            report.faults.append("tensor-core pipeline serialised")
        if kernel.startswith("hopper"):
            report.faults += hopper.faults(kernel, case.label, compiled)
    elif not re.search("combine|sum_partials", kernel):
        writes_rows = case.op not in ("attention", "decode", "hopper") and "weight" not in kernel
        if 128 not in report.loads or (writes_rows and 128 not in report.stores):
            report.faults.append("no 128-bit global access")
        report.faults += traffic.faults(report.moves, name)
    return report


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
    matmuls = sum(n for op, n in ops.items() if op.startswith("HGMMA"))
    return bool(matmuls) and ops["WARPGROUP.ARRIVE"] >= matmuls


def _read_amd(compiled: Any, report: Report) -> bool:
    text = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

    report.registers = number("vgpr_count")
    report.spill_bytes = number("private_segment_fixed_size")  # scalar registers spill into vector ones, for free
    report.instructions = len(re.findall(r"^\t[a-z]\w+\b", text, re.MULTILINE))
    report.tensor_core = len(re.findall(r"\bv_mfma_", text))
    for into, verb in ((report.loads, "load"), (report.stores, "store")):
        for width in re.findall(rf"\b(?:global|buffer)_{verb}_(\w+)", text):
            dwords = re.match(r"dwordx(\d)", width)
            bits = 32 * int(dwords[1]) if dwords else 32 if width.startswith("dword") else 16
            into[bits] = into.get(bits, 0) + 1
    return False


# --- what the plain kernels were -------------------------------------------------------------------------------------

_RECORD = Path(__file__).with_name("machine_code.json")


def plain(reports: list[Report]) -> dict[str, dict[str, int]]:
    """What is kept of the kernels of causal attention without any other option, in half precision."""
    return {
        f"{r.target} {r.op} {r.kernel} {r.label}": {
            "instructions": r.instructions,
            "in loops": sum(loop.instructions for loop in r.loops),
            "registers": r.registers,
            "shared_bytes": r.shared_bytes,
            "programs": r.loops[0].programs if r.loops else 0,
        }
        for r in reports
        if r.op in ("attention", "decode", "hopper") and re.match(r"D=\S+ \w*float16 causal$", r.label)
    }


def changes(reports: list[Report], record: dict[str, Any]) -> list[str]:
    """What differs from the record, where that is of this Triton."""
    if record["triton"] != triton.__version__:
        return []
    found = []
    for kernel, now in plain(reports).items():
        then = record["kernels"].get(kernel)
        if then is None:
            found.append(f"{kernel}: not recorded")
        elif then != now:
            found.append(f"{kernel}: " + ", ".join(f"{name} {then[name]} -> {now[name]}" for name in now
                                                   if then[name] != now[name]))  # fmt: skip
    return found


# --- the report ------------------------------------------------------------------------------------------------------


def _work(job: tuple[str, int]) -> list[Report]:
    name, index = job
    case = list(cases())[index]
    return [read(name, case, kernel, compiled) for kernel, compiled in compile_case(name, case)]


def chosen(name: str, case: Case, full: bool) -> bool:
    """Whether `case` is compiled for target `name`. Row tiles of sm_86 are those of sm_80."""
    elsewhere = name == "sm_86" and case.op not in ("attention", "decode")
    return case.only in (None, name) and (full or not (case.full or elsewhere))


def collect(targets: list[str], full: bool, workers: int) -> list[Report]:
    jobs = [(name, i) for i, case in enumerate(cases()) for name in targets if chosen(name, case, full)]
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [report for reports in pool.map(_work, jobs) for report in reports]


def show(reports: list[Report]) -> None:
    columns = "{:8}{:30}{:38}{:>6}{:>6}{:>7}{:>9}{:>8}{:>7}{:>7}  {:22}{:22}{}"
    head = (
        "target",
        "kernel",
        "case",
        "warps",
        "regs",
        "spill",
        "shared",
        "tensor",
        "a byte",
        "issue",
        "loads",
        "stores",
        "",
    )
    print(columns.format(*head))
    for r in reports:
        loads, stores = (" ".join(f"{n}x{bits}" for bits, n in sorted(w.items())) for w in (r.loads, r.stores))
        heaviest = traffic.heaviest(r.moves)
        a_byte = f"{heaviest.instructions_a_byte:.2f}" if heaviest else ""
        share = heaviest and heaviest.share_of_issue(r.target)
        print(columns.format(r.target, r.kernel, r.label, r.warps, r.registers, r.spill_bytes, r.shared_bytes,
                             r.tensor_core, a_byte, f"{share:.0%}" if share else "", loads, stores,
                             "; ".join(r.faults)))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the reports there too")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--full", action="store_true", help="every case for every target, not one of each kind")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help=f"what is found is meant: write {_RECORD.name}")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    if args.record and (args.full or set(args.targets) != set(TARGETS)):
        parser.error("--record takes what is compiled by default")
    reports = collect(args.targets, args.full, args.workers)
    show(reports)
    print("\na byte: instructions of a thread in the heaviest loop, for each byte of global memory that it moves")
    print(f"issue: of those that fit beside a byte at the bandwidth of a copy: {traffic.assumption()}")
    faulty = [r for r in reports if r.faults]
    print(f"\n{len(reports)} kernels with triton {triton.__version__}, {len(faulty)} at fault")
    for r in faulty:
        print(f"{r.target} {r.kernel}, {r.label}: {'; '.join(r.faults)}")
    if args.record:
        record = {"triton": triton.__version__, "kernels": plain(reports)}
        _RECORD.write_text(json.dumps(record, indent=1) + "\n")
    changed = changes(reports, json.loads(_RECORD.read_text()))
    print(*changed, sep="\n", end="\n" if changed else "")
    if args.json:
        records = [dataclasses.asdict(r) for r in reports]
        Path(args.json).write_text(json.dumps({"triton": triton.__version__, "kernels": records}, indent=1) + "\n")
    return 1 if faulty or changed else 0


if __name__ == "__main__":
    sys.exit(main())
