"""`python -m bench.codegen.hopper_loops [D=128 causal ...]`: the instructions in each loop of the Hopper kernels."""

from __future__ import annotations

import argparse

from bench.codegen.compiling import compile_case
from bench.codegen.hopper import SHOWN, cases, loops
from bench.codegen.reading import read


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen.hopper_loops", description=__doc__)
    parser.add_argument("words", nargs="*", help="only cases whose label has all of these, such as D=128 or packed")
    words = parser.parse_args().words
    for case in cases():
        if not set(words) <= set(case.label.split()):
            continue
        for kernel, compiled in compile_case("sm_90", case):
            if not kernel.startswith("hopper"):
                continue
            report = read("sm_90", case, kernel, compiled)
            print(f"{kernel}, {case.label}: {report.registers} registers, {report.spill_bytes} bytes of stack, "
                  f"{report.shared_bytes} of shared memory {'; '.join(report.faults)}")  # fmt: skip
            for loop in loops(compiled.asm["cubin"]):
                mix = " ".join(f"{name}={loop.mix[name]}" for name in SHOWN if loop.mix.get(name))
                print(f"    {loop.instructions} instructions, {loop.tensor_cycles} tensor cycles, "
                      f"{loop.covered:.0%} of exponentials covered: {mix}")  # fmt: skip


if __name__ == "__main__":
    main()
