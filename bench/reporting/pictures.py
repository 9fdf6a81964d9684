"""The pictures of a report, drawn from its records."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bench.measuring.records import Run
from bench.reporting.drawing import SHOWN_GPU
from bench.reporting.estimated_figures import host_figure, roofline_figure, saving_figure
from bench.reporting.measured_figures import (
    error_figure,
    error_speed_figure,
    models_figure,
    sweep_figure,
    training_figure,
)
from bench.reporting.sweeps import sweeps
from bench.training.scale import TRAINING
from bench.works.models import MODELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """Yield (file name, caption, picture)."""
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
        yield f"speed-{op}", f"{op}: speed over size; the dashed line is this machine's ceiling", sweep_figure(panels)
    trained = [r for r in timed if r.op in TRAINING]
    widths = [r for r in timed if r.op not in TRAINING and r.shape.startswith(tuple(MODELS))]
    if widths:
        yield "models", "Published models' shapes: percent of the ceiling", models_figure(widths)
    if trained:
        yield "training", "Training with Transformers: tokens a second, peak memory", training_figure(trained)
    wrong = [r for r in run.records if r.error is not None]
    if timed and wrong:
        yield "error", "Error beside speed: lower right is better", error_speed_figure(timed)
    elif wrong:
        yield "error", "Relative error against float64, worst of outputs and gradients", error_figure(wrong)
    if any(r.estimate for r in run.records):
        estimated = [r for r in run.records if r.estimate and r.ms is not None]
        caption = f"Estimate ({SHOWN_GPU}): the least time that each provider needs, over ours"
        yield "saving", caption, saving_figure(estimated)
        yield "roofline", "Estimate: the roofline of each GPU, and our attention under it", roofline_figure(estimated)
    if host := run.extra.get("host"):
        yield "host", "Host time of a call, without the driver's launch", host_figure(host)
