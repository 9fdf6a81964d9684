"""The rule of the parity check: the error of a result against float64 is about as small as that of plain PyTorch.

The test suite has a stricter rule, which also compares with an ideal computation. This rule needs only the op in plain
PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# The average relative error of one rounding to the dtype, for normally distributed values.
UNIT = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 2.5e-7}
_ENOUGH = 4096  # with fewer elements, the relative error of the whole tensor varies too much to have a bound


class Verdict(NamedTuple):
    """The comparison of one tensor. Errors are relative, in the Frobenius norm. `bound` is the limit of `error`."""

    error: float
    eager: float
    bound: float
    fault: str | None  # why it failed, or None


def compare(result: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor) -> Verdict:
    """Compare `result` and `eager`, of one dtype, with `truth`, in float64.

    A result passes if it is finite exactly where the truth is, and if
        over all elements    error <= 1.05 error of eager + 1/4 UNIT
        in the worst row     error <= 1.5 error of eager + UNIT
    In float32, where only the order of additions differs, the factors are 2 and 4, with 2 UNIT each.
    """
    unit = UNIT[result.dtype]
    float32 = result.dtype == torch.float32
    by, plus, row_by, row_plus = (2, 2 * unit, 4, 2 * unit) if float32 else (1.05, unit / 4, 1.5, unit)
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
    """The largest error of a row of the last dimension, relative to its norm or to the average norm if that is larger.

    The average matters for rows that are sums of terms that cancel, such as dq of a query with one visible key: the
    error of such a row is not proportional to its norm.
    """
    size = truth.norm(dim=-1)
    average = max(size.square().mean().sqrt().item(), torch.finfo(torch.float64).tiny)
    return ((x - truth).norm(dim=-1) / size.clamp_min(average)).max().item()
