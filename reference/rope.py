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
    """Rotate the pairs (x_i, x_j) of every head by its token's angles: x_i cos_i - x_j sin_i, x_j cos_j + x_i sin_j.

    q (B, Hq, S, D) or packed (T, Hq, D); k likewise or None. cos, sin: tables (positions, R/2), or one row a token,
    (B, S, R/2), with one angle for i and j; or R in place of R/2, where R > D/2, with one for each. Position ids
    outside the table are clamped into it.
    """
    cos, sin = _rows(q, cos, sin, position_ids)
    out = tuple(None if x is None else _rotate(x, cos, sin, interleaved) for x in (q, k))
    if inplace:
        out = tuple(None if x is None else x.copy_(y) for x, y in zip((q, k), out, strict=True))
    return out


def rope_transpose(
    dq: torch.Tensor,
    dk: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The transpose of `rope`, which is its backward: dy_i cos_i + dy_j sin_j, dy_j cos_j - dy_i sin_i. Where i and j
    have one angle, this is the inverse rotation."""
    cos, sin = _rows(dq, cos, sin, position_ids)
    return tuple(None if dy is None else _rotate(dy, cos, sin, interleaved, transpose=True) for dy in (dq, dk))


def rope_qkv(
    qkv: torch.Tensor,
    q_heads: int,
    kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of a packed projection (..., (q_heads + 2 kv_heads) D), q and k rotated.

    (B, S, N) gives (B, H, S, D), packed (T, N) gives (T, H, D).
    """
    counts = (q_heads, kv_heads, kv_heads)
    parts = qkv.unflatten(-1, (sum(counts), -1)).split(counts, -2)  # (..., H, D) each
    q, k, v = parts if qkv.ndim == 2 else (x.transpose(1, 2) for x in parts)
    return *rope(q, k, cos, sin, position_ids, interleaved=interleaved), v


def rope_into_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """q (B, Hq, S, D) rotated; k, rotated, and v go to cache_position of the caches (B, Hkv, L, D), if it is there."""
    if position_ids is None and cos.ndim == 2:
        position_ids = cache_position
    q, k = rope(q, k, cos, sin, position_ids, interleaved=interleaved)
    for b, slots in enumerate(cache_position.long().expand(q.shape[0], -1)):
        there = (slots >= 0) & (slots < k_cache.shape[2])
        k_cache[b, :, slots[there]] = k[b, :, there]
        v_cache[b, :, slots[there]] = v[b, :, there]
    return q


def _rows(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables' row of each token of q, with a dimension of 1 for the heads."""
    tokens = q.shape[-2] if q.ndim == 4 else q.shape[0]
    if cos.ndim == 2:
        if position_ids is None:
            position_ids = torch.arange(tokens, device=q.device)
        rows = position_ids.long().clamp(0, max(cos.shape[0] - 1, 0))
        cos, sin = cos[rows], sin[rows]  # (S, R/2), (B, S, R/2) or (T, R/2)
    heads = -2 if q.ndim == 3 else -3
    return cos.unsqueeze(heads), sin.unsqueeze(heads)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, transpose: bool = False
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    full = 2 * cos.shape[-1] > x.shape[-1]
    rotated, rest = x.to(wide).tensor_split([(1 if full else 2) * cos.shape[-1]], dim=-1)  # (..., R), (..., D - R)

    def pairs(table: torch.Tensor) -> tuple[torch.Tensor, ...]:  # (..., R) -> (..., R/2) of the first, of the second
        return table.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(-1 if interleaved else -2)

    x0, x1 = pairs(rotated)
    (cos0, cos1), (sin0, sin1) = (pairs(table) if full else (table, table) for table in (cos, sin))
    if transpose:
        sin0, sin1 = -sin1, -sin0
    y = torch.stack((x0 * cos0 - x1 * sin0, x1 * cos1 + x0 * sin1), -1 if interleaved else -2)
    return torch.cat((y.flatten(-2), rest), -1).to(x.dtype)
