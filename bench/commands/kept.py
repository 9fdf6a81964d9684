"""The commands that measure nothing: `python -m bench compare`, `report` and `providers`."""

from __future__ import annotations

import argparse

from rich.markup import escape
from rich.table import Table

from bench.measuring import records
from bench.measuring.records import Run
from bench.providers.provider import OURS
from bench.providers.registry import PROVIDERS
from bench.reporting import compare, report
from bench.reporting.terminal import console
from bench.works.presets import OPS


def compare_runs(args: argparse.Namespace) -> int:
    provider = None if args.all else OURS
    try:
        before, after = records.read(args.before), records.read(args.after)
        findings = list(compare.compare(before, after, args.threshold / 100, provider))
    except (OSError, ValueError) as e:
        console.print(f"bench compare: {e}", soft_wrap=True)
        return 2
    count = compare.matched(before, after, provider)
    for finding in sorted(findings, key=lambda f: not f.regression):
        color = "red" if finding.regression else "green"
        console.print(f"[{color}]{escape(str(finding))}[/]", soft_wrap=True, highlight=False)
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
    every = {(*r.key, r.gpu): r for one in runs for r in one.records}  # of a row in several files, the last
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
