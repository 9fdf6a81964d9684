"""Figures of what is known without a GPU: bounds on times, rooflines, and the host time of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bench.gpus import GPUS
from bench.measuring.records import Record
from bench.providers.provider import OURS
from bench.reporting.drawing import COLORS, OUR_COLOR, SHOWN_GPU, SHOWN_MODEL, bars, grid, series
from bench.training.scale import TRAINING
from bench.works.models import MODELS
from bench.works.presets import KINDS
from bench.works.work import Work

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def saving_figure(rs: list[Record]) -> Figure:
    """The bound of each provider over ours: each op once, at one model, since the ratios hardly depend on its sizes."""
    rs = [r for r in rs if r.direction != "both" or r.op in TRAINING]
    unnamed = {r.shape for r in rs if not r.shape.startswith(tuple(MODELS))}
    rs = [r for r in rs if r.gpu == SHOWN_GPU and (SHOWN_MODEL in r.shape or r.shape in unnamed)]
    least = {_row_of(r): r.ms for r in rs if r.provider == OURS}
    others = [r for r in rs if r.provider != OURS and _row_of(r) in least]
    groups = list(dict.fromkeys(map(_row_of, others)))
    figure, (ax,) = grid(1, width=9, height=0.42 * len(groups) + 1)
    bars(ax, groups, series(others, _row_of, lambda r: r.ms / least[_row_of(r)]), lambda x: f"{x:.1f}x")
    ax.axvline(1, color=OUR_COLOR, lw=2.5)
    ax.set_xscale("log")
    ax.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    ax.set_xticks([], minor=True)
    ax.margins(x=0.1)
    ax.set(xlabel=f"bound over that of {OURS} (the line)", title=f"{SHOWN_MODEL} on {SHOWN_GPU}")
    ax.legend(loc="lower right")
    return figure


def _row_of(r: Record) -> str:
    name = f"{r.op.replace('_', ' ')}, {r.direction}"
    return name if r.shape.startswith(tuple(MODELS)) else f"{name} ({r.shape})"


def roofline_figure(rs: list[Record]) -> Figure:
    figure, (ax,) = grid(1, width=9, height=4.8)
    for i, gpu in enumerate(g for g in GPUS if any(r.gpu == g for r in rs)):
        ceilings = GPUS[gpu].ceilings
        x = [0.1, ceilings["bfloat16"] * 1e3 / ceilings["copy"], 2e4]
        y = [min(n * ceilings["copy"] / 1e3, ceilings["bfloat16"]) for n in x]
        ax.plot(x, y, color=COLORS[i], lw=1.4, label=gpu)
    for r in rs:
        shown = (r.gpu, r.provider) == (SHOWN_GPU, OURS) and SHOWN_MODEL in r.shape
        if shown and r.op in ("attention", "decode") and r.direction != "both":
            work = work_of(r)
            x, y = work.flops(r.direction) / work.bytes(r.direction), work.flops(r.direction) / r.ms / 1e9
            ax.plot(x, y, "o", color=OUR_COLOR, ms=7, mfc="white", mew=1.6, zorder=3)
            shift = (8, 8) if r.op == "attention" and r.direction == "forward" else (8, -12)
            ax.annotate(_row_of(r), (x, y), xytext=shift, textcoords="offset points")
    ax.axvspan(0.1, 1, color=OUR_COLOR, alpha=0.08, lw=0)
    ax.text(0.32, 1.5e3, "RoPE, RMSNorm:\nno matrix products,\nbound by memory", fontsize=8, ha="center", va="top")
    ax.set(xscale="log", yscale="log", xlim=(0.1, 2e4), xlabel="FLOPs / least bytes", ylabel="TFLOP/s",
           title=f"circles: {OURS}, {SHOWN_MODEL} on {SHOWN_GPU}, at its bound")  # fmt: skip
    ax.legend(loc="lower right")
    return figure


def work_of(r: Record) -> Work:
    """The work that a record was made from."""
    kind = next(kind for kind in KINDS if kind.op == r.op)
    sizes = {name: tuple(n) if isinstance(n, list) else n for name, n in r.sizes.items()}
    return kind(shape=r.shape, dtype=getattr(torch, r.dtype), **sizes)


def host_figure(rows: list[dict[str, Any]]) -> Figure:
    figure, (ax,) = grid(1, width=7, height=2.6)
    names = [row["op"] for row in rows]
    for offset, what, color in ((-0.2, "forward", OUR_COLOR), (0.2, "training", "#9aa5b1")):
        here = [(i + offset, row[what]) for i, row in enumerate(rows) if what in row]
        label = {"forward": "forward", "training": "forward and backward"}[what]
        bars = ax.barh([y for y, _ in here], [x for _, x in here], 0.38, color=color, label=label)
        ax.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    ax.axvline(rows[0]["goal"], ls="--", color="#c8452d", lw=1, label=f"goal of a forward, {rows[0]['goal']:.0f} µs")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlabel="microseconds a call on this processor")
    ax.legend()
    return figure
