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
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
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
    timing,
    without_gpu,
)
from bench.measure import in_new_processes, measure, status_of
from bench.providers import OURS, PROVIDERS
from bench.records import Record, Run
from bench.terminal import console, table
from bench.work import DIRECTIONS, Work
from llama_kernels.core.language import INTERPRETED

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
    training = [s for s in end_to_end.scales() if s.op in args.ops and args.shapes.lower() in s.shape.lower()]
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
    about = records.machine("cpu")
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


# --- the other commands ----------------------------------------------------------------------------------------------


def check_parity(args: argparse.Namespace) -> int:
    device = "cpu" if INTERPRETED else args.device
    if device == "cuda" and not args.in_process:
        return in_new_processes(args)
    works = [w for w in parity.works([DTYPES[name] for name in args.dtypes]) if w.op in args.ops]
    torch.set_num_threads(1)
    try:
        made = measure(args, works, [], device, None)
    except ValueError as e:
        console.print(f"bench parity: {e}", soft_wrap=True)
        return 2
    if args.json:
        records.write(made, args.json)
    if (status := status_of(made)) is not None:
        return status
    wrong = [r for r in made.records if r.provider == OURS and r.reason]
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
    shown = Table(box=None)
    for name in ("provider", "ops", "here"):
        shown.add_column(name)
    for p in PROVIDERS:
        reasons = {op: p.why_not(op, args.device) for op in OPS if p.has(op)}
        shown.add_row(p.name, ", ".join(reasons), escape(next(filter(None, reasons.values()), "yes")))
    console.print(shown)
    return 0


# --- arguments -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    whole = argparse.ArgumentParser(prog="python -m bench", description=__doc__, **layout)
    commands = whole.add_subparsers(dest="command")
    names, ops = [p.name for p in PROVIDERS], (*OPS, *plots.TRAINING)

    def command(
        name: str, do: Callable[[argparse.Namespace], int], text: str, **defaults: Any
    ) -> Callable[..., argparse.Action]:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(do=do, **defaults)
        return one.add_argument

    def add_measuring(add: Callable[..., argparse.Action], folder: str, minutes: float) -> None:
        """Where, how long, and in which process."""
        add_device(add)
        add(
            "--minutes",
            type=_positive,
            default=minutes,
            help="then the rest is listed as not run (default: %(default)s)",
        )
        add("--out", type=Path, default=Path(folder), metavar="FOLDER", help="default: %(default)s")
        add("--resume", action="store_true", help="go on from FOLDER/records.json: what it has is not measured again")
        add("--patience", type=_positive, default=10, metavar="MINUTES",
            help="a provider that takes longer for one step is left out (default: %(default)s)")  # fmt: skip
        add("--in-process", action="store_true",
            help="in this process, for debuggers: a provider that crashes ends the run")  # fmt: skip

    def add_device(add: Callable[..., argparse.Action]) -> None:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        add("--device", type=_device, choices=("cpu", "cuda"), default=here, help="default here: %(default)s")

    add = command("run", run, "measure (the default command)")
    add("--preset", choices=PRESETS, default="models", help="which shapes (default: %(default)s)")
    add("--ops", nargs="+", choices=ops, default=ops, metavar="OP", help=f"of {', '.join(ops)} (default: all)")
    add("--shapes", default="", metavar="TEXT", help="only shapes with this in their name, as '8B'")
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16")
    add("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="default: all three")
    add("--providers", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    add("--seconds", type=_positive, default=0.5, help="of samples, each direction (default: %(default)s)")
    add_measuring(add, "build/bench", 30)
    add("--json", type=Path, metavar="FILE", help="write the records there too")
    add("--save", action="store_true", help="keep the records in bench/results/<gpu>/")
    add("--workers", type=int, default=os.cpu_count(), help="processes that compile, without a GPU")
    add("--hopper", action="store_true", help="our attention takes its Hopper kernels, which are off by default")

    add = command("parity", check_parity, "numbers only, at small shapes",
                  directions=None, hopper=False, seconds=0.0)  # fmt: skip
    add_measuring(add, "build/parity", math.inf)
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

    add_device(command("providers", list_providers, "who can be measured here, and why not"))
    return whole


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _device(text: str) -> str:
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    args = parser().parse_args(argv, argparse.Namespace(argv=argv))
    return args.do(args)


if __name__ == "__main__":
    sys.exit(main())
