"""Random calls of every op for some minutes: `python -m tests.regressions.fuzz --minutes 10`, `make fuzz MINUTES=10`.

Draws what tests/regressions/test_fuzz.py draws, with new seeds. A failure is shrunk by hypothesis to one line, which is
printed and written to tests/regressions/reproducers.txt, where the suite replays it from then on. Exits with 1 if there
was one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is decorated

import triton
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.internal.conjecture import engine
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llama_kernels.core.language import INTERPRETED
from tests.regressions import draws

BATCH = 50  # cases under one seed
engine.MAX_SHRINKING_SECONDS = 60  # instead of five minutes: the interpreter is slow
# Batches of each round, where they are not 1.
SHARES = {"attention": 3, "norm": 3, "rope": 2, "heads": 3, "rotated": 2}


def hunt(attempt: Callable[..., None], number: int, device: torch.device, counts: Counter[str]) -> str | None:
    """One batch under seed `number`. The line of what fails, or None."""
    last: dict[str, Any] = {}
    failed = False

    @settings(max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @seed(number)
    @given(**draws.DRAWN[attempt])
    def drawn(**arguments: Any) -> None:
        nonlocal failed
        last.clear()
        last.update(arguments)
        counts[attempt.__name__] += not failed  # not the calls that shrink
        try:
            draws.attempt_thrice(attempt, **arguments, device=device)
        except BaseException:
            failed = True
            raise

    try:
        drawn()
    except Exception:  # hypothesis ends with the smallest that fails
        return f"{attempt.__name__}({', '.join(f'{name}={value!r}' for name, value in last.items())})"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.regressions.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="default: %(default)s")
    parser.add_argument("--cases", type=int, help="stop after so many, however long it takes")
    parser.add_argument("--seed", type=int, default=None, help="of the first batch (default: the time)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what was run, as JSON")
    parser.add_argument("--replay", metavar="LINE", help="run this one line and nothing else")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
    if args.replay:
        draws.replay(args.replay, device)
        return 0
    # Uninitialised memory is NaN: what a kernel does not write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    first = int(time.time()) if args.seed is None else args.seed
    start, counts, lines, number, made = time.monotonic(), Counter(), [], first, {}
    path = "compiled" if device.type == "cuda" else "interpreted" if INTERPRETED else "reference path"
    attempts = [f for f in draws.DRAWN for _ in range(SHARES.get(f.__name__, 1))]
    console = Console(width=None if sys.stdout.isatty() else 160)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as progress:
        total = args.cases or 60 * args.minutes
        task = progress.add_task("fuzzing", total=total)

        def so_far() -> float:
            return counts.total() if args.cases else time.monotonic() - start

        while so_far() < total:
            line = hunt(attempts[number % len(attempts)], number, device, counts)
            if line is not None:
                lines.append(line)
                console.print(f"seed {number}: {line}", markup=False, highlight=False, soft_wrap=True)
                with open(Path(__file__).with_name("reproducers.txt"), "a") as kept:
                    kept.write(f"{line}\n")
            number += 1
            progress.update(task, completed=so_far(), description=f"{counts.total()} cases, {len(lines)} failures")
            made = {
                "cases": counts.total(), "of": dict(counts), "failures": lines, "seeds": [first, number - 1],
                "kernels": path, "seconds": round(time.monotonic() - start), "torch": torch.__version__,
                "triton": triton.__version__,
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            }  # fmt: skip
            if args.record:  # after every batch: whoever stops this keeps what was done
                args.record.write_text(json.dumps(made, indent=1) + "\n")
    console.print(f"{counts.total()} cases in {made['seconds']} s, kernels {path}: {len(lines)} failures")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
