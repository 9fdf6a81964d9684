"""`python -m bench calibrate PEERS`: the models of bench.estimate beside published speeds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from rich.table import Table

from bench.estimate import calibrate, published
from bench.estimate.calibrate import Point
from bench.estimate.result import LIMITS
from bench.reporting.terminal import console


def calibrate_models(args: argparse.Namespace) -> int:
    """Prints each point and the error of each kind. Exits with 2 where the folder has no peer that is known."""
    if not args.peers.is_dir():
        console.print(f"bench calibrate: {args.peers} is no folder; it has to hold the code of peers", soft_wrap=True)
        return 2
    found = []
    for point in calibrate.points(args.peers, lambda text: console.print(text, soft_wrap=True), args.only):
        found.append(point)
        console.print(_line(point), soft_wrap=True, highlight=False)
    if not found:
        console.print("bench calibrate: nothing to compare; docs/performance.md says which peers are known")
        return 2
    if not args.only:
        for who, what, theirs, own in calibrate.unpublished(args.peers, console.print):
            console.print(f"{who}, {what}: estimated {theirs.seconds * 1e6:,.0f} us, nothing published; ours estimated "
                          f"{own.seconds * 1e6:,.0f} us", soft_wrap=True, highlight=False)  # fmt: skip
    console.print(_summary(found))
    if args.record:
        _record(found)
        console.print(f"written: {published.ERRORS}", soft_wrap=True)
    return 0


def _line(point: Point) -> str:
    f = point.figure
    sizes = " ".join(f"{k}={v}" for k, v in f.sizes.items() if k not in ("dtype", "weight"))
    estimated, said = point.estimate.seconds * 1e6, point.published * 1e6
    return (
        f"{f.who}, {f.what}, {f.gpu}{f' at {f.clock} GHz' if f.clock else ''}, {sizes}: estimated {estimated:,.0f} us, "
        f"published {said:,.0f} us, error {point.error:+.0%}, bound by {LIMITS[point.estimate.limit]} ({f.source})"
    )


def _summary(found: Iterable[Point]) -> Table:
    table = Table(box=None)
    for name in ("estimates of", "family", "points", "mean error", "worst"):
        table.add_column(name)
    for (kind, family), error in calibrate.errors(found).items():
        table.add_row(kind, family, str(error.points), f"{error.mean:.1%}", f"{error.worst:+.1%}")
    return table


def _record(found: Iterable[Point]) -> None:
    """The errors of the kinds that were compared; those of other kinds stay."""
    errors = published.errors() | calibrate.errors(found)
    rows = [
        {"kind": kind, "family": family, "mean": round(e.mean, 4), "worst": round(e.worst, 4), "points": e.points}
        for (kind, family), e in sorted(errors.items())
    ]
    published.ERRORS.write_text("[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n")
