"""The pictures of a report, drawn from records alone."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bench import roofline
from bench.attention import Attention, AttentionVarlen, Decode, RopeAttention
from bench.memory_bound import AddRMSNorm, QKNormRope, RMSNorm, Rope, RopeIntoCache, RopeQKV
from bench.providers import OURS
from bench.records import Record, Run
from bench.work import DIRECTIONS, MODELS, UNIT, Work

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[str, dict[str, float]]  # provider -> group -> value

# What a sweep runs over, and what it is called.
AXES = {
    "rms_norm": ("N", "row length N"),
    "add_rms_norm": ("N", "row length N"),
    "rope": ("S", "tokens a sequence"),
    "qk_norm_rope": ("S", "tokens a sequence"),
    "rope_qkv": ("S", "tokens a sequence"),
    "rope_into_cache": ("B", "sequences"),
    "attention": ("S", "tokens a sequence"),
    "rope_attention": ("S", "tokens a sequence"),
    "decode": ("Sk", "tokens in the cache"),
}
OUR_COLOR = "#1b3a5c"
COLORS = ("#c8452d", "#e0a030", "#5a9e6f", "#7b6fb0", "#4ba3c3", "#b0607f", "#8a8a3c", "#777777", "#c49a6c", "#3f7f7f")
SHOWN_GPU, SHOWN_MODEL = "H100", "Llama 3.1 8B"  # of the estimates, in pictures; the tables have all
TRAINING = ("decoder_layer", "llama")


# --- choosing --------------------------------------------------------------------------------------------------------


def color_of(provider: str, providers: Sequence[str]) -> str:
    if provider.startswith(OURS):
        return OUR_COLOR
    return COLORS[[p for p in providers if not p.startswith(OURS)].index(provider) % len(COLORS)]


def providers_of(rs: Iterable[Record]) -> list[str]:
    """In the order of their first record."""
    return list(dict.fromkeys(r.provider for r in rs))


def sweeps(rs: Iterable[Record]) -> dict[tuple[str, ...], dict[str, list[tuple[int, Record]]]]:
    """(op, direction, dtype, the rest of the sizes) -> provider -> (size, record) in order, of three sizes or more."""
    found: dict[tuple[str, ...], dict[str, dict[int, Record]]] = collections.defaultdict(
        lambda: collections.defaultdict(dict)
    )
    for r in rs:
        if r.op in AXES and r.ms is not None and not r.estimate:
            axis = AXES[r.op][0]
            held = {"B", "M", axis} if r.op != "decode" else {axis}
            family = ", ".join(f"{name}={n}" for name, n in r.sizes.items() if name not in held and n != -1)
            lines = found.setdefault((r.op, r.direction, r.dtype, family), {})
            by_size = lines.setdefault(r.provider, {})
            size, other = r.sizes[axis], by_size.get(r.sizes[axis])
            if other is None or r.rate * r.ms > other.rate * other.ms:  # of one size, the larger work
                by_size[size] = r
    return {
        key: {name: sorted(by_size.items()) for name, by_size in lines.items()}
        for key, lines in found.items()
        if len({size for by_size in lines.values() for size in by_size}) >= 3
    }


# --- pictures --------------------------------------------------------------------------------------------------------


def figures(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """(file name, what it shows, picture)."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                                "axes.titlesize": 10, "legend.frameon": False, "figure.dpi": 110})  # fmt: skip
    timed = [r for r in run.records if r.ms is not None and not r.estimate]
    by_op = collections.defaultdict(list)
    for key, lines in sweeps(timed).items():
        if key[1] != "both":
            by_op[key[0]].append((key, lines))
    for op, panels in by_op.items():
        yield f"speed-{op}", f"{op}: speed over size; the dashed line is this machine's ceiling", _sweep_figure(panels)
    trained = [r for r in timed if r.op in TRAINING]
    widths = [r for r in timed if r.op not in TRAINING and r.shape.startswith(tuple(MODELS))]
    if widths:
        yield "models", "Published models' shapes: percent of the ceiling", _models_figure(widths)
    if trained:
        yield "training", "Training with Transformers: tokens a second, peak memory", _training_figure(trained)
    wrong = [r for r in run.records if r.error is not None]
    if timed and wrong:
        yield "error", "Error beside speed: lower right is better", _error_speed_figure(timed)
    elif wrong:
        yield "error", "Relative error against float64, worst of outputs and gradients", _error_figure(wrong)
    if any(r.estimate for r in run.records):
        estimated = [r for r in run.records if r.estimate and r.ms is not None]
        yield (
            "saving",
            f"Estimate ({SHOWN_GPU}): the least time each way of computing needs, over ours",
            _saving_figure(estimated),
        )
        yield (
            "roofline",
            "Estimate: the roof of each GPU, and where the work stands under it",
            _roofline_figure(estimated),
        )
    if host := run.extra.get("host"):
        yield "host", "Host cost of a call, without the driver's launch", _host_figure(host)


