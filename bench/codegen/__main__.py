"""What every kernel compiles to, read offline: `python -m bench.codegen [--json FILE]`. No GPU needed.

The package's own launchers run under a driver that stands in for a GPU: Triton specialises and compiles just what it
would there, and the launch is dropped. So nothing here repeats a kernel's signature, and a launcher that does not fit
its kernel fails here. Triton's own cuobjdump and nvdisasm then read the machine code.

Exits with 1 on a spill (of more than 64 bytes in dk and dv), on attention without tensor-core instructions or with a
serialised tensor-core pipeline, on what sass.py and hopper.py find wrong in its loops, on RoPE or RMSNorm with a loop
that has no 128-bit accesses or more instructions than fit beside its bytes, on more shared memory than a block of the
target may have, or where the plain causal kernels of attention differ from `bench/codegen/machine_code.json`: an option
that is off must not change them. `--record` records an intended change.
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
    parser.add_argument("--json", metavar="FILE", help="write the reports there too")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--full", action="store_true", help="every case for every target, not one of each kind")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help=f"what is found is meant: write {record.RECORD.name}")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    if args.record and (args.full or set(args.targets) != set(TARGETS)):
        parser.error("--record takes what is compiled by default")
    reports = collect(args.targets, args.full, args.workers)
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
