"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467): no mean is subtracted, no bias is added."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension.

    x (..., N), weight (N,) or None. eps=None is the epsilon of float32, or of float64 for float64 x, as in
    torch.nn.functional.rms_norm. Returns y (..., N) in the dtype of x.
    """
    return _normalise(x, weight, eps, offset).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual_out = x + residual, in the dtype of residual, and y = rms_norm(residual_out), in the dtype of x.

    x and residual (..., N), weight (N,) or None. Returns (y, residual_out), (..., N) each.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    residual_out = (x.to(wide) + residual.to(wide)).to(residual.dtype)
    return _normalise(residual_out, weight, eps, offset).to(x.dtype), residual_out


def _normalise(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None, offset: float) -> torch.Tensor:
    """The result in float32, or float64 for float64 `x`. Without a weight the offset has no effect."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (offset + weight.to(x.dtype))
