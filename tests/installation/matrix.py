"""`make matrix`: import, interpreter and compiler with each pair of torch and Triton versions, each in an environment.

    python -m tests.installation.matrix --torch 2.10.0 2.13.0 --triton 3.6.0 newest

Writes build/matrix/table.md. A pair that pip cannot install has the reason in its row. The exit status is 1 if an
installed pair does not work.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = ("2.10.0", "2.11.0", "2.13.0", "newest")  # the oldest that the package takes, and later ones
TRITON = ("3.6.0", "3.7.1", "3.8.0", "newest")  # 3.6 to 3.8: required by torch 2.10, 2.13, 2.14

# The steps for each pair: TRITON_INTERPRET, and the arguments of python.
STEPS = {
    "import": ("0", ("-c", "import llama_kernels as lk, torch; lk.rms_norm(torch.ones(2, 8))")),
    "interpreter": ("1", ("-m", "pytest", "-o", "addopts=", "-q", "tests/regressions/test_corpus.py",
                          "tests/ops/test_rope.py", "-k", "tail_block or first_rows or any_number_of_query")),
    "compiler": ("0", ("-c", """
from bench.codegen import compiling, reading
from bench.codegen.cases import cases
wanted = {"attention": "D=128 bfloat16 all", "rms_norm": "N=4096", "rope": "D=128 R=128 heads=32/8"}
spilled = 0
for case in cases():
    if wanted.get(case.op) == case.label:
        for name, kernel in compiling.compile_case("sm_90", case):
            spilled = max(spilled, reading.read("sm_90", case, name, kernel).spill_bytes)
print("spills", spilled) if spilled else None
""")),
}  # fmt: skip


def run(command: list[str], **env: str) -> tuple[int, str]:
    """The exit status, and the last line of the output."""
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in (done.stderr if done.returncode else done.stdout).splitlines() if line.strip()]
    return done.returncode, lines[-1].strip() if lines else ""


def install(python: str, folder: Path, torch: str, triton: str) -> str | None:
    """Make an environment with the pair. Returns None, or the last line of pip's output if it fails."""
    if (folder / "installed").exists():
        return None
    pair = (("torch", torch), ("triton", triton))
    at = [name if version == "newest" else f"{name}=={version}" for name, version in pair]
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "-q"]
    numpy = "numpy<2.4" if triton.startswith("3.6.") else "numpy"  # llama_kernels.core.versions.interpreter_fault
    # Triton last, whichever version torch requires.
    for command in (
        [python, "-m", "venv", str(folder)],
        [*pip, at[0], numpy, "pytest", "hypothesis"],
        [*pip, at[1]],
    ):
        code, last_line = run(command)
        if code:
            return last_line
    (folder / "installed").touch()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.installation.matrix", description=__doc__.split("\n\n")[0])
    parser.add_argument("--torch", nargs="+", default=TORCH, help="default: %(default)s")
    parser.add_argument("--triton", nargs="+", default=TRITON, help="default: %(default)s")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=ROOT / "build/matrix")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, failed = [], False
    for torch, triton in itertools.product(args.torch, args.triton):
        folder = args.out / f"torch-{torch}-triton-{triton}"
        why_not = install(args.python, folder, torch, triton)
        if why_not:
            cells = [f"not installed: {why_not[:80]}", "", ""]
        else:
            cells = []
            for interpret, command in STEPS.values():
                code, last_line = run([str(folder / "bin/python"), *command], TRITON_INTERPRET=interpret)
                failed |= code != 0
                cells.append(f"FAILS: {last_line[:80]}" if code else last_line[:80] or "ok")
        rows.append((torch, triton, *cells))
        print(" | ".join(rows[-1]), flush=True)
    table = ["| torch | triton | " + " | ".join(STEPS) + " |", "|---" * (2 + len(STEPS)) + "|"]
    table += ["| " + " | ".join(row) + " |" for row in rows]
    (args.out / "table.md").write_text("\n".join(table) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
