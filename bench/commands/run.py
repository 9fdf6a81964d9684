"""`python -m bench run`: measures every provider on a GPU, or computes what is known without one."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator

import llama_kernels as lk
from bench.commands import without_gpu
from bench.commands.session import INTERRUPTION, in_new_processes, measure, status_of
from bench.measuring import machine, processes, records, timing
from bench.measuring.records import Record, Run
from bench.providers.provider import OURS
from bench.providers.registry import PROVIDERS
from bench.reporting import report
from bench.reporting.drawing import SHOWN_GPU
from bench.reporting.terminal import console, progress, say_absent, table
from bench.training.scale import scales
from bench.works.presets import DTYPES, OPS, works_of
from bench.works.work import Work
from llama_kernels.core.language import INTERPRETED


def run(args: argparse.Namespace) -> int:
    if INTERPRETED:
        console.print("bench: TRITON_INTERPRET is set, and the interpreter is not timed; try `python -m bench parity`")
        return 2
    gpu = args.device == "cuda"
    works = [
        dataclasses.replace(work, dtype=DTYPES[name])
        for name in args.dtypes
        for work in works_of(args.preset)
        if work.op in args.ops and args.shapes.lower() in work.shape.lower()
    ]
    training = [s for s in scales() if s.op in args.ops and args.shapes.lower() in s.shape.lower()]
    if args.preset == "smoke":
        training = [s for s in training if not s.whole][:1]
    elif args.preset not in ("models", "training", "all"):
        training = []
    if not works and not training:
        console.print("bench: no work of the preset has these ops and shapes")
        return 2
    if gpu and not args.in_process:
        return in_new_processes(args)
    if args.hopper:
        lk.hopper_attention()
    try:
        if gpu:
            made = measure(args, works, training, "cuda", timing.GpuClock())
        else:
            made = _estimate(args, works, bool(training))
    except ValueError as e:  # records or a journal from which the run cannot continue
        console.print(f"bench: {e}", soft_wrap=True)
        return 2
    status = status_of(made)
    if status == processes.LOST:
        return status  # the run continues in a new process, which writes the report
    made.extra["providers"] = {
        p.name: {op: p.why_not(op, args.device) or "yes" for op in OPS if p.has(op)} for p in PROVIDERS
    }
    written = report.write(made, args.out)
    if args.json:
        records.write(made, args.json)
        written.append(args.json)
    if args.save and (not gpu or status is not None):
        console.print("not kept in bench/results/: " + ("the run was interrupted" if gpu else "nothing was measured"))
    elif args.save:
        name = f"{made.machine['date'][:10]}-{made.machine['commit'] or 'unknown'}.json"
        written.append(records.folder(made.machine["gpu"]) / name)
        records.write(made, written[-1])
    say_absent(made)
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)
    if status is not None:
        return status
    ours = [r.reason or "" for r in made.records if r.provider.startswith(OURS)]
    return 1 if any(reason.startswith(("wrong", "left out")) for reason in ours) else 0


def _estimate(args: argparse.Namespace, works: list[Work], training: bool) -> Run:
    """Without a GPU: every part of the results is shown and written to `args.out`/records.json as soon as it is known.

    After Ctrl-C, `extra["stopped"]` says so and the run has the parts that were known.
    """
    console.print("Without a GPU no kernel is timed. Bounds from bytes and FLOPs, parity in the interpreter, machine "
                  "code and host times take two to three minutes on two cores.")  # fmt: skip
    made, file = Run(machine.describe("cpu"), {}, [], {}), args.out / "records.json"
    try:
        with progress() as bar:
            task = bar.add_task("", total=without_gpu.parts(works, training))

            def say(what: str) -> None:
                bar.update(task, description=what)

            for part in without_gpu.run(works, made.machine, training, args.workers, say):
                made.records.extend(part.records)
                made.extra.update(part.extra)
                records.write(made, file)
                _show(part)
                bar.advance(task)
            bar.update(task, total=bar.tasks[0].completed, description="done")
    except KeyboardInterrupt:
        made.extra["stopped"] = INTERRUPTION
        console.print(f"stopped: {INTERRUPTION}. The report has what was known.")
    return made


def _show(part: without_gpu.Part) -> None:
    """Print a part. Of the bounds, only those of one GPU, forward and backward together."""
    bounds = (SHOWN_GPU, "both"), (SHOWN_GPU, "step")
    for made in _by_work([r for r in part.records if not r.estimate or (r.gpu, r.direction) in bounds]):
        console.print(table(made))
    for row in part.extra.get("host", ()):
        training_us = f", {row['training']:.0f} us with its backward" if "training" in row else ""
        goal = f"goal {row['goal']:.0f}"
        console.print(f"host time of {row['op']}: {row['forward']:.0f} us forward ({goal}){training_us}")
    if codegen := part.extra.get("codegen"):
        faulty = sum(bool(kernel["faults"]) for kernel in codegen["kernels"])
        console.print(f"machine code for {without_gpu.TARGET}: {len(codegen['kernels'])} kernels, {faulty} at fault")


def _by_work(rs: list[Record]) -> Iterator[list[Record]]:
    for _, group in itertools.groupby(rs, key=lambda r: (r.op, r.shape, str(r.sizes), r.dtype)):
        yield list(group)
