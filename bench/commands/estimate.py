"""`python -m bench estimate`: estimates of speed without a GPU, beside speeds that others published.

Nothing that it prints was measured here. Each of our lines has its uncertainty and the limit that binds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from bench.estimate import errors, layer, layer_picture, published
from bench.estimate.constants import SM_FAMILIES, Gpu, gpus
from bench.estimate.lines import ROWS, Line, lines
from bench.estimate.published import Figure
from bench.estimate.result import LIMITS, Estimate
from bench.reporting.terminal import console


def estimate_speed(args: argparse.Namespace) -> int:
    console.print("Estimates by models of the machine code, not measurements. ±: the mean error of the same model for "
                  "kernels whose speed is known, peers' and ours; 30% where none can be compared.")  # fmt: skip
    try:
        before = json.loads(args.before.read_text()) if args.before else {}
    except (OSError, ValueError) as error:
        console.print(f"bench estimate: --before {args.before}: {error}; it takes a file that --json wrote")
        return 2
    for name in args.gpus:
        if gpus()[name].family not in SM_FAMILIES:
            console.print(f"{name}: there is no model of its SM, so of attention there is decoding alone.")
    written: dict[str, dict[str, Any]] = {}
    for line in (line for name in args.gpus for line in lines(gpus()[name], args.ops, args.hopper)):
        console.print(_table(line, before))
        written |= {
            _key(line, who): {"seconds": e.seconds, "limit": e.limit, "error": e.error} for who, e in line.made.items()
        }
    if args.json:
        args.json.write_text(json.dumps(written, indent=1) + "\n")
    if args.layer is not None:
        _layer(gpus()[args.gpus[0]], args)
    return 0


def _title(line: Line) -> str:
    return f"{line.gpu.name}: {line.what}, {' '.join(f'{k}={v}' for k, v in line.sizes.items())}"


def _key(line: Line, who: str) -> str:
    return f"{_title(line)}, {who}"


def _table(line: Line, before: dict[str, dict[str, Any]]) -> Table:
    """before: estimates of another day, as --json writes them."""
    table = Table(box=None, title=_title(line), title_justify="left")
    for name in ("who", "estimate or published", line.unit, "limit, or source"):
        table.add_column(name)
    for who, e in line.made.items():
        rates = f"{line.amount / e.high:,.0f} to {line.amount / e.low:,.0f}"
        table.add_row(who, _time(e, before.get(_key(line, who))), rates, _limit(e))
    for figure in published_for(line.gpu, line.what, line.sizes):
        table.add_row(figure.who, "published", f"{_rate(figure, line.amount):,.0f}", escape(_where(figure, line.sizes)))
    return table


def _time(e: Estimate, before: dict[str, Any] | None) -> str:
    was = f", was {before['seconds'] * 1e6:,.0f} ({e.seconds / before['seconds'] - 1:+.0%})" if before else ""
    return f"estimate {e.seconds * 1e6:,.0f} us ±{e.error:.0%}{was}"


def _limit(e: Estimate) -> str:
    idle = f"; empty programs take {e.empty / e.seconds:.0%}" if e.empty > 0.01 * e.seconds else ""
    known = "" if e.error < errors.UNKNOWN else "; not calibrated"
    return f"bound by {LIMITS[e.limit]}{idle}{known}"


# --- what others published -------------------------------------------------------------------------------------------


def published_for(gpu: Gpu, what: str, sizes: dict[str, Any]) -> Iterator[Figure]:
    """Published figures of the op on `gpu`, at the same width and length, whatever their batch, heads and mask."""
    same = [k for k in ("N", "S", "D") if k in sizes]
    for figure in published.figures():
        alike = all(figure.sizes.get(k) == sizes[k] for k in same)
        if (figure.what, figure.gpu, figure.clock) == (what, gpu.name, None) and alike:
            yield figure


def _rate(figure: Figure, amount: float) -> float:
    """The published rate, in the unit that `amount` counts. Published times of RMSNorm are of other numbers of rows."""
    if figure.unit != "us":
        return figure.value
    share = float(figure.sizes["M"]) / ROWS * (2 if figure.sizes["dtype"] == "float32" else 1)
    return amount * share / (figure.value * 1e-6)


def _where(figure: Figure, sizes: dict[str, Any]) -> str:
    """Its source, with what is not as in our line."""
    told = {"M", "B", "Hq"} | ({"dtype"} if figure.sizes.get("dtype") == "float32" else set())
    other = [f"{k} {v}" for k, v in figure.sizes.items() if k in told and v != sizes.get(k)]
    if figure.sizes.get("causal") is False:
        other.append("not causal")
    return "; ".join(filter(None, [figure.source, ", ".join(other), figure.note]))


# --- a layer ---------------------------------------------------------------------------------------------------------


def _layer(gpu: Gpu, args: argparse.Namespace) -> None:
    stacks = layer.stacks(gpu, args.hopper, args.peers)
    table = Table(box=None, title=f"{gpu.name}: {layer.TITLE}, estimates", title_justify="left")
    for name in ("stack", "part", "launches", "forward", "backward", "share"):
        table.add_column(name)
    for stack in stacks:
        for part in stack.parts:
            table.add_row(stack.name, part.name, str(part.launches), f"{part.forward * 1e3:.2f} ms",
                          f"{part.backward * 1e3:.2f} ms", f"{part.seconds / stack.seconds:.0%}")  # fmt: skip
        table.add_row(stack.name, "[bold]together[/]", str(stack.launches), f"{stack.forward * 1e3:.2f} ms",
                      f"{stack.backward * 1e3:.2f} ms", "100%")  # fmt: skip
    console.print(table)
    args.layer.parent.mkdir(parents=True, exist_ok=True)
    layer_picture.picture(stacks, gpu).savefig(args.layer)
    console.print(f"written: {args.layer}", soft_wrap=True)
