"""Figures of measurements: speed over size, percent of the ceiling, training, and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bench.measuring.records import Record
from bench.providers.provider import OURS
from bench.reporting.drawing import OUR_COLOR, bars, color_of, grid, in_order, legend, providers_of, series
from bench.reporting.sweeps import AXES
from bench.works.errors import UNIT
from bench.works.work import DIRECTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sweep_figure(panels: list[tuple[tuple[str, ...], dict[str, list[tuple[int, Record]]]]]) -> Figure:
    providers = list(dict.fromkeys(name for _, lines in panels for name in lines))
    figure, axes = grid(len(panels))
    for ax, ((op, direction, dtype, family), lines) in zip(axes, panels, strict=True):
        for name, points in lines.items():
            size = {"ms": 4, "lw": 2.2, "zorder": 3} if name.startswith(OURS) else {"ms": 3, "lw": 1.2, "zorder": 2}
            x, y = zip(*((n, r.rate) for n, r in points), strict=True)
            ax.plot(x, y, "o-", color=color_of(name, providers), label=name, **size)
        some = [r for points in lines.values() for _, r in points]
        roof = sorted({(n, r.ceiling) for points in lines.values() for n, r in points})
        ax.plot(*zip(*roof, strict=True), "--", color="#999999", lw=1)
        ax.set_xscale("log", base=2)
        title = ", ".join(filter(None, (direction, dtype, family)))
        ax.set(title=title, xlabel=AXES[op][1], ylabel=some[0].unit)
        ax.set_ylim(0, 1.08 * max(r.ceiling for r in some))
    legend(figure, axes)
    return figure


def models_figure(rs: list[Record]) -> Figure:
    each_way = [d for d in DIRECTIONS[:2] if any(r.direction == d for r in rs)] or ["both"]
    panels = [(op, d) for op in dict.fromkeys(r.op for r in rs) for d in each_way
              if any(r.op == op and r.direction == d for r in rs)]  # fmt: skip
    of_op = {op: [r for r in rs if r.op == op] for op, _ in panels}
    most = max(len({r.shape for r in own}) * len(providers_of(own)) for own in of_op.values())
    figure, axes = grid(len(panels), height=max(2.5, 0.14 * most + 1))
    for ax, (op, direction) in zip(axes, panels, strict=True):
        here = [r for r in of_op[op] if r.direction == direction]
        shapes = list(dict.fromkeys(r.shape for r in here))
        bars(ax, shapes, series(here, lambda r: r.shape, lambda r: r.percent), "{:.0f}".format)
        ax.axvline(100, ls="--", color="#999999", lw=1)
        ax.set(title=f"{op}, {direction}", xlabel="% of the ceiling", xlim=(0, 112))
    legend(figure, axes)
    return figure


def training_figure(rs: list[Record]) -> Figure:
    shapes = list(dict.fromkeys((r.op, r.shape) for r in rs))
    figure, axes = grid(2 * len(shapes), height=2.8)
    for i, (op, shape) in enumerate(shapes):
        here = [r for r in rs if (r.op, r.shape) == (op, shape)]
        for ax, what, value in ((axes[2 * i], "1,000 tokens a second", lambda r: r.rate / 1e3),
                                (axes[2 * i + 1], "peak memory, GiB", lambda r: (r.memory or 0) / 2**30)):  # fmt: skip
            names = [r.provider for r in here]
            colors = [OUR_COLOR if n.startswith(OURS) else "#9aa5b1" for n in names]
            ax.bar_label(ax.barh(names, [value(r) for r in here], color=colors), fmt="%.1f", padding=2)
            ax.invert_yaxis()
            ax.set(title=f"{op.replace('_', ' ')}, {shape}", xlabel=what)
    return figure


def error_speed_figure(timed: list[Record]) -> Figure:
    rs = [r for r in timed if r.error and r.percent and r.direction == "both"]
    rs = rs or [r for r in timed if r.error and r.percent]
    ops, providers = list(dict.fromkeys(r.op for r in rs)), providers_of(rs)
    figure, axes = grid(len(ops))
    for ax, op in zip(axes, ops, strict=True):
        for name in providers:
            here = [r for r in rs if (r.op, r.provider) == (op, name)]
            if here:
                errors = [r.error / UNIT[getattr(torch, r.dtype)] for r in here]
                size = 6 if name == OURS else 4
                color = color_of(name, providers)
                ax.plot([r.percent for r in here], errors, "o", ms=size, alpha=0.8, color=color, label=name)
        ax.set_ylim(bottom=0)
        ax.set(title=op, xlabel="% of the ceiling", ylabel="error over one rounding")
    legend(figure, axes)
    return figure


def error_figure(rs: list[Record]) -> Figure:
    rs = [r for r in rs if not r.estimate and r.direction in ("both", "forward")]
    dtypes = list(dict.fromkeys(r.dtype for r in rs))
    groups = list(dict.fromkeys(r.op for r in rs))
    figure, axes = grid(len(dtypes), columns=3, width=4.2, height=max(2.5, 0.55 * len(groups) + 1.2))
    for ax, dtype in zip(axes, dtypes, strict=True):
        here = sorted((r for r in rs if r.dtype == dtype), key=lambda r: r.error)  # series() keeps the largest
        unit = UNIT[getattr(torch, dtype)]
        errors = series(here, lambda r: r.op, lambda r, unit=unit: r.error / unit)
        bars(ax, groups, in_order(rs, errors), "{:.2g}".format)
        ax.margins(x=0.15)
        ax.set(title=dtype, xlabel=f"error over one rounding to {dtype}, {unit:.1e}")
    legend(figure, axes)
    return figure
