"""The results of training runs, and their output: a table, a picture and a JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

console = Console()
COLORS = {"stock": "#9ec5e8", "patched": "#1b3a5c"}
EARLY = 20  # steps in which two correct float32 runs stay close; later, training amplifies the last bit
BOUND = 2e-3  # the largest difference of their losses there


@dataclass
class Run:
    """A model in training. The table has the numbers in `metrics` and in its dicts, and leaves out other values."""

    name: str
    losses: list[float] = field(default_factory=list)  # of each step
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)

    @property
    def step_ms(self) -> float:
        return 1e3 * sorted(self.seconds)[len(self.seconds) // 2]


def write(
    args: argparse.Namespace, name: str, runs: list[Run], baseline: dict[str, Any], draw: Callable[[Any], None]
) -> int:
    """Print the table and write NAME.png and NAME.json. `draw` draws the right axes of the picture.

    Returns the exit status: 1 if, with --compare in float32, losses differ by more than BOUND.
    """
    console.print(_table(runs, baseline))
    numbers = {
        "torch": torch.__version__, "transformers": transformers.__version__, "baseline": baseline,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "runs": {run.name: {"losses": run.losses, "step_ms": run.step_ms, **run.metrics} for run in runs},
    }  # fmt: skip
    held = True
    if args.compare:
        apart = _differences(runs)
        early = max(apart[:EARLY])
        numbers["apart"] = {"early": early, "all": max(apart)}
        console.print(
            f"largest difference of the losses: {early:.1e} in the first {EARLY} steps, {max(apart):.1e} in all"
        )
        if args.dtype == "float32":
            held = early <= BOUND
            outcome = f"{'holds' if held else 'FAILS'}: the first {EARLY} losses differ by at most {BOUND}"
            console.print(outcome, style="green" if held else "red")
    args.out.mkdir(parents=True, exist_ok=True)
    picture, file = (args.out / f"{name}.{kind}" for kind in ("png", "json"))
    _plot(runs, name, draw, picture)
    file.write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"{picture}, {file}")
    return 0 if held else 1


def bars(axes: Any, scores: dict[str, dict[str, float]], label: str) -> None:
    """Horizontal bars from 0 to 1: a group for each key of the inner dicts, with a bar for each run."""
    names = list(next(iter(scores.values())))
    width = 1 / (len(scores) + 1)
    for i, (run, values) in enumerate(scores.items()):
        rows = [row + i * width for row in range(len(names))]
        axes.barh(rows, [values.get(name, 0.0) for name in names], width, color=COLORS.get(run, "#d0d0d0"), label=run)
    axes.set_yticks([row + (len(scores) - 1) / 2 * width for row in range(len(names))], names)
    axes.set(xlabel=label, xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def final_scores(axes: Any, runs: list[Run], baseline: dict[str, float]) -> None:
    """A bar of each run for the metric that `baseline` names, beside the baseline."""
    ((metric, value),) = baseline.items()
    bars = [("baseline", value, "#d0d0d0"), *((run.name, run.metrics[metric], COLORS[run.name]) for run in runs)]
    drawn = axes.bar(*zip(*((name, height) for name, height, _ in bars), strict=True), color=[c for *_, c in bars])
    axes.bar_label(drawn, fmt="{:.3f}")
    axes.set(ylabel=metric, title=f"{metric}: {runs[-1].metrics[metric]:.3f}, baseline {value:.3f}")


def _differences(runs: list[Run]) -> list[float]:
    return [abs(a - b) for a, b in zip(*(run.losses for run in runs), strict=True)]


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    """{"F1": x, "F1 by class": {"name": y}} -> {"F1": x, "F1 by class, name": y}."""
    flat = {name: value for name, value in metrics.items() if isinstance(value, float)}
    for name, inner in metrics.items():
        if isinstance(inner, dict):
            flat |= {f"{name}, {key}": value for key, value in inner.items()}
    return flat


def _table(runs: list[Run], baseline: dict[str, Any]) -> Table:
    table = Table("", *(run.name for run in runs), "baseline")
    columns = [*(_flat(run.metrics) for run in runs), _flat(baseline)]
    for metric in columns[0]:
        row = [column.get(metric) for column in columns]
        table.add_row(metric, *("" if x is None else f"{x:,.0f}" if x > 100 else f"{x:.4f}" for x in row))
    table.add_row("step, ms", *(f"{run.step_ms:.1f}" for run in runs))
    if any(run.peak_bytes for run in runs):
        table.add_row("peak, GiB", *(f"{run.peak_bytes / 2**30:.2f}" for run in runs))
    return table


def _plot(runs: list[Run], name: str, draw: Callable[[Any], None], path: Path) -> None:
    figure = Figure(figsize=(5.5 * (1 + len(runs)), 4.6), layout="constrained")
    axes = figure.subplots(1, 1 + len(runs))
    for run in runs:
        wide = run.name == "stock" and len(runs) == 2  # so that both lines can be seen where they coincide
        axes[0].plot(run.losses, color=COLORS[run.name], lw=5 if wide else 1.1, solid_capstyle="round", label=run.name)
    axes[0].set(xlabel="step", ylabel="training loss", title=name)
    axes[0].legend(frameon=False)
    if len(runs) == 2:
        floor = 1e-8  # where two losses are the same float32
        apart = [max(difference, floor) for difference in _differences(runs)]
        axes[1].semilogy(apart, color=COLORS["patched"], lw=1.1)
        axes[1].set(xlabel="step", ylabel="difference of the losses", ylim=(floor / 2, max(1e-2, 2 * max(apart))))
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    draw(axes[-1])
    figure.savefig(path, dpi=150)
