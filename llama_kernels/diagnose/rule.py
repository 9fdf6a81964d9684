"""When a result passes: its error against float64 is no larger than that of plain PyTorch in the same dtype.

The test suite has a stricter rule, which also compares with an ideal computation. This rule needs only the operation
and eager code for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# The relative error that one rounding to the dtype makes, on average over normally distributed values.
UNIT = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 2.5e-7}
_ENOUGH = 4096  # with fewer elements the error of all of them together varies too much; only rows are judged


class Verdict(NamedTuple):
    """The comparison of one tensor. Errors are relative, in the Frobenius norm. `bound` is the limit of `error`."""

    error: float
    eager: float
    bound: float
    fault: str | None  # why it failed, or None


def compare(result: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor) -> Verdict:
    """Compare `result` and `eager`, of one dtype, with `truth`, in float64.

    A result passes if it is finite exactly where the truth is, and if
        of all elements      error <= 1.05 eager's + 1/4 UNIT
        of the worst row     error <= 1.5 eager's + UNIT
    In float32, where only the order of additions differs, the factors are 2 and 4, with 2 UNIT each.
    """
    unit = UNIT[result.dtype]
    chance = result.dtype == torch.float32
    by, plus, row_by, row_plus = (2, 2 * unit, 4, 2 * unit) if chance else (1.05, unit / 4, 1.5, unit)
    result, truth, eager = (x.detach().double() for x in (result, truth, eager))
    if result.shape != truth.shape:
        return Verdict(float("inf"), 0.0, 0.0, f"shape {tuple(result.shape)}, not {tuple(truth.shape)}")
    finite = truth.isfinite()
    if wrong := int((result.isfinite() != finite).sum()):
        return Verdict(float("inf"), 0.0, 0.0, f"{wrong} of {result.numel()} elements are NaN or infinite")
    result, truth, eager = (x.masked_fill(~finite, 0) for x in (result, truth, eager))
    error, theirs = _relative(result, truth), _relative(eager, truth)
    bound = by * theirs + plus
    worst, worst_theirs = (_worst_row(x, truth) for x in (result, eager))
    row_bound = row_by * worst_theirs + row_plus
    fault = None
    if truth.numel() >= _ENOUGH and error > bound:
        fault = f"error {error:.2g}, over {bound:.2g}"
    elif worst > row_bound:
        fault = f"worst row is off by {worst:.2g}, over {row_bound:.2g}"
    return Verdict(error, theirs, bound, fault)


def _relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def _worst_row(x: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest relative error of a row along the last dimension. Rows below the average norm count as average.

    For example, the gradient of a query that sees one key is a sum of terms that cancel: its error has no relation to
    its size.
    """
    size = truth.norm(dim=-1)
    average = max(size.square().mean().sqrt().item(), torch.finfo(torch.float64).tiny)
    return ((x - truth).norm(dim=-1) / size.clamp_min(average)).max().item()
