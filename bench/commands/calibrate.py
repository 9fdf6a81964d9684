"""`python -m bench calibrate [PEERS]`: the models of bench.estimate beside speeds that are known."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterable

from rich.table import Table

from bench.estimate import calibrate, errors, measured
from bench.estimate.calibrate import Point
from bench.estimate.result import LIMITS
from bench.reporting.terminal import console


def calibrate_models(args: argparse.Namespace) -> int:
    """Prints each point and the error of each kind: of our kernels, and with a folder of peers of theirs.

    Exits with 2 where there is nothing to compare.
    """
    if args.peers is not None and not args.peers.is_dir():
        console.print(f"bench calibrate: {args.peers} is no folder; it has to hold the code of peers", soft_wrap=True)
        return 2
    say = functools.partial(console.print, soft_wrap=True, highlight=False)
    theirs = calibrate.points(args.peers, say, args.only) if args.peers else ()
    found = []
    for point in itertools.chain(theirs, measured.points(say, args.only)):
        found.append(point)
        console.print(_line(point), soft_wrap=True, highlight=False)
    if not found:
        console.print("bench calibrate: nothing to compare; docs/performance.md says which peers are known")
        return 2
    if args.peers and not args.only:
        for who, what, theirs, own in calibrate.unpublished(args.peers, say):
            console.print(f"{who}, {what}: estimated {theirs.seconds * 1e6:,.0f} us, nothing published; ours estimated "
                          f"{own.seconds * 1e6:,.0f} us", soft_wrap=True, highlight=False)  # fmt: skip
    console.print(_summary(found))
    if args.record:
        errors.write(errors.errors() | calibrate.errors(found))  # those of other kinds stay
        console.print(f"written: {errors.FILE}", soft_wrap=True)
    return 0


def _line(point: Point) -> str:
    f = point.figure
    sizes = " ".join(f"{k}={v}" for k, v in f.sizes.items() if k not in ("dtype", "weight"))
    estimated, known = point.estimate.seconds * 1e6, point.known * 1e6
    how = "measured" if point.whose == errors.OURS else "published"
    return (
        f"{f.who}, {f.what}, {f.gpu}{f' at {f.clock} GHz' if f.clock else ''}, {sizes}: estimated {estimated:,.0f} us, "
        f"{how} {known:,.0f} us, error {point.error:+.0%}, bound by {LIMITS[point.estimate.limit]} ({f.source})"
    )


def _summary(found: Iterable[Point]) -> Table:
    table = Table(box=None)
    for name in ("estimates of", "family", "kernels of", "points", "mean error", "worst"):
        table.add_column(name)
    for key, error in calibrate.errors(found).items():
        table.add_row(*key, str(error.points), f"{error.mean:.1%}", f"{error.worst:+.1%}")
    return table
