"""`python -m bench`: kernels side by side. See docs/bench.md.

python -m bench                       everyone at the shapes of published models; a report in build/bench
python -m bench --preset sweeps       over sizes
python -m bench parity                numbers only, small: a gate for CI
python -m bench compare A.json B.json what became slower; exits with 1 past the threshold
python -m bench report FILES          pictures and page again, from records
python -m bench providers             who can be measured here, and why not
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import llama_kernels as lk
from bench import (
    attention,
    compare,
    end_to_end,
    memory_bound,
    parity,
    plots,
    records,
    report,
    runner,
    timing,
    without_gpu,
)
from bench.providers import OURS, PROVIDERS, Provider
from bench.records import Record, Run
from bench.work import DIRECTIONS, Work
from llama_kernels.language import INTERPRETED

console = Console(width=None if sys.stdout.isatty() else 160)

OPS = (
    *("rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "rope_qkv", "rope_into_cache"),
    *("attention", "rope_attention", "attention_varlen", "decode"),
)
PRESETS = ("models", "sweeps", "attention", "memory_bound", "training", "smoke", "all")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def works_of(preset: str) -> Iterator[Work]:
    packed = attention.AttentionVarlen(
        shape="packed documents", lengths=attention.documents(16384), Hq=32, Hkv=8, D=128
    )
    if preset in ("models", "all"):
        yield from (*memory_bound.models(), *attention.models(), packed)
    if preset in ("sweeps", "memory_bound", "all"):
        yield from memory_bound.sweeps()
    if preset in ("sweeps", "attention", "all"):
        yield from attention.sweeps()
    if preset == "smoke":
        some = itertools.chain(memory_bound.models(), attention.models())
        yield from (*(work for work in some if work.shape.startswith(("Llama 3.2 1B", "Llama 3.1 8B"))), packed)


# --- run -------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    gpu = torch.cuda.is_available()
    if INTERPRETED:
        console.print(
            "bench: TRITON_INTERPRET is set, and an interpreter is not timed. `python -m bench parity` runs in it."
        )
        return 2
    works = [
        dataclasses.replace(work, dtype=DTYPES[name])
        for name in args.dtypes
        for work in works_of(args.preset)
        if work.op in args.ops and args.shapes.lower() in work.shape.lower()
    ]
    training = [s for s in end_to_end.scales() if s.op in args.ops and args.shapes.lower() in s.shape.lower()]
    if args.preset == "smoke":
        training = [s for s in training if not s.whole][:1]
    elif args.preset not in ("models", "training", "all"):
        training = []
    if not works and not training:
        console.print("bench: nothing to do: no work of the preset has these ops and shapes")
        return 2
    if args.hopper:
        lk.hopper_attention()
    if gpu:
        made = measure(args, works, training, "cuda", timing.Gpu())
        made.machine["hopper"] = args.hopper
    else:
        made = _estimate(args, works, bool(training))
    made.extra["providers"] = {
        p.name: {op: p.why_not(op, "cuda" if gpu else "cpu") or "yes" for op in OPS if p.has(op)} for p in PROVIDERS
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
    wrong = [r for r in made.records if r.provider.startswith(OURS) and (r.reason or "").startswith("wrong")]
    return 1 if wrong else 0


def measure(
    args: argparse.Namespace, works: list[Work], training: list[end_to_end.Scale], device: str, clock: runner.Clock
) -> Run:
    """Everyone at `works` and `training`, as far as the minutes go."""
    functorch = importlib.import_module("torch._functorch.config")
    functorch.donated_buffer = False  # a compiled backward runs many times over one forward
    dynamo = importlib.import_module("torch._dynamo.config")
    setattr(dynamo, "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit", 256)
    about = records.machine()
    with console.status("what this machine does at best"):
        ceilings = clock.ceilings()
    console.print(f"{about['gpu']}, driver {about['driver']}, torch {about['torch']}, triton {about['triton']}; "
                  f"copy {ceilings['copy']:,.0f} GB/s, bf16 product {ceilings['bfloat16']:,.0f} TFLOP/s")  # fmt: skip
    end = time.monotonic() + 60 * args.minutes
    options = {"device": device, "clock": clock, "ceilings": ceilings, "about": about,
               "out_of_time": lambda: time.monotonic() > end}  # fmt: skip
    # Training first: to import some peers changes Transformers for the whole process.
    jobs = itertools.chain(
        end_to_end.run(training, end_to_end.VARIATIONS, **options),
        runner.run(works, _chosen(args.providers), directions=args.directions, seconds=args.seconds, **options),
    )
    found = []
    with _progress() as progress:
        task = progress.add_task("measuring", total=len(works) + len(training))
        for made in jobs:
            found += made
            progress.console.print(table(made))
            progress.advance(task)
    return Run(about, ceilings, found, {})


def _chosen(names: Sequence[str] | None) -> list[Provider]:
    return [p for p in PROVIDERS if names is None or p.name in names]


def _estimate(args: argparse.Namespace, works: list[Work], training: bool) -> Run:
    console.print("no GPU here, so no time is measured. Bounds from bytes and FLOPs, parity in the interpreter, the "
                  "host's cost and the machine code take a minute or two.")  # fmt: skip
    about = records.machine()
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
    shown = [r for r in bounds if r.gpu == plots.SHOWN_GPU and r.direction in ("both", "step")]
    for made in _by_work(shown):
        console.print(table(made))
    return Run(about, {}, checked + bounds, extra)


def _by_work(rs: list[Record]) -> Iterator[list[Record]]:
    for _, group in itertools.groupby(rs, key=lambda r: (r.op, r.shape, str(r.sizes), r.dtype)):
        yield list(group)


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def table(rs: list[Record]) -> Table:
    """One piece of work: a row for each provider and direction. Those with one reason for all share a row."""
    first = rs[0]
    sizes = ", ".join(f"{name} {n}" for name, n in first.sizes.items() if type(n) is int and n >= 0)
    estimate = f" [yellow]ESTIMATE for {first.gpu}[/]" if first.estimate else ""
    shown = Table(title=f"{first.op}, {first.shape} ({sizes}), {first.dtype}{estimate}", title_justify="left", box=None)
    for name in ("provider", "direction"):
        shown.add_column(name)
    for name, _ in report.COLUMNS:
        shown.add_column(name, justify="right")
    shown.add_column("")
    told = set()
    for r in rs:
        if r.ms is None:
            if r.provider in told:
                continue
            told.add(r.provider)
        cells = [column(r) or "" for _, column in report.COLUMNS]
        style = "bold" if r.provider.startswith(OURS) else "" if r.ms is not None or r.reason is None else "dim"
        shown.add_row(r.provider, r.direction if r.ms is not None else "", *cells, escape(r.reason or ""), style=style)
    return shown


# --- the other commands ----------------------------------------------------------------------------------------------


def check_parity(args: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    works = [w for w in parity.works([DTYPES[name] for name in args.dtypes]) if w.op in args.ops]
    about, found = records.machine(), []
    torch.set_num_threads(1)
    for made in runner.run(works, _chosen(args.providers), device=device, clock=None, ceilings={}, about=about):
        found += made
        console.print(table(made))
    if args.json:
        records.write(Run(about, {}, found, {}), args.json)
    wrong = [r for r in found if r.provider == OURS and r.reason]
    where = "on the GPU" if device == "cuda" else "in Triton's interpreter" if INTERPRETED else "on the CPU path"
    console.print(f"llama_kernels {where}: {'WRONG' if wrong else 'right'} in {len(works)} pieces of work")
    return 1 if wrong else 0


def compare_runs(args: argparse.Namespace) -> int:
    try:
        before, after = records.read(args.before), records.read(args.after)
        findings = list(compare.compare(before, after, args.threshold / 100, None if args.all else OURS))
    except (OSError, ValueError) as e:
        console.print(f"bench compare: {e}", soft_wrap=True)
        return 2
    count = compare.matched(before, after, None if args.all else OURS)
    for finding in sorted(findings, key=lambda f: not f.regression):
        console.print(
            f"[{'red' if finding.regression else 'green'}]{escape(str(finding))}[/]", soft_wrap=True, highlight=False
        )
    regressions = sum(f.regression for f in findings)
    console.print(f"{count} rows in both, {regressions} regressions, {len(findings) - regressions} faster")
    return 1 if regressions else 0


def redraw(args: argparse.Namespace) -> int:
    try:
        runs = [records.read(file) for file in args.files]
    except (OSError, ValueError) as e:
        console.print(f"bench report: {e}", soft_wrap=True)
        return 2
    last = runs[-1]
    every = {(*r.key, r.gpu): r for one in runs for r in one.records}  # of one row, the last file's
    merged = Run(last.machine, last.ceilings, records.with_ratios(every.values()), last.extra)
    console.print("written: " + ", ".join(map(str, report.write(merged, args.out))), soft_wrap=True)
    return 0


def list_providers(args: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shown = Table(box=None)
    for name in ("provider", "ops", "here"):
        shown.add_column(name)
    for p in PROVIDERS:
        reasons = {op: p.why_not(op, device) for op in OPS if p.has(op)}
        shown.add_row(p.name, ", ".join(reasons), escape(next(filter(None, reasons.values()), "yes")))
    console.print(shown)
    return 0


# --- arguments -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    whole = argparse.ArgumentParser(prog="python -m bench", description=__doc__, **layout)
    commands = whole.add_subparsers(dest="command")
    names, ops = [p.name for p in PROVIDERS], (*OPS, *plots.TRAINING)

    def command(name: str, do: Callable[[argparse.Namespace], int], text: str) -> Callable[..., argparse.Action]:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(do=do)
        return one.add_argument

    add = command("run", run, "measure (the default command)")
    add("--preset", choices=PRESETS, default="models", help="which shapes (default: %(default)s)")
    add("--ops", nargs="+", choices=ops, default=ops, metavar="OP", help=f"of {', '.join(ops)} (default: all)")
    add("--shapes", default="", metavar="TEXT", help="only shapes with this in their name, as '8B'")
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16")
    add("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="default: all three")
    add("--providers", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    add("--seconds", type=_positive, default=0.5, help="of samples, each direction (default: %(default)s)")
    add("--minutes", type=_positive, default=30, help="then the rest is listed as not run (default: %(default)s)")
    add("--out", type=Path, default=Path("build/bench"), metavar="FOLDER", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the records there too")
    add("--save", action="store_true", help="keep the records in bench/results/<gpu>/")
    add("--workers", type=int, default=os.cpu_count(), help="processes that compile, without a GPU")
    add("--hopper", action="store_true", help="our attention takes its Hopper kernels, which are off by default")

    add = command("parity", check_parity, "numbers only, at small shapes")
    add("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--providers", nargs="+", choices=names, metavar="NAME")
    add("--json", type=Path, metavar="FILE")

    add = command("compare", compare_runs, "two files of records; exits with 1 on a regression, 2 if it cannot compare")
    add("before", type=Path)
    add("after", type=Path)
    add("--threshold", type=_positive, default=100 * compare.THRESHOLD, metavar="PERCENT",
        help="slower by more is a regression (default: %(default)s)")  # fmt: skip
    add("--all", action="store_true", help="peers too, not only llama_kernels")

    add = command("report", redraw, "pictures and page from records")
    add("files", type=Path, nargs="+")
    add("--out", type=Path, default=Path("build/bench"), metavar="FOLDER")

    command("providers", list_providers, "who can be measured here, and why not")
    return whole


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    args = parser().parse_args(argv)
    return args.do(args)


if __name__ == "__main__":
    sys.exit(main())