def _grid(count: int, width: float = 5.0, height: float = 3.4, columns: int = 2) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot as plt

    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:count])


def _sweep_figure(panels: list[tuple[tuple[str, ...], dict[str, list[tuple[int, Record]]]]]) -> Figure:
    providers = list(dict.fromkeys(name for _, lines in panels for name in lines))
    figure, axes = _grid(len(panels))
    for ax, ((op, direction, dtype, family), lines) in zip(axes, panels, strict=True):
        for name, points in lines.items():
            size = {"ms": 4, "lw": 2.2, "zorder": 3} if name.startswith(OURS) else {"ms": 3, "lw": 1.2, "zorder": 2}
            x, y = zip(*((n, r.rate) for n, r in points), strict=True)
            ax.plot(x, y, "o-", color=color_of(name, providers), label=name, **size)
        some = [r for points in lines.values() for _, r in points]
        roof = sorted({(n, r.ceiling) for points in lines.values() for n, r in points})
        ax.plot(*zip(*roof, strict=True), "--", color="#999999", lw=1)
        ax.set_xscale("log", base=2)
        ax.set(
            title=f"{direction}, {dtype}" + (f", {family}" if family else ""), xlabel=AXES[op][1], ylabel=some[0].unit
        )
        ax.set_ylim(0, 1.08 * max(r.ceiling for r in some))
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels, below."""
    found: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 6))


def _bars(ax: Axes, groups: Sequence[str], series: Series, show: Callable[[float], str]) -> None:
    """Horizontal bars: a group on the y axis, a bar for each of the series that has it."""
    providers = list(series)
    height = 0.8 / max((sum(g in values for values in series.values()) for g in groups), default=1)
    for name, values in series.items():
        here = [(i, g) for i, g in enumerate(groups) if g in values]
        y = []
        for i, g in here:
            present = [p for p in providers if g in series[p]]
            y.append(i + (present.index(name) - (len(present) - 1) / 2) * height)
        widths = [values[g] for _, g in here]
        bars = ax.barh(y, widths, height, label=name, color=color_of(name, providers))
        ax.bar_label(bars, list(map(show, widths)), fontsize=7, padding=2)
    ax.set_yticks(range(len(groups)), groups)
    ax.invert_yaxis()


def _series(rs: Iterable[Record], group: Callable[[Record], str], value: Callable[[Record], float]) -> Series:
    series: dict[str, dict[str, float]] = {}
    for r in rs:
        series.setdefault(r.provider, {})[group(r)] = value(r)
    return series


def _models_figure(rs: list[Record]) -> Figure:
    each_way = [d for d in DIRECTIONS[:2] if any(r.direction == d for r in rs)] or ["both"]
    panels = [(op, d) for op in dict.fromkeys(r.op for r in rs) for d in each_way
              if any(r.op == op and r.direction == d for r in rs)]  # fmt: skip
    most = max(
        len({r.shape for r in rs if r.op == op}) * len(providers_of(r for r in rs if r.op == op)) for op, _ in panels
    )
    figure, axes = _grid(len(panels), height=max(2.5, 0.14 * most + 1))
    for ax, (op, direction) in zip(axes, panels, strict=True):
        here = [r for r in rs if (r.op, r.direction) == (op, direction)]
        _bars(
            ax,
            list(dict.fromkeys(r.shape for r in here)),
            _series(here, lambda r: r.shape, lambda r: r.percent),
            "{:.0f}".format,
        )
        ax.axvline(100, ls="--", color="#999999", lw=1)
        ax.set(title=f"{op}, {direction}", xlabel="% of the ceiling", xlim=(0, 112))
    _legend(figure, axes)
    return figure


def _training_figure(rs: list[Record]) -> Figure:
    shapes = list(dict.fromkeys((r.op, r.shape) for r in rs))
    figure, axes = _grid(2 * len(shapes), height=2.8)
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


def _error_speed_figure(timed: list[Record]) -> Figure:
    rs = [r for r in timed if r.error and r.percent and r.direction == "both"]
    rs = rs or [r for r in timed if r.error and r.percent]
    ops, providers = list(dict.fromkeys(r.op for r in rs)), providers_of(rs)
    figure, axes = _grid(len(ops))
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
    _legend(figure, axes)
    return figure


def _error_figure(rs: list[Record]) -> Figure:
    rs = [r for r in rs if not r.estimate and r.direction in ("both", "forward")]
    dtypes = list(dict.fromkeys(r.dtype for r in rs))
    groups = list(dict.fromkeys(r.op for r in rs))
    figure, axes = _grid(len(dtypes), columns=3, width=4.2, height=max(2.5, 0.55 * len(groups) + 1.2))
    for ax, dtype in zip(axes, dtypes, strict=True):
        here = sorted((r for r in rs if r.dtype == dtype), key=lambda r: r.error)  # of several shapes the worst
        unit = UNIT[getattr(torch, dtype)]
        _bars(
            ax,
            groups,
            _in_order(rs, _series(here, lambda r: r.op, lambda r, unit=unit: r.error / unit)),
            "{:.2g}".format,
        )
        ax.margins(x=0.15)
        ax.set(title=dtype, xlabel=f"error over one rounding to {dtype}, {unit:.1e}")
    _legend(figure, axes)
    return figure


def _in_order(rs: Iterable[Record], series: dict[str, Any]) -> dict[str, Any]:
    return {name: series[name] for name in providers_of(rs) if name in series}


def _saving_figure(rs: list[Record]) -> Figure:
    """Each op once, at one model: the ratios hardly depend on the width."""
    rs = [r for r in rs if r.direction != "both" or r.op in TRAINING]
    unnamed = {r.shape for r in rs if not r.shape.startswith(tuple(MODELS))}
    rs = [r for r in rs if r.gpu == SHOWN_GPU and (SHOWN_MODEL in r.shape or r.shape in unnamed)]
    least = {_row_of(r): r.ms for r in rs if r.provider == OURS}
    others = [r for r in rs if r.provider != OURS and _row_of(r) in least]
    groups = list(dict.fromkeys(map(_row_of, others)))
    figure, (ax,) = _grid(1, width=9, height=0.42 * len(groups) + 1)
    _bars(ax, groups, _series(others, _row_of, lambda r: r.ms / least[_row_of(r)]), lambda x: f"{x:.1f}x")
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


def _roofline_figure(rs: list[Record]) -> Figure:
    figure, (ax,) = _grid(1, width=9, height=4.8)
    for i, gpu in enumerate(g for g in roofline.GPUS if any(r.gpu == g for r in rs)):
        ceilings = roofline.GPUS[gpu].ceilings
        x = [0.1, ceilings["bfloat16"] * 1e3 / ceilings["copy"], 2e4]
        ax.plot(
            x, [min(n * ceilings["copy"] / 1e3, ceilings["bfloat16"]) for n in x], color=COLORS[i], lw=1.4, label=gpu
        )
    for r in rs:
        shown = (r.gpu, r.provider) == (SHOWN_GPU, OURS) and SHOWN_MODEL in r.shape
        if shown and r.op in ("attention", "decode") and r.direction != "both":
            work = work_of(r)
            x, y = work.flops(r.direction) / work.bytes(r.direction), work.flops(r.direction) / r.ms / 1e9
            ax.plot(x, y, "o", color=OUR_COLOR, ms=7, mfc="white", mew=1.6, zorder=3)
            shift = (8, 8) if r.op == "attention" and r.direction == "forward" else (8, -12)
            ax.annotate(_row_of(r), (x, y), xytext=shift, textcoords="offset points")
    ax.axvspan(0.1, 1, color=OUR_COLOR, alpha=0.08, lw=0)
    ax.text(0.32, 1.5e3, "RoPE, RMSNorm:\nno matrix products,\nbytes alone decide", fontsize=8, ha="center", va="top")
    ax.set(xscale="log", yscale="log", xlim=(0.1, 2e4), xlabel="FLOPs a byte of the floor", ylabel="TFLOP/s",
           title=f"circles: {OURS}, {SHOWN_MODEL} on {SHOWN_GPU}, at its bound")  # fmt: skip
    ax.legend(loc="lower right")
    return figure


def work_of(r: Record) -> Work:
    """The work that a record of an op is about."""
    norms, rotations = (RMSNorm, AddRMSNorm), (Rope, QKNormRope, RopeQKV, RopeIntoCache)
    kinds = (*norms, *rotations, Attention, RopeAttention, AttentionVarlen, Decode)
    kind = next(kind for kind in kinds if kind.op == r.op)
    sizes = {name: tuple(n) if isinstance(n, list) else n for name, n in r.sizes.items()}
    return kind(shape=r.shape, dtype=getattr(torch, r.dtype), **sizes)


def _host_figure(rows: list[dict[str, Any]]) -> Figure:
    figure, (ax,) = _grid(1, width=7, height=2.6)
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
