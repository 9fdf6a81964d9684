"""The picture of a layer: a bar for each stack, cut by what its time goes to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from bench.estimate.constants import Gpu
from bench.estimate.layer import PARTS, TITLE, Stack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#1b3a5c", "#7f8fa6", "#c8452d", "#e0a030", "#5a9e6f")


def picture(made: Iterable[Stack], gpu: Gpu) -> Figure:
    """Milliseconds, forward and backward. The title says that they are estimated."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    made = list(made)
    figure, ax = plt.subplots(figsize=(10, 1.6 + 0.55 * len(made)), layout="constrained")
    lefts = [0.0] * len(made)
    for part, color in zip(PARTS, _COLORS, strict=True):
        widths = [1e3 * sum(p.seconds for p in stack.parts if p.name == part) for stack in made]
        bars = ax.barh(range(len(made)), widths, 0.66, left=lefts, color=color, label=part)
        ax.bar_label(
            bars, [f"{w:.1f}" if w > 1 else "" for w in widths], label_type="center", color="white", fontsize=8
        )
        lefts = [a + b for a, b in zip(lefts, widths, strict=True)]
    for i, (stack, end) in enumerate(zip(made, lefts, strict=True)):
        ax.text(end, i, f"  {end:.1f} ms, {stack.launches} launches", va="center", fontsize=9)
    ax.set_yticks(range(len(made)), [stack.name for stack in made])
    ax.invert_yaxis()
    ax.margins(x=0.2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("milliseconds, estimated")
    ax.set_title(f"Estimate, {gpu.name}: {TITLE}", loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    return figure
