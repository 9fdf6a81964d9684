"""`python -m llama_kernels`: an environment report for bug reports, and with --check a parity check of the ops."""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from llama_kernels import reference
from llama_kernels.core.language import INTERPRETED
from llama_kernels.diagnose import check
from llama_kernels.diagnose.environment import environment
from llama_kernels.diagnose.kernels import kernels
from llama_kernels.diagnose.text import report_lines
from llama_kernels.ops.attention.tables import FAMILIES


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m llama_kernels",
        description="Print what a bug report needs: this machine, its settings, and which kernels run where.",
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--arch", choices=FAMILIES, help="show the attention tiles of this family of GPUs")
    made.add_argument(
        "--check", nargs="*", metavar="OP",
        help="compare forward and gradients of every op, or of these, with float64 and plain PyTorch, in bfloat16, "
        "float16 and float32; takes about a minute; the exit status is 1 if a check fails",
    )  # fmt: skip
    made.add_argument("--device", help="device of --check: cuda, cuda:1 or cpu; default: the GPU if there is one")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    made = parser()
    args = made.parse_args(arguments)
    if args.check is None:
        if args.device:
            made.error("--device needs --check, whose device it sets")
        report = {"environment": environment(), "kernels": kernels(args.arch)}
        print(json.dumps(report, indent=1) if args.json else "\n".join(report_lines(**report)))
        return 0
    if args.arch:
        made.error("--arch shows tiles; it has no effect with --check")
    if unknown := sorted(set(args.check) - set(reference.__all__)):
        made.error(f"--check: unknown op {', '.join(unknown)}; the ops are {', '.join(reference.__all__)}")
    return _check(_device(made, args.device), args.check, args.json)


def _device(made: argparse.ArgumentParser, name: str | None) -> torch.device:
    """The device of --check. Default: the GPU, or the CPU if there is none or kernels are interpreted."""
    available = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if available and not INTERPRETED else "cpu"))
    except RuntimeError as error:
        made.error(f"--device {name}: {str(error).splitlines()[0]}")
    if device.type not in ("cuda", "cpu"):
        made.error(f"--device {name}: wanted cuda (a CUDA or HIP GPU) or cpu")
    if device.type == "cuda" and not available:
        made.error(f"--device {name}: torch sees no GPU; `python -m llama_kernels` shows its driver")
    return device


def _check(device: torch.device, only: list[str], as_json: bool) -> int:
    """Run and print the parity check. Returns the exit status."""
    start, rows = time.perf_counter(), []
    if not as_json:
        here = {name: x for name, x in environment().items() if name in ("llama_kernels", "system", "packages", "GPUs")}
        print(*report_lines(here), "", check.heading(device), sep="\n", flush=True)
    for row in check.run(device, only):
        rows.append(row)
        if not as_json:
            print(check.line(row), flush=True)
    failed = not all(row.passed for row in rows)
    if as_json:
        found = {"device": str(device), "checked": check.what_is_checked(device), "passed": not failed}
        found["calls"] = [{**row._asdict(), "passed": row.passed} for row in rows]
        print(json.dumps({"environment": environment(), "kernels": kernels(), "check": found}, indent=1))
    else:
        print(check.closing(rows), f"It took {time.perf_counter() - start:.0f} s.", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
