"""The errors of a provider's results against float64, and which errors are too large."""

from __future__ import annotations

import torch

from bench.works.work import Results, Work

UNIT = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 2.5e-7}  # relative error of one rounding


def relative_errors(x: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Frobenius norm of the error over that of the truth, and the worst row's, over its own or the typical row's."""
    error = x.double() - truth
    tiny = torch.finfo(torch.float64).tiny
    bulk = error.norm() / truth.norm().clamp_min(tiny)
    if truth.ndim < 2:
        return bulk.item(), bulk.item()
    size = truth.norm(dim=-1)
    floor = size.square().mean().sqrt()  # a row that cancels to nearly nothing has no relative error to speak of
    return bulk.item(), (error.norm(dim=-1) / size.clamp_min(floor).clamp_min(tiny)).max().item()


def errors(work: Work, results: Results, truth: Results) -> dict[str, tuple[float, float]]:
    """By name: relative error of the whole, and of the worst row."""
    return {name: relative_errors(work.judged(name, results[name]), truth[name]) for name in truth}


def disparity(
    work: Work, results: Results, truth: Results, theirs: dict[str, tuple[float, float]]
) -> tuple[float, str | None]:
    """The largest relative error of `results`, and why they are wrong, or None.

    Right is twice the error of plain PyTorch in the same dtype and two roundings; the worst row, eight. `theirs` are
    those errors. It is the bar for being timed; how good a provider is beyond it, its error says beside its speed.
    """
    for name, exact in truth.items():
        shape = work.judged(name, results[name]).shape
        if shape != exact.shape:
            return float("nan"), f"wrong shape: {name} is {tuple(shape)}, not {tuple(exact.shape)}"
    ours, u = errors(work, results, truth), UNIT[work.dtype]
    worst = max((bulk for bulk, _ in ours.values()), key=lambda e: (e != e, e))
    for name, (bulk, row) in ours.items():
        bars = 2 * theirs[name][0] + 2 * u, 2 * theirs[name][1] + 8 * u
        for error, bar, what in ((bulk, bars[0], name), (row, bars[1], f"a row of {name}")):
            if not error <= bar:  # NaN is wrong too
                return worst, f"wrong numbers: {what} is off by {error:.1e}, allowed {bar:.1e}"
    return worst, None
