"""The output of the commands: the console, a progress bar, and a table for each piece of work."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.measuring.records import Record, Run
from bench.providers.provider import OURS
from bench.reporting.absent import absent_line, present
from bench.reporting.report import COLUMNS

console = Console(width=None if sys.stdout.isatty() else 160)


def progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def table(rs: list[Record]) -> Table:
    """One piece of work: a row for each provider and direction, and one row for a provider without any time.

    Providers that cannot run on this machine have no row: `say_absent` names them, at the end.
    """
    first, rs = rs[0], present(rs)
    sizes = ", ".join(f"{name} {n}" for name, n in first.sizes.items() if type(n) is int and n >= 0)
    estimate = f" [yellow]ESTIMATE for {first.gpu}[/]" if first.estimate else ""
    shown = Table(title=f"{first.op}, {first.shape} ({sizes}), {first.dtype}{estimate}", title_justify="left", box=None)
    for name in ("provider", "direction"):
        shown.add_column(name)
    columns = [(name, column) for name, column in COLUMNS if any(map(column, rs))]
    for name, _ in columns:
        shown.add_column(name, justify="right")
    shown.add_column("")
    told = set()
    for r in rs:
        if r.ms is None:
            if r.provider in told:
                continue
            told.add(r.provider)
        cells = [column(r) or "" for _, column in columns]
        style = "bold" if r.provider.startswith(OURS) else "" if r.ms is not None or r.reason is None else "dim"
        shown.add_row(r.provider, r.direction if r.ms is not None else "", *cells, escape(r.reason or ""), style=style)
    return shown


def say_absent(run: Run) -> None:
    """One line about the providers that cannot run on this machine."""
    if line := absent_line(run):
        console.print(escape(line), soft_wrap=True)
