"""`make test`: the suite twice. First the kernels, compiled on a GPU or else in Triton's interpreter; then the path
that CPU tensors take otherwise. Tests marked `once` do not depend on how kernels run: only the second run has them.

    python -m tests.run --workers 8 tests/ops/test_rope.py     other arguments go to pytest

Where Triton's interpreter cannot run, and there is no GPU, the first run is left out, and the reason is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys

import torch

from llama_kernels.core.language import why_not_interpreted


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=1, help="test processes (default: %(default)s)")
    args, arguments = parser.parse_known_args()
    parallel = importlib.util.find_spec("xdist") is not None
    if args.workers > 1 and not parallel:
        print("pytest-xdist is not installed: the tests run in one process.", flush=True)

    def command(workers: int) -> list[str]:
        return [sys.executable, "-m", "pytest", *(["-n", str(workers)] if parallel else []), *arguments]

    kernels_only = [] if "-m" in arguments else ["-m", "not once"]
    why_not = None if torch.cuda.is_available() else why_not_interpreted()
    if why_not:
        print(f"The kernels are not tested. There is no GPU, and {why_not}", flush=True)
    elif code := subprocess.run([*command(args.workers), *kernels_only]).returncode:
        return code
    # One process more than in the first run: many of these tests start processes and wait for them.
    workers = args.workers + (args.workers > 1)
    without_kernels = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    return subprocess.run(command(workers), env=without_kernels).returncode


if __name__ == "__main__":
    sys.exit(main())
