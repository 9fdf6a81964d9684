"""What the figures of a report share: colours, panels, bars and legends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bench.measuring.records import Record
from bench.providers.provider import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[str, dict[str, float]]  # provider -> group -> value

OUR_COLOR = "#1b3a5c"
COLORS = ("#c8452d", "#e0a030", "#5a9e6f", "#7b6fb0", "#4ba3c3", "#b0607f", "#8a8a3c", "#777777", "#c49a6c", "#3f7f7f")
SHOWN_GPU, SHOWN_MODEL = "H100", "Llama 3.1 8B"  # of the estimates in pictures; tables have all GPUs and models


def color_of(provider: str, providers: Sequence[str]) -> str:
    if provider.startswith(OURS):
        return OUR_COLOR
    return COLORS[[p for p in providers if not p.startswith(OURS)].index(provider) % len(COLORS)]


def providers_of(rs: Iterable[Record]) -> list[str]:
    """The providers in the order of their first records."""
    return list(dict.fromkeys(r.provider for r in rs))


def grid(count: int, width: float = 5.0, height: float = 3.4, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each `width` by `height` inches."""
    from matplotlib import pyplot as plt

    columns = min(columns, count)
    rows = -(-count // columns)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:count])


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    found: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 6))


def bars(ax: Axes, groups: Sequence[str], series: Series, show: Callable[[float], str]) -> None:
    """Horizontal bars: the groups on the y axis, and in each group a bar for each series that has it."""
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


def series(rs: Iterable[Record], group: Callable[[Record], str], value: Callable[[Record], float]) -> Series:
    """`value` of each record, by provider and `group`. Of several records in a group, the last counts."""
    series: dict[str, dict[str, float]] = {}
    for r in rs:
        series.setdefault(r.provider, {})[group(r)] = value(r)
    return series


def in_order(rs: Iterable[Record], series: dict[str, Any]) -> dict[str, Any]:
    """`series` in the order of `providers_of`."""
    return {name: series[name] for name in providers_of(rs) if name in series}
