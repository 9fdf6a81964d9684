"""`python -m bench run`: every provider is measured; without a GPU, what can be known without one."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator

import llama_kernels as lk
from bench.commands import without_gpu
from bench.commands.session import in_new_processes, measure, status_of
from bench.measuring import machine, records, timing
from bench.measuring.records import Record, Run
from bench.providers.provider import OURS
from bench.providers.registry import PROVIDERS
from bench.reporting import report
from bench.reporting.drawing import SHOWN_GPU
from bench.reporting.terminal import console, table
from bench.training.scale import scales
from bench.works.presets import DTYPES, OPS, works_of
from bench.works.work import Work
from llama_kernels.core.language import INTERPRETED


def run(args: argparse.Namespace) -> int:
    if INTERPRETED:
        console.print(
            "bench: TRITON_INTERPRET is set, and an interpreter is not timed. `python -m bench parity` runs in it."
        )
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
        console.print("bench: nothing to do: no work of the preset has these ops and shapes")
        return 2
    if gpu and not args.in_process:
        return in_new_processes(args)
    if args.hopper:
        lk.hopper_attention()
    try:
        made = measure(args, works, training, "cuda", timing.Gpu()) if gpu else _estimate(args, works, bool(training))
    except ValueError as e:  # records or a journal that cannot be gone on from
        console.print(f"bench: {e}", soft_wrap=True)
        return 2
    if (status := status_of(made)) is not None:
        return status
    made.extra["providers"] = {
        p.name: {op: p.why_not(op, args.device) or "yes" for op in OPS if p.has(op)} for p in PROVIDERS
    }
    written = report.write(made, args.out)
    if args.json:
        records.write(made, args.json)
        written.append(args.json)
    if args.save and not gpu:
        console.print("not kept in bench/results/: nothing was measured")
    elif args.save:
        kept = (
            records.folder(made.machine["gpu"])
            / f"{made.machine['date'][:10]}-{made.machine['commit'] or 'unknown'}.json"
        )
        records.write(made, kept)
        written.append(kept)
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)
    ours = [r.reason or "" for r in made.records if r.provider.startswith(OURS)]
    wrong = [reason for reason in ours if reason.startswith(("wrong", "left out"))]
    return 1 if wrong else 0


def _estimate(args: argparse.Namespace, works: list[Work], training: bool) -> Run:
    console.print("without a GPU no time is measured. Bounds from bytes and FLOPs, parity in the interpreter, the "
                  "host's cost and the machine code take a minute or two.")  # fmt: skip
    about = machine.describe("cpu")
    with console.status("") as status:
        checked, extra = without_gpu.run(lambda what: status.update(what), args.workers)
        status.update("bounds")
        bounds = without_gpu.estimates(works, about, training)
    for made in _by_work(checked):
        console.print(table(made))
    for row in extra["host"]:
        training_us = f", {row['training']:.0f} us with its backward" if "training" in row else ""
        console.print(
            f"host cost of {row['op']}: {row['forward']:.0f} us forward (goal {row['goal']:.0f}){training_us}"
        )
    faulty = [k for k in extra["codegen"]["kernels"] if k["faults"]]
    console.print(
        f"machine code for {without_gpu.TARGET}: {len(extra['codegen']['kernels'])} kernels, {len(faulty)} at fault"
    )
    shown = [r for r in bounds if r.gpu == SHOWN_GPU and r.direction in ("both", "step")]
    for made in _by_work(shown):
        console.print(table(made))
    return Run(about, {}, checked + bounds, extra)


def _by_work(rs: list[Record]) -> Iterator[list[Record]]:
    for _, group in itertools.groupby(rs, key=lambda r: (r.op, r.shape, str(r.sizes), r.dtype)):
        yield list(group)
