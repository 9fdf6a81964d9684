"""The machine code of every kernel, without a GPU: `python -m bench.codegen [--json FILE]`.

The package's launchers run under a stand-in driver: Triton specialises and compiles exactly what it would on a GPU, and
nothing is launched. So no signature of a kernel is repeated here, and a launcher that does not fit its kernel fails.
Triton's cuobjdump and nvdisasm then read the machine code.

Exits with 1 if any of these is found:

- a spill (in the kernel of dk and dv, of more than 64 bytes; in a Hopper kernel that is off by default, since its
  record was made with another release of Triton, of more than 8 bytes or in a loop);
- more shared memory than a thread block of the target can have;
- attention without tensor-core instructions, with a serialised tensor-core pipeline, or with a fault in its loops that
  sass.py or hopper.py names;
- an instruction that uses a register of an asynchronous product (HGMMA) before the wait for it;
- a minimum of three integers, one of them negated, in which ptxas drops the minus (dropped_signs.py);
- RoPE or RMSNorm with a loop without 128-bit accesses, or with more instructions than can issue while its bytes move;
- a plain causal kernel of attention that differs from `bench/codegen/machine_code.json`, since an option that is off
  must not change it. `--record` records an intended change.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import triton

from bench.codegen import record, traffic
from bench.codegen.collecting import collect
from bench.codegen.compiling import TARGETS
from bench.codegen.reading import Report


def show(reports: list[Report]) -> None:
    columns = "{:8}{:30}{:38}{:>6}{:>6}{:>7}{:>9}{:>8}{:>7}{:>7}  {:22}{:22}{}"
    head = "target kernel case warps regs spill shared tensor a_byte issue loads stores"
    print(columns.format(*head.split(), ""))
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
    parser.add_argument("--json", metavar="FILE", help="also write the reports to FILE")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="compile every case for every target, not one of each kind")
    which.add_argument("--plain", action="store_true", help="only kernels without options, in half precision")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help=f"the changes are intended: write {record.RECORD.name}")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    if args.record and (args.full or args.plain or set(args.targets) != set(TARGETS)):
        parser.error("--record needs the default cases and targets; leave out --full, --plain and --targets")
    reports = collect(args.targets, args.full, args.workers, args.plain)
    show(reports)
    print("\na_byte: instructions of a thread in the heaviest loop, for each byte of global memory that it moves")
    print(f"issue: of those that fit beside a byte at the bandwidth of a copy: {traffic.assumption()}")
    faulty = [r for r in reports if r.faults]
    print(f"\n{len(reports)} kernels with triton {triton.__version__}, {len(faulty)} at fault")
    for r in faulty:
        print(f"{r.target} {r.kernel}, {r.label}: {'; '.join(r.faults)}")
    if args.record:
        record.write(reports)
    changed = record.changes(reports, record.read())
    print(*changed, sep="\n", end="\n" if changed else "")
    if args.json:
        records = [dataclasses.asdict(r) for r in reports]
        Path(args.json).write_text(json.dumps({"triton": triton.__version__, "kernels": records}, indent=1) + "\n")
    return 1 if faulty or changed else 0


if __name__ == "__main__":
    sys.exit(main())
