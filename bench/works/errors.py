"""The errors of a provider's results against float64, and the limit above which they are wrong."""

from __future__ import annotations

import torch

from bench.works.work import Results, Work
from llama_kernels.diagnose.rule import UNIT


def relative_errors(x: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """The relative Frobenius error of `x`, and that of its worst row.

    The error of a row is divided by the norm of the row or, if that is larger, by the root mean square of all norms.
    """
    error = x.double() - truth
    tiny = torch.finfo(torch.float64).tiny
    bulk = error.norm() / truth.norm().clamp_min(tiny)
    if truth.ndim < 2:
        return bulk.item(), bulk.item()
    size = truth.norm(dim=-1)
    floor = size.square().mean().sqrt()  # a row of nearly 0 would have a huge relative error
    return bulk.item(), (error.norm(dim=-1) / size.clamp_min(floor).clamp_min(tiny)).max().item()


def errors(work: Work, results: Results, truth: Results) -> dict[str, tuple[float, float]]:
    """For each output and gradient, what `relative_errors` returns."""
    return {name: relative_errors(work.judged(name, results[name]), truth[name]) for name in truth}


def disparity(
    work: Work, results: Results, truth: Results, plain: dict[str, tuple[float, float]]
) -> tuple[float, str | None]:
    """The largest relative error of `results`, and the reason why they are wrong, or None.

    The limit is twice the error of plain PyTorch in the same dtype (`plain`) plus two roundings; for the worst row,
    plus eight. A provider above the limit is not timed. Below it, reports show its error beside its speed.
    """
    for name, exact in truth.items():
        shape = work.judged(name, results[name]).shape
        if shape != exact.shape:
            return float("nan"), f"wrong shape: {name} is {tuple(shape)}, not {tuple(exact.shape)}"
    ours, u = errors(work, results, truth), UNIT[work.dtype]
    worst = max((bulk for bulk, _ in ours.values()), key=lambda e: (e != e, e))
    for name, (bulk, row) in ours.items():
        limits = 2 * plain[name][0] + 2 * u, 2 * plain[name][1] + 8 * u
        for error, limit, what in ((bulk, limits[0], name), (row, limits[1], f"a row of {name}")):
            if not error <= limit:  # NaN is wrong too
                return worst, f"wrong numbers: {what} is off by {error:.1e}, allowed {limit:.1e}"
    return worst, None
