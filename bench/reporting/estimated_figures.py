"""Figures of what is known without a GPU: bounds on times, rooflines, and the host time of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bench.gpus import GPUS
from bench.measuring.records import Record
from bench.providers.provider import OURS
from bench.reporting.drawing import (
    LIMIT_COLOR,
    OUR_COLOR,
    PLAIN_COLOR,
    SHOWN_GPU,
    SHOWN_MODEL,
    color_of,
    grid,
    mark_estimate,
    providers_of,
    put_title,
)
from bench.training.scale import TRAINING
from bench.works.models import MODELS
from bench.works.presets import KINDS, MEMORY_BOUND, OPS
from bench.works.work import Work

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def saving_figure(rs: list[Record]) -> Figure:
    """The bound of each provider over ours: each op once, at one model, since the ratios hardly depend on its sizes.

    Points on a line, not bars, so that it does not read as a measured speedup.
    """
    rs = [r for r in rs if r.direction != "both" or r.op in TRAINING]
    unnamed = {r.shape for r in rs if not r.shape.startswith(tuple(MODELS))}
    rs = [r for r in rs if r.gpu == SHOWN_GPU and (SHOWN_MODEL in r.shape or r.shape in unnamed)]
    least = {_row_of(r): r.ms for r in rs if r.provider == OURS}
    others = [r for r in rs if r.provider != OURS and _row_of(r) in least]
    groups = list(dict.fromkeys(map(_row_of, others)))
    figure, (ax,) = grid(1, width=9, height=0.34 * len(groups) + 1.8)
    ax.axvline(1, color=OUR_COLOR, lw=2.5, label=f"bound of {OURS}", zorder=1)
    for name in providers_of(others):
        here = [(r.ms / least[_row_of(r)], groups.index(_row_of(r))) for r in others if r.provider == name]
        x, y = zip(*here, strict=True)
        ax.hlines(y, 1, x, color=color_of(name), lw=1, ls=":")
        ax.plot(x, y, "o", ms=7, mfc="white", mew=1.8, color=color_of(name), label=name)
        for at, row in here:
            side = {"xytext": (7, 0), "ha": "left"} if at >= 1 else {"xytext": (-7, 0), "ha": "right"}
            ax.annotate(f"{at:.1f}", (at, row), textcoords="offset points", va="center", fontsize=7.5, **side)
    ax.set_yticks(range(len(groups)), groups)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    ax.set_xticks([], minor=True)
    ax.margins(x=0.1)
    ax.set(xlabel=f"least time by bytes and FLOPs, over that of {OURS}; computed, {SHOWN_MODEL} on {SHOWN_GPU}")
    ax.legend(loc="lower right", framealpha=0.9, frameon=True, edgecolor="white")
    mark_estimate(ax)
    put_title(figure, f"ESTIMATE, not a measured speedup: {_saved(others, least)}")
    return figure


def _saved(others: list[Record], ours: dict[str, float]) -> str:
    """What fusing saves in ops that are bound by memory."""
    plain, flash = (
        [r.ms / ours[_row_of(r)] for r in others if r.provider == name and r.op in ops]
        for name, ops in (("eager", MEMORY_BOUND), ("sdpa-flash", OPS))
    )
    if not plain:
        return "the least time of each op"
    said = f"in norms and rotations plain PyTorch moves\n{min(plain):.0f} to {max(plain):.0f} times our bytes"
    if not flash:
        return said
    return f"{said}; in attention the bound of FlashAttention is {min(flash):.1f} to {max(flash):.1f} of ours"


def _row_of(r: Record) -> str:
    name = f"{r.op.replace('_', ' ')}, {r.direction}"
    return name if r.shape.startswith(tuple(MODELS)) else f"{name} ({r.shape})"


def roofline_figure(rs: list[Record]) -> Figure:
    figure, (ax,) = grid(1, width=9, height=5)
    present = [g for g in GPUS if any(r.gpu == g for r in rs)]
    for gpu in present:
        ceilings = GPUS[gpu].ceilings
        shown = gpu == SHOWN_GPU
        x = [0.1, ceilings["bfloat16"] * 1e3 / ceilings["copy"], 2e4]
        y = [min(n * ceilings["copy"] / 1e3, ceilings["bfloat16"]) for n in x]
        ax.plot(x, y, color=OUR_COLOR if shown else LIMIT_COLOR, lw=2 if shown else 1)
        rivals = [
            g for g in GPUS if GPUS[g].ceilings["bfloat16"] == ceilings["bfloat16"] and any(r.gpu == g for r in rs)
        ]
        if gpu == rivals[0]:  # GPUs of one rate share their line, and a label
            ax.annotate(", ".join(rivals), (x[-1], y[-1]), xytext=(4, 0), textcoords="offset points", va="center")
    for r in rs:
        shown = (r.gpu, r.provider) == (SHOWN_GPU, OURS) and SHOWN_MODEL in r.shape
        if shown and r.op in ("attention", "decode") and r.direction != "both":
            work = work_of(r)
            x, y = work.flops(r.direction) / work.bytes(r.direction), work.flops(r.direction) / r.ms / 1e9
            ax.plot(x, y, "o", color=OUR_COLOR, ms=7, mfc="white", mew=1.6, zorder=3)
            shift = (-4, -16) if r.op == "decode" else (-60, 10) if r.direction == "forward" else (8, -12)
            ax.annotate(_row_of(r), (x, y), xytext=shift, textcoords="offset points")
    ax.axvspan(0.1, 1, color=OUR_COLOR, alpha=0.08, lw=0)
    ax.text(0.32, 1.5e3, "RoPE, RMSNorm:\nno matrix products,\nbound by memory", fontsize=8, ha="center", va="top")
    ax.set(xscale="log", yscale="log", xlim=(0.1, 2e4), xlabel="FLOPs for each byte that has to be moved",
           ylabel="TFLOP/s that memory and tensor cores allow")  # fmt: skip
    mark_estimate(ax)
    put_title(figure, "ESTIMATE: attention in training is bound by matrix products, decoding by memory\n"
              f"(lines: limits of GPUs; circles: {OURS} at its bound, {SHOWN_MODEL} on {SHOWN_GPU})")  # fmt: skip
    return figure


def work_of(r: Record) -> Work:
    """The work that a record was made from."""
    kind = next(kind for kind in KINDS if kind.op == r.op)
    sizes = {name: tuple(n) if isinstance(n, list) else n for name, n in r.sizes.items()}
    return kind(shape=r.shape, dtype=getattr(torch, r.dtype), **sizes)


def host_figure(rows: list[dict[str, Any]]) -> Figure:
    figure, (ax,) = grid(1, width=9, height=0.32 * len(rows) + 1.6)
    names = [row["op"] for row in rows]
    for offset, what, color in ((-0.2, "forward", OUR_COLOR), (0.2, "training", PLAIN_COLOR)):
        here = [(i + offset, row[what]) for i, row in enumerate(rows) if what in row]
        label = {"forward": "forward", "training": "forward and backward"}[what]
        bars = ax.barh([y for y, _ in here], [x for _, x in here], 0.38, color=color, label=label)
        ax.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    goal = rows[0]["goal"]
    ax.axvline(goal, ls="--", color="#c8452d", lw=1, label=f"goal of a forward, {goal:.0f} µs")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlabel="microseconds of this processor for a call, without the driver's launch")
    ax.legend()
    met = sum(row["forward"] <= goal for row in rows)
    put_title(figure, f"Host time, measured on this CPU: {met} of {len(rows)} forward calls take at most {goal:.0f} µs")
    return figure
