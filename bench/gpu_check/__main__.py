"""`python -m bench.gpu_check`: every check that needs a GPU, the most valuable first, in stages that can be resumed.

Exits with 0 if all stages passed and nothing became slower, 1 if something is wrong or slower, 2 without a GPU,
3 if nothing is wrong so far and stages are left: the same command continues. See docs/gpu_check.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check import page, run, state
from bench.gpu_check.stages import Machine, Missing, Stage, find_sanitizer, stages
from bench.gpu_check.state import ABSENT, UNFINISHED, Outcome
from bench.measuring import machine
from llama_kernels.core.device import arch_of

PASSED, WRONG, NO_GPU, LEFT = 0, 1, 2, 3
LEAST = 5.0  # seconds; a stage does not begin with less time left


def check(
    made: Iterable[Stage | Missing], folder: Path, about: Mapping[str, Any], workers: int, left: Callable[[], float]
) -> None:
    """Carry out the stages that have not passed yet. `left` returns the seconds until the run ends."""
    for stage in made:
        if isinstance(stage, Missing):
            outcome = Outcome(stage.name, ABSENT, 0.0, stage.why, {}, {})
            state.write(outcome, run.stage_file(folder, stage.name))
            print(page.line(outcome), flush=True)
        elif outcome := run.kept(stage, folder, about):
            print(page.line(outcome), "(earlier)", flush=True)
        elif left() > LEAST:
            print(f"        {stage.name} ...", flush=True)
            outcome = run.carry_out(stage, folder, about, workers, lambda: left() <= 0)
            print(page.line(outcome), flush=True)


def show(made: Sequence[Stage | Missing], wanted: Sequence[Stage | Missing], folder: Path) -> int:
    """Print the page of the results on disk of the stages `made`, and write it to page.md.

    Returns the exit code that follows from the stages `wanted`.
    """
    nothing = [Outcome(stage.name, UNFINISHED, 0.0, "did not begin", {}, {}) for stage in made]
    outcomes = [state.read(run.stage_file(folder, o.name)) or o for o in nothing]
    found = page.Findings.of(folder, outcomes)
    text = page.page(found)
    if found.about:
        (folder / "page.md").write_text(f"```\n{text}\n```\n")
    print(f"\n{text}")
    verdicts = [o for o in outcomes if o.name in {stage.name for stage in wanted}]
    if any(o.wrong for o in verdicts) or found.worse:
        return WRONG
    return LEFT if any(o.status == UNFINISHED for o in verdicts) else PASSED


def put_away(stage: Stage | Missing, folder: Path) -> None:
    """Remove the results of `stage`. Its folder is kept in earlier/ until this is done again."""
    run.stage_file(folder, stage.name).unlink(missing_ok=True)
    own, earlier = folder / stage.name, folder / "earlier" / stage.name
    if own.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        earlier.parent.mkdir(parents=True, exist_ok=True)
        own.rename(earlier)


def chosen(made: Iterable[Stage | Missing], names: Sequence[str] | None) -> list[Stage | Missing]:
    """The stages with these names, and those that they need. With None, all stages."""
    made = list(made)
    if names is None:
        return made
    needed = {stage.needs for stage in made if isinstance(stage, Stage) and stage.name in names}
    return [stage for stage in made if stage.name in needed.union(names)]


class _Clock:
    """Returns the seconds that are left: 0 or less after SIGINT, SIGTERM or SIGHUP."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), self._stop)

    def _stop(self, *_: Any) -> None:
        self.end = 0.0

    def __call__(self) -> float:
        return self.end - time.monotonic()


def parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    made = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__, **layout)
    add, cores = made.add_argument, len(os.sched_getaffinity(0))
    add("--minutes", type=float, default=float("inf"), metavar="N",
        help="end after N minutes, even in a stage; the same command continues later (default: never)")  # fmt: skip
    add("--only", nargs="+", metavar="STAGE", help="only these stages")
    add("--fresh", action="store_true", help="also repeat stages that passed")
    add("--page", action="store_true", help="only print the page of earlier results")
    add("--workers", type=int, default=min(cores, 16), help="test processes that share the GPU (default: %(default)s)")
    add("--out", type=Path, default=Path("build/gpu-check"), metavar="FOLDER", help="default: %(default)s")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    gpu = torch.cuda.is_available()
    if not gpu and not args.page:
        print("gpu-check: torch sees no GPU here. `make test` and `make bench` do not need one.")
        return NO_GPU
    clock, args.out = _Clock(args.minutes), args.out.absolute()
    hopper = gpu and arch_of(torch.device("cuda", torch.cuda.current_device())) == "sm_90"
    every = list(stages(Machine(hopper, find_sanitizer(), len(os.sched_getaffinity(0)))))
    if unknown := set(args.only or ()) - {stage.name for stage in every}:
        known = ", ".join(stage.name for stage in every)
        parser().error(f"--only: no stage is called {', '.join(sorted(unknown))}; the stages are {known}")
    wanted = chosen(every, args.only)
    if not args.page:
        about = machine.describe("cuda")
        for stage in every:
            outdated = isinstance(stage, Stage) and not run.is_current(stage, args.out, about)
            if outdated or (args.fresh and stage in wanted):
                put_away(stage, args.out)
        state.write_json(about, args.out / "machine.json")
        check(wanted, args.out, about, args.workers, clock)
    return show(every, wanted, args.out)


if __name__ == "__main__":
    sys.exit(main())
