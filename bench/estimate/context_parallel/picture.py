"""The picture of context-parallel attention: what it costs by method and ranks, and what a rank does meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.estimate.constants import Gpu, Network
from bench.estimate.context_parallel.cases import SCALES, Made, Row, Scale, name_of, settings
from bench.estimate.context_parallel.costs import Kernels
from bench.estimate.context_parallel.paper import METHODS, Setting
from bench.estimate.context_parallel.schedule import simulated
from bench.estimate.context_parallel.steps import recorded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = dict(zip(METHODS, ("#c8452d", "#7f8fa6", "#e0a030", "#1b3a5c"), strict=True))
_WORK = {"block": ("#1b3a5c", "attention kernels"), "copies": ("#9db4cc", "merging, copies"),
         "transfer": ("#c8452d", "transfer")}  # fmt: skip
_DRAWN = SCALES[0]
_SHOWN = (2**17, 2**20)  # tokens
_LANES = (2**17, 16, 8)  # tokens, ranks, and the one of them that is drawn: the first of the second node


def picture(gpu: Gpu, network: Network, found: Mapping[Scale, Sequence[Row]]) -> Figure:
    """How much longer than the ranks' share of one GPU's time each method takes, and the lanes of one rank. The title
    says that they are estimated."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["short", "long"], ["lanes", "lanes"]], figsize=(11, 8), height_ratios=(1.25, 1), layout="constrained"
    )
    rows = found[_DRAWN]
    for ax, tokens in zip((axes["short"], axes["long"]), _SHOWN, strict=True):
        _overheads(ax, tokens, [row for row in rows if row.tokens == tokens])
    axes["short"].set_ylabel("longer than an equal share of\none GPU's time, % (estimated)")
    bands = "bands: attention faster than estimated,\na network that is not tuned"
    for ax in (axes["short"], axes["long"]):
        ax.legend(fontsize=8, frameon=False, loc="upper left", title=bands, title_fontsize=8, alignment="left")
    _lanes(axes["lanes"], gpu, network)
    figure.suptitle(
        f"Estimate, not measured ({gpu.name}, {_DRAWN} attention): exchange heads inside a node, keys between nodes.\n"
        "A ring alone hides its transfers too, but pays for merging and small blocks", x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    return figure


def _overheads(ax: Axes, tokens: int, rows: Sequence[Row]) -> None:
    for method in METHODS:
        made = [(row.ranks, each) for row in rows for each in row.made if each.setting.method == method]
        ranks = [n for n, _ in made]
        middle = [_percent(each) for _, each in made]
        worst = [_percent(each) + 100 * (each.waiting[1] - each.time.exposed / each.time.seconds) for _, each in made]
        ax.plot(ranks, middle, "o-", color=_COLORS[method], label=name_of(method), markersize=4)
        ax.fill_between(ranks, middle, worst, color=_COLORS[method], alpha=0.15, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_ylim(0.2, 1000)
    ax.set_yticks([1, 10, 100, 1000], ["1%", "10%", "100%", "1,000%"])
    ticks = [row.ranks for row in rows]
    ax.set_xticks(ticks, [f"{n}\n{tokens / n / 1024:g}k" for n in ticks])
    ax.axvline(8, color="#999999", linewidth=0.8, linestyle=":")
    ax.text(8, 0.25, " more than one node", fontsize=8, color="#666666")
    ax.set_xlabel("GPUs, and tokens that each holds")
    size = f"{tokens // 1024}k" if tokens < 2**20 else f"{tokens // 2**20}M"
    ax.set_title(f"{size} tokens", loc="left", fontsize=10)
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _percent(each: Made) -> float:
    return 100 * max(each.overhead, 1e-3)


def _lanes(ax: Axes, gpu: Gpu, network: Network) -> None:
    """What a rank's lanes hold in a backward, as the simulation has it."""
    tokens, ranks, rank = _LANES
    shown = {s.method: s for s in settings(_DRAWN, network, tokens, ranks)}
    labels, at = [], 0.0
    for method in reversed(METHODS):
        _draw_rank(ax, gpu, shown[method], rank, at)
        labels += [(at, f"{name_of(method)}: transfers"), (at + 1, f"{name_of(method)}: kernels")]
        at += 2.6
    ax.set_yticks([y for y, _ in labels], [name for _, name in labels], fontsize=8)
    ax.set_xlabel("milliseconds, estimated")
    title = f"The backward on GPU {rank} of {ranks}, {tokens // 1024}k tokens: a gap between kernels is a wait"
    ax.set_title(title, loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    handles = [ax.barh(-9, 0, color=color, label=name) for color, name in _WORK.values()]
    ax.set_ylim(-0.8, at - 1)
    ax.legend(handles=handles, fontsize=8, ncols=3, frameon=False, loc="upper right", bbox_to_anchor=(1, 1.12))


def _draw_rank(ax: Axes, gpu: Gpu, setting: Setting, rank: int, at: float) -> None:
    steps = [recorded(setting.method, setting.mesh, setting.heads, r).backward for r in range(setting.ranks)]
    ran = simulated(steps, Kernels(gpu), setting.place, setting.chunk)
    for lane, spans in ((at + 1, ran.kernels[rank]), (at, ran.transfers[rank])):
        for span in spans:
            color = _WORK.get(span.what, _WORK["transfer"])[0]
            width = 1e3 * (span.end - span.begin)
            ax.barh(lane, width, 0.9, left=1e3 * span.begin, color=color, edgecolor="white", linewidth=0.3)
    ax.text(1e3 * ran.seconds, at + 1, f"  {1e3 * ran.seconds:.0f} ms", va="center", fontsize=8)
