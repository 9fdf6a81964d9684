"""Figures of measurements: speed over size, percent of the ceiling, training, and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bench.measuring.records import Record
from bench.providers.provider import OURS
from bench.reporting.drawing import (
    LIMIT_COLOR,
    bars,
    color_of,
    finding_of,
    grid,
    in_order,
    legend,
    providers_of,
    put_title,
    series,
)
from bench.reporting.sweeps import AXES
from bench.works.errors import UNIT
from bench.works.work import DIRECTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sweep_figure(panels: list[tuple[tuple[str, ...], dict[str, list[tuple[int, Record]]]]]) -> Figure:
    every = [r for _, lines in panels for points in lines.values() for _, r in points]
    figure, axes = grid(len(panels))
    put_title(figure, f"Measured on {every[0].gpu}, {panels[0][0][0]}: {finding_of(every)}")
    for ax, ((op, direction, dtype, family), lines) in zip(axes, panels, strict=True):
        for name, points in lines.items():
            size = {"ms": 4, "lw": 2.2, "zorder": 3} if name == OURS else {"ms": 3, "lw": 1.2, "zorder": 2}
            x, y = zip(*((n, r.rate) for n, r in points), strict=True)
            ax.plot(x, y, "o-", color=color_of(name), label=name, **size)
        some = [r for points in lines.values() for _, r in points]
        roof = sorted({(n, r.ceiling) for points in lines.values() for n, r in points})
        ax.plot(*zip(*roof, strict=True), "--", color=LIMIT_COLOR, lw=1, label="limit: this machine's copy or product")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}")
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
    put_title(figure, f"Measured on {rs[0].gpu}: {finding_of(rs)}")
    for ax, (op, direction) in zip(axes, panels, strict=True):
        here = [r for r in of_op[op] if r.direction == direction]
        shapes = list(dict.fromkeys(r.shape for r in here))
        bars(ax, shapes, series(here, lambda r: r.shape, lambda r: r.percent), "{:.0f}".format)
        ax.axvline(100, ls="--", color=LIMIT_COLOR, lw=1, label="limit: this machine's copy or product")
        ax.set(title=f"{op}, {direction}", xlabel="% of the limit", xlim=(0, 112))
    legend(figure, axes)
    return figure


def training_figure(rs: list[Record]) -> Figure:
    shapes = list(dict.fromkeys((r.op, r.shape) for r in rs))
    figure, axes = grid(2 * len(shapes), height=2.8)
    put_title(figure, f"Training, measured on {rs[0].gpu}: {_gains(rs)}")
    for i, (op, shape) in enumerate(shapes):
        here = [r for r in rs if (r.op, r.shape) == (op, shape)]
        names = [r.provider for r in here]
        for ax, what, value in ((axes[2 * i], "1,000 tokens a second", lambda r: r.rate / 1e3),
                                (axes[2 * i + 1], "peak memory, GiB", lambda r: (r.memory or 0) / 2**30)):  # fmt: skip
            ax.bar_label(
                ax.barh(names, list(map(value, here)), color=list(map(color_of, names))), fmt="%.1f", padding=2
            )
            ax.invert_yaxis()
            ax.margins(x=0.12)
            ax.set(title=f"{op.replace('_', ' ')}, {shape}", xlabel=what)
        limit = here[0].ceiling / 1e3
        axes[2 * i].axvline(limit, ls="--", color=LIMIT_COLOR, lw=1, label="limit: matrix products alone")
    legend(figure, axes)
    return figure


def _gains(rs: list[Record]) -> str:
    """Tokens a second of the patched model over those of the stock one, over all shapes."""
    rates = {(r.op, r.shape, r.provider): r.rate for r in rs}
    gains = [rate / rates[op, shape, "stock"] - 1 for (op, shape, provider), rate in rates.items()
             if provider == OURS and (op, shape, "stock") in rates]  # fmt: skip
    if not gains:
        return "no pair of a stock and a patched model has a time"
    return f"patched by {OURS} {min(gains):+.0%} to {max(gains):+.0%} tokens a second over stock"


def error_speed_figure(timed: list[Record]) -> Figure:
    rs = [r for r in timed if r.error and r.percent and r.direction == "both"]
    rs = rs or [r for r in timed if r.error and r.percent]
    ops, providers = list(dict.fromkeys(r.op for r in rs)), providers_of(rs)
    figure, axes = grid(len(ops))
    put_title(figure, f"Measured on {rs[0].gpu}, {_errors(rs)}" if rs else "no errors of timed calls are known")
    for ax, op in zip(axes, ops, strict=True):
        for name in providers:
            here = [r for r in rs if (r.op, r.provider) == (op, name)]
            if here:
                errors = [r.error / UNIT[getattr(torch, r.dtype)] for r in here]
                size = 6 if name == OURS else 4
                color, x = color_of(name), [r.percent for r in here]
                ax.plot(x, errors, "o", ms=size, alpha=0.8, color=color, label=name)
        ax.axvline(100, ls="--", color=LIMIT_COLOR, lw=1, label="limit: this machine's copy or product")
        ax.set_ylim(bottom=0)
        ax.set_xlim(0, 112)
        ax.set(title=op, xlabel="% of the limit of speed", ylabel="error, in roundings of the dtype")
    legend(figure, axes)
    return figure


def _errors(rs: list[Record]) -> str:
    """The largest errors of ours and of plain PyTorch."""
    most = {name: max((r.error / UNIT[getattr(torch, r.dtype)] for r in rs if r.provider == name), default=None)
            for name in (OURS, "eager")}  # fmt: skip
    said = [f"{value:.2g} for {name}" for name, value in most.items() if value is not None]
    return f"largest error, in roundings: {', '.join(said)}" if said else "errors"


def error_figure(rs: list[Record]) -> Figure:
    rs = [r for r in rs if not r.estimate and r.direction in ("both", "forward")]
    dtypes = list(dict.fromkeys(r.dtype for r in rs))
    groups = list(dict.fromkeys(r.op for r in rs))
    figure, axes = grid(len(dtypes), columns=3, width=4.2, height=max(2.8, 0.6 * len(groups) + 1.2))
    where = "the CPU, kernels in Triton's interpreter" if rs[0].gpu == "none" else rs[0].gpu
    put_title(figure, f"Against float64, on {where}:\n{_errors(rs)}")
    for ax, dtype in zip(axes, dtypes, strict=True):
        here = sorted((r for r in rs if r.dtype == dtype), key=lambda r: r.error)  # series() keeps the largest
        unit = UNIT[getattr(torch, dtype)]
        errors = series(here, lambda r: r.op, lambda r, unit=unit: r.error / unit)
        bars(ax, groups, in_order(rs, errors), "{:.2g}".format)
        limits = {op: 2 * e + 2 for op, e in errors.get("eager", {}).items()}
        rows = [groups.index(op) for op in limits]
        label = "limit: twice eager's error, plus two roundings"
        ax.vlines(
            list(limits.values()), [i - 0.42 for i in rows], [i + 0.42 for i in rows], LIMIT_COLOR, "dashed", label
        )
        ax.margins(x=0.15)
        ax.set(title=dtype, xlabel=f"error, in roundings to {dtype} ({unit:.1e})")
    legend(figure, axes)
    return figure
