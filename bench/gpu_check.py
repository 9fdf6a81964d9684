"""Everything that one GPU can say in ten minutes, in one folder: `make gpu-check`, or `python -m bench.gpu_check`.

The suite on the compiled kernels, parity of everyone, the smoke preset of the bench with its report, a comparison with
the newest run that bench/results/ keeps for this GPU, and compute-sanitizer over a few tests. Exits with 1 where
anything is wrong or slower.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import records

TESTS = (
    *("test_gpu", "test_corpus", "test_rope", "test_rms_norm", "test_qk_norm_rope", "test_rope_attention"),
    *("test_attention", "test_properties", "test_bench"),
)

# Under compute-sanitizer, with every allocation one of its own: what ends inside a block, and sums over programs.
SANITIZED = ("tests/test_corpus.py", "-k", "tail_block or first_rows")


class Stage(NamedTuple):
    name: str
    command: Sequence[str]
    minutes: float
    env: Mapping[str, str] = {}


class Outcome(NamedTuple):
    name: str
    passed: bool
    seconds: float
    last_line: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.passed else 'FAILS'} {self.name:9} {self.seconds:4.0f} s  {self.last_line}"


def stages(folder: Path, gpu: str, workers: int) -> list[Stage]:
    tests = [f"tests/{name}.py" for name in TESTS]
    found, python = folder / "records.json", (sys.executable, "-m")
    run = (*python, "bench", "run", "--preset", "smoke", "--minutes", "2.5", "--out", str(folder))
    made = [
        Stage("tests", (*python, "pytest", "-n", str(workers), "--maxfail=20", *tests), 3.5),
        Stage("parity", (*python, "bench", "parity", "--json", str(folder / "parity.json")), 0.8),
        Stage("bench", run, 3.2),
    ]
    if before := records.latest(gpu):
        made.append(Stage("compare", (*python, "bench", "compare", str(before), str(found)), 0.3))
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck", "initcheck"):
            command = (sanitizer, "--tool", tool, "--error-exitcode", "1", *python, "pytest", *SANITIZED)
            made.append(Stage(tool, command, 0.7, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    return made


def carry_out(stage: Stage, folder: Path) -> Outcome:
    """Its output goes to <name>.txt in `folder`."""
    start = time.monotonic()
    with open(folder / f"{stage.name}.txt", "w+") as log:
        try:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "env": {**os.environ, **stage.env}}
            code = subprocess.run(stage.command, timeout=60 * stage.minutes, **options).returncode
        except subprocess.TimeoutExpired:
            log.write(f"\nstopped after {stage.minutes} minutes\n")
            code = 124
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    return Outcome(stage.name, code == 0, time.monotonic() - start, lines[-1] if lines else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu-check"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument(
        "--workers", type=int, default=8, help="test processes that share the GPU (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here. `make test` and `make bench` need none.")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    gpu, outcomes = torch.cuda.get_device_name(), []
    for stage in stages(args.out, gpu, args.workers):
        outcomes.append(carry_out(stage, args.out))
        print(outcomes[-1], flush=True)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH: memcheck, racecheck and initcheck were left out")
    if records.latest(gpu) is None:
        print(f"nothing to compare with: bench/results/ has no run of {gpu}; `python -m bench --save` keeps one")
    summary = "\n".join(map(str, outcomes))
    (args.out / "summary.txt").write_text(f"{gpu}\n{summary}\n")
    print(f"everything is in {args.out}, the report in {args.out / 'report.html'}")
    return 0 if all(o.passed for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
