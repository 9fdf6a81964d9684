"""The report of a run, a self-contained page made from its records. `python -m bench report FILES` makes it again."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.estimate.bounds import ASSUMPTIONS
from bench.measuring import records
from bench.measuring.records import Record, Run
from bench.providers.provider import OURS
from bench.reporting.absent import absent_line, is_absent, present
from bench.reporting.pictures import figures as drawn
from bench.works.work import DIRECTIONS

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #d5dbe1 }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; margin: .6rem 0 }
td, th { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #eceff2; white-space: nowrap }
td.t, th.t { text-align: left } td.why { text-align: left; color: #8a4b2d; white-space: normal }
tr.ours td { background: #eef3f8; font-weight: 600 } tr.first td { border-top: 2px solid #b8c2cc }
.wide { overflow-x: auto } .wide img { max-width: 100%; min-width: 600px }
summary { cursor: pointer; color: #1b3a5c } dt { color: #66727f } dd { margin: 0 }
.estimate { background: #fff3d6; border: 1px solid #e0a030; padding: .7rem 1rem; border-radius: 6px }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; overflow-wrap: anywhere }
details details { margin-left: 1rem }
"""
_HEAD = ("gpu", "driver", "torch", "triton", "python", "commit", "date")
_ESTIMATES = (
    "<b>ESTIMATES.</b> There was no GPU: every time in milliseconds on this page is a bound computed from bytes and "
    "FLOPs; none was measured. Errors, bytes kept for the backward, machine code and host times are real."
)


def page(run: Run, pictures: Sequence[tuple[str, str, bytes]], note: str = "") -> str:
    """The HTML of the report. It contains `pictures` (name, caption, PNG), or `note` in their place."""
    measured = any(r.ms is not None and not r.estimate for r in run.records)
    title = f"llama_kernels on {run.machine['gpu']}" if measured else "llama_kernels: estimates without a GPU"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{_STYLE}</style>",
        f"<h1>{_text(title)}</h1>",
    ]
    if any(r.estimate for r in run.records):
        listed = "".join(f"<li>{_text(a)}</li>" for a in ASSUMPTIONS)
        parts.append(f"<div class=estimate>{_ESTIMATES} Assumed: <ul>{listed}</ul></div>")
    head = {name: run.machine[name] for name in _HEAD if run.machine.get(name)}
    for name, rate in run.ceilings.items():
        head[f"ceiling, {name}"] = f"{rate:,.0f} {'GB/s' if name == 'copy' else 'TFLOP/s'}"
    parts.append("<dl>" + "".join(f"<dt>{name}</dt><dd>{_text(x)}</dd>" for name, x in head.items()) + "</dl>")
    for name, caption, png in pictures:
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        parts.append(f'<h2>{_text(caption)}</h2><div class=wide><img alt="{_text(name)}" src="{source}"></div>')
    if note:
        parts.append(f"<p>{_text(note)}</p>")
    parts += _tables(run)
    return "\n".join(parts) + "\n"


def _text(x: object) -> str:
    return html.escape(str(x))


def _row(cells: Sequence[tuple[str, str]], classes: str = "") -> str:
    """A row of a table from cells (class, HTML)."""
    return f'<tr class="{classes}">' + "".join(f'<td class="{kind}">{x}</td>' for kind, x in cells) + "</tr>"


def _head(left: Sequence[str], right: Sequence[str]) -> str:
    cells = [f"<th class=t>{_text(name)}</th>" for name in left] + [f"<th>{_text(name)}</th>" for name in right]
    return f"<tr>{''.join(cells)}<th></th></tr>"


def _tables(run: Run) -> Iterator[str]:
    shown = present(run.records)
    yield "<h2>Every number</h2>"
    for op, rs in _by_op([r for r in shown if not r.estimate]).items():
        kind = "" if any(r.ms for r in rs) else ": parity"
        yield _folded(f"{op}{kind}, {len(rs)} rows", _table(rs))
    for gpu in dict.fromkeys(r.gpu for r in shown if r.estimate):
        ops = _by_op([r for r in shown if r.estimate and r.gpu == gpu])
        tables = (_folded(f"{op}: estimate for {gpu}, {len(rs)} rows", _table(rs)) for op, rs in ops.items())
        yield _folded(f"estimates for {gpu}, {len(ops)} ops", "".join(tables))
    if kernels := run.extra.get("codegen", {}).get("kernels"):
        yield _folded(f"machine code for {kernels[0]['target']}, {len(kernels)} kernels", _codegen(kernels))
    if state := run.extra.get("providers"):
        here = {name: row for name, row in state.items() if not all(map(is_absent, row.values()))}
        yield "<h2>Which provider has which op</h2>" + _matrix(here)
    if line := absent_line(run):
        yield f"<p>{_text(line)}</p>"


