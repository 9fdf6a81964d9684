"""RMSNorm of the rows of CPU tensors: the formulas of the reference, with the same bits, each step once."""

from __future__ import annotations

import torch


def normalise(
    rows: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = rows * rstd * (offset + weight), a new tensor, and rstd = 1 / sqrt(mean(rows^2) + eps). rows: float32."""
    rstd = rstd_of(rows, eps)
    y = rows * rstd
    return y if weight is None else y.mul_(scale_of(weight, offset)), rstd


def rstd_of(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """(..., 1), of rows in float32."""
    return rows.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def scale_of(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """offset + weight in float32."""
    return weight.float() + offset if offset else weight.float()


def through_norm(g: torch.Tensor, xhat: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """rstd * (g - xhat * mean(g * xhat)), a new tensor, where xhat = x * rstd.

    It is the gradient of x where xhat has the gradient g. It is also the tangent of xhat where x has the tangent g,
    since the derivative is a symmetric matrix.
    """
    return (g - xhat * (g * xhat).mean(-1, keepdim=True)).mul_(rstd)
