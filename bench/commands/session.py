"""Measures all providers at all work of a run. Records are written after each piece of work, so a run can resume."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measuring import machine, processes, records, runner
from bench.measuring.capture import Lost
from bench.measuring.journal import Journal, Step
from bench.measuring.records import Record, Run
from bench.providers.provider import Provider
from bench.providers.registry import PROVIDERS
from bench.reporting.terminal import console, progress, table
from bench.training import runner as training_runner
from bench.training.scale import Scale
from bench.training.variations import VARIATIONS
from bench.works.work import Work

INTERRUPTION = "interrupted"


def chosen(names: Sequence[str] | None) -> list[Provider]:
    """The providers of these names, or all."""
    return [p for p in PROVIDERS if names is None or p.name in names]


def in_new_processes(args: argparse.Namespace) -> int:
    """Run the command that `args` came from in child processes, which a failure may end. Returns its exit status."""

    def command(resume: bool, minutes: float) -> list[str]:
        again = ["--resume"] if resume else []
        return [sys.executable, "-m", "bench.commands.child", *args.argv, "--minutes", str(minutes), *again]

    console.print("starting the process that measures")
    options = {"resume": args.resume, "minutes": args.minutes, "patience": args.patience, "say": console.print}
    try:
        return processes.supervise(command, args.out, **options)
    except ValueError as e:
        console.print(f"bench: {e}", soft_wrap=True)
        return 2


def measure(
    args: argparse.Namespace, works: list[Work], training: list[Scale], device: str, clock: runner.Clock | None
) -> Run:
    """Measure all providers at `works` and `training` until the minutes are over. Without a clock: parity and memory.

    `args.out`/records.json is complete after each piece of work. With args.resume, its rows are not measured again.
    Ctrl-C and the loss of the process end the run early, and `extra["stopped"]` says which. Raises ValueError if the
    records to continue from are of another machine or commit.
    """
    about = {**machine.describe(device), "hopper": args.hopper}
    file, before = args.out / "records.json", None
    if args.resume and file.exists():
        before = _same_machine(file, about)
    providers, variations = chosen(args.providers), VARIATIONS
    run, training, works = _left_to_do(before, about, training, works, providers, args.directions)
    journal = Journal(args.out, fresh=not args.resume)
    _allow_many_calls()
    if clock is not None and not run.ceilings:
        with console.status("measuring the ceilings of this machine"):
            run.ceilings.update(clock.ceilings())
    _say_where(run)
    if before:
        console.print(f"continuing from {file}: {len(training) + len(works)} pieces of work are left", soft_wrap=True)
    records.write(run, file)
    end = time.monotonic() + 60 * args.minutes
    options = {"device": device, "clock": clock, "ceilings": run.ceilings, "about": about, "journal": journal,
               "out_of_time": lambda: time.monotonic() > end}  # fmt: skip
    # Training comes first, because importing some peers changes Transformers for the whole process.
    jobs = itertools.chain(
        training_runner.run(training, variations, **options),
        runner.run(works, providers, directions=args.directions, seconds=args.seconds, **options),
    )
    try:
        with progress() as bar:
            task = bar.add_task("measuring", total=len(training) + len(works))
            journal.watch = lambda step: bar.update(task, description=_in_short(step))
            for made in jobs:
                run.records.extend(made)
                records.write(run, file)
                bar.console.print(table(made))
                bar.advance(task)
    except KeyboardInterrupt:
        run.extra["stopped"] = INTERRUPTION
    except Lost as e:
        run.extra["stopped"] = str(e)
    if stopped := run.extra.get("stopped"):
        records.write(run, file)
        console.print(f"stopped: {stopped}. {file} has what was measured; --resume continues.", soft_wrap=True)
    return run


def _in_short(step: Step) -> str:
    """The step under way, beside the progress bar."""
    return f"{step.work.split(' (')[0]}: {step.provider or 'bench'}, {step.doing}"


def status_of(run: Run) -> int | None:
    """The exit status of a run that ended early; None for a run that came to its end."""
    stopped = run.extra.get("stopped")
    return None if stopped is None else processes.INTERRUPTED if stopped == INTERRUPTION else processes.LOST


def _left_to_do(
    before: Run | None,
    about: dict[str, Any],
    training: list[Scale],
    works: list[Work],
    providers: list[Provider],
    directions: Sequence[str] | None,
) -> tuple[Run, list[Scale], list[Work]]:
    """A run with the records of `before` that are kept, and the training and works that are still to be measured."""
    if before is None:
        return Run(about, {}, [], {}), training, works
    done = {r.key for r in before.records if r.finished}

    def wanted(work: Work | Scale) -> list[Record]:
        if isinstance(work, Scale):
            return list(training_runner.rows_of(work, VARIATIONS, about).values())
        return [r for own in runner.rows_of(work, providers, about, directions).values() for r in own]

    left = [work for work in (*training, *works) if any(r.key not in done for r in wanted(work))]
    again = {r.work for work in left for r in wanted(work)}
    kept = [r for r in before.records if r.work not in again]
    return (
        Run(about, dict(before.ceilings), kept, {}),
        [w for w in training if w in left],
        [w for w in works if w in left],
    )


def _same_machine(file: Path, about: dict[str, Any]) -> Run:
    before = records.read(file)
    for name in ("gpu", "driver", "torch", "triton", "commit", "hopper"):
        was, now = before.machine.get(name), about[name]
        if was != now:
            raise ValueError(
                f"--resume: {file} was measured with {name} {was!r}, and this is {now!r}; choose another --out, or "
                "measure everything again without --resume"
            )
    return before


def _say_where(run: Run) -> None:
    said = "{gpu}, driver {driver}, torch {torch}, triton {triton}".format(**run.machine)
    if run.ceilings:
        copy, product = run.ceilings["copy"], run.ceilings["bfloat16"]
        said += f"; copy {copy:,.0f} GB/s, bf16 product {product:,.0f} TFLOP/s"
    console.print(said)


def _allow_many_calls() -> None:
    """Set torch.compile up for the bench, which compiles many shapes and repeats the backward of one forward."""
    importlib.import_module("torch._functorch.config").donated_buffer = False
    dynamo = importlib.import_module("torch._dynamo.config")
    setattr(dynamo, "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit", 256)