def _by_op(rs: list[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for r in rs:
        groups.setdefault(r.op, []).append(r)
    return groups


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _scrolling(rows: Sequence[str]) -> str:
    """A table that scrolls sideways in itself where the window is narrow, so that the page does not."""
    return "<div class=wide><table>" + "\n".join(rows) + "</table></div>"


COLUMNS = (
    ("ms", lambda r: None if r.ms is None else f"{r.ms:.4f}" if r.ms < 1 else f"{r.ms:.3f}"),
    ("±", lambda r: None if r.spread is None else f"{r.spread:.1%}"),
    ("rate", lambda r: None if r.rate is None else f"{r.rate:,.0f} {r.unit}"),
    ("% of ceiling", lambda r: None if r.percent is None else f"{r.percent:.0f}"),
    ("best other", lambda r: None if r.ratio is None else f"{r.ratio:.2f}x"),
    ("peak MiB", lambda r: None if r.memory is None else f"{r.memory / 2**20:,.1f}"),
    ("kept MiB", lambda r: None if r.saved is None else f"{r.saved / 2**20:,.2f}"),
    ("error", lambda r: None if r.error is None else f"{r.error:.1e}"),
)


def _table(rs: list[Record]) -> str:
    rows = [_head(("shape", "direction", "dtype", "provider"), [name for name, _ in COLUMNS])]
    before = None
    for r in sorted(rs, key=lambda r: _first_seen(rs, r)):
        group = (r.shape, str(r.sizes), r.direction, r.dtype)
        sizes = ", ".join(f"{name}={n}" for name, n in r.sizes.items())
        named = (f'<span title="{_text(sizes)}">{_text(r.shape)}</span>', r.direction, r.dtype)
        cells = [("t", x) for x in (named if group != before else ("", "", ""))]
        cells += [("t", _text(r.provider)), *(("", column(r) or "") for _, column in COLUMNS)]
        classes = ("ours " if r.provider.startswith(OURS) else "") + ("first" if group != before else "")
        rows.append(_row([*cells, ("why", _text(r.reason or ""))], classes))
        before = group
    return _scrolling(rows)


def _first_seen(rs: list[Record], r: Record) -> tuple[int, int]:
    """Sorts the rows of one piece of work together, by direction; otherwise they keep their order."""
    same = next(i for i, o in enumerate(rs) if (o.shape, o.sizes, o.dtype) == (r.shape, r.sizes, r.dtype))
    return same, (*DIRECTIONS, "step").index(r.direction)


def _codegen(kernels: list[dict[str, Any]]) -> str:
    numbers = ("warps", "registers", "spill_bytes", "shared_bytes", "tensor_core")
    rows = [_head(("kernel", "case"), [name.replace("_", " ") for name in numbers])]
    for k in kernels:
        cells = [("t", _text(k["kernel"])), ("t", _text(k["label"])), *(("", str(k[name])) for name in numbers)]
        rows.append(_row([*cells, ("why", _text("; ".join(k["faults"])))]))
    return _scrolling(rows)


def _matrix(state: dict[str, dict[str, str]]) -> str:
    """A table of providers and ops: "yes", or why an op cannot be measured here."""
    ops = list(dict.fromkeys(op for row in state.values() for op in row))
    rows = [_head(("provider", *ops), ())]
    rows += [_row([("t", _text(name)), *(("t", _text(row.get(op, ""))) for op in ops)]) for name, row in state.items()]
    return _scrolling(rows)


def write(run: Run, folder: Path) -> list[Path]:
    """Write records.json, the pictures and report.html into `folder`. Returns the paths of the files.

    Without matplotlib the page has no pictures.
    """
    written, pictures, figures, note = [folder / "records.json"], [], iter(()), ""
    records.write(run, written[0])  # before the pictures, which may fail
    try:
        from matplotlib import pyplot as plt

        figures = drawn(run)
    except ImportError:
        note = "No pictures: matplotlib is not installed here (pip install matplotlib)."
    for name, caption, figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
        pictures.append((name, caption, buffer.getvalue()))
        written.append(folder / f"{name}.png")
        written[-1].write_bytes(buffer.getvalue())
    written.append(folder / "report.html")
    written[-1].write_text(page(run, pictures, note))
    return written
