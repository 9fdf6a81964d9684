"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate the pairs (x_i, x_j) of every head by its token's angles: x_i cos - x_j sin, x_j cos + x_i sin.

    q (B, Hq, S, D) or packed (T, Hq, D); k likewise or None. cos, sin: tables (positions, R/2), or one row a token,
    (B, S, R/2). Position ids outside the table are clamped into it.
    """
    tokens = q.shape[-2] if q.ndim == 4 else q.shape[0]
    if cos.ndim == 2:
        if position_ids is None:
            position_ids = torch.arange(tokens, device=q.device)
        rows = position_ids.long().clamp(0, max(cos.shape[0] - 1, 0))
        cos, sin = cos[rows], sin[rows]  # (S, R/2), (B, S, R/2) or (T, R/2)
    heads = -2 if q.ndim == 3 else -3
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)  # broadcast over the heads

    out = tuple(None if x is None else _rotate(x, cos, sin, interleaved) for x in (q, k))
    if inplace:
        out = tuple(None if x is None else x.copy_(y) for x, y in zip((q, k), out, strict=True))
    return out


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    rotated, rest = x.to(wide).tensor_split([2 * cos.shape[-1]], dim=-1)  # (..., R), (..., D - R)
    pairs = rotated.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    x0, x1 = pairs.unbind(-1 if interleaved else -2)  # (..., R/2) each
    y = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1 if interleaved else -2)
    return torch.cat((y.flatten(-2), rest), -1).to(x.dtype)
