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

OUR_COLOR, LIMIT_COLOR, PLAIN_COLOR = "#1b3a5c", "#999999", "#9aa5b1"
# Each provider, and each variation of a training step, has one colour in all pictures of all runs.
COLORS = {
    OURS: OUR_COLOR,
    f"{OURS}, apart": "#4ba3c3",
    f"{OURS}, compiled": "#3f6fb0",
    "eager": PLAIN_COLOR,
    "stock": "#7d8894",
    "torch.compile": "#5c6670",
    "stock, compiled": "#404850",
    "F.rms_norm": "#b5894a",
    "sdpa": "#d9a08c",
    "sdpa-flash": "#e0703a",
    "sdpa-cudnn": "#6f9e1f",
    "sdpa-efficient": "#b9a5d6",
    "flex_attention": "#7b6fb0",
    "varlen_attn": "#444444",
    "liger": "#e0a030",
    "liger, RoPE and norm": "#e0a030",
    "liger, with MLP and loss": "#a86f0a",
    "quack": "#8a8a3c",
    "flash-attn-2": "#c8452d",
    "flash-attn-3": "#8f1d3f",
    "flash-attn-4": "#d0609a",
    "xformers": "#5a9e6f",
    "transformer-engine": "#2f7d6b",
    "unsloth": "#c45fc0",
}
_OTHER_COLOR = "#c49a6c"  # of a provider that a user added
SHOWN_GPU, SHOWN_MODEL = "H100", "Llama 3.1 8B"  # of the estimates in pictures; tables have all GPUs and models


def color_of(provider: str) -> str:
    return COLORS.get(provider, _OTHER_COLOR)


def put_title(figure: Figure, finding: str) -> None:
    """What the figure shows, above all panels. It says where the numbers are from, as pictures leave the page."""
    figure.suptitle(finding, x=0.01, ha="left", fontsize=11)


def mark_estimate(ax: Axes) -> None:
    """Write across a panel that it is an estimate."""
    ax.text(0.5, 0.5, "ESTIMATE", transform=ax.transAxes, fontsize=64, color="#e0a030", alpha=0.13, rotation=30,
            ha="center", va="center", weight="bold", zorder=0)  # fmt: skip


def finding_of(rs: Iterable[Record]) -> str:
    """How fast ours is in measured records: how often it is the fastest, and its share of the limit."""
    ours = [r for r in rs if r.provider == OURS and r.ms is not None]
    if not ours:
        return f"{OURS} has no time"
    against = [r for r in ours if r.ratio is not None]
    wins = sum(r.ratio >= 1 for r in against)
    said = f"{OURS} is the fastest in {wins} of {len(against)} cases" if against else f"only {OURS} was measured"
    shares = [r.percent for r in ours if r.percent is not None]
    return said + (f", at {min(shares):.0f} to {max(shares):.0f}% of the limit" if shares else "")


def providers_of(rs: Iterable[Record]) -> list[str]:
    """The providers in the order of their first records."""
    return list(dict.fromkeys(r.provider for r in rs))


def grid(count: int, width: float = 5.0, height: float = 3.4, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each `width` by `height` inches, and wide enough for its title and legend."""
    from matplotlib import pyplot as plt

    columns = min(columns, count)
    width = max(width, 9 / columns)
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
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 5), fontsize=8)


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
        bars = ax.barh(y, widths, height, label=name, color=color_of(name))
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
