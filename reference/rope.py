"""Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

OptionalTensor = TypeVar(
    "OptionalTensor", bound=torch.Tensor | None
)  # the type of k, None or a tensor, is that of the rotated k


def rope(
    q: torch.Tensor,
    k: OptionalTensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    axes: torch.Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, OptionalTensor]:
    """Rotate each pair (x_i, x_j) of every head by the angles of its token (arXiv 2104.09864, section 3.2).

    y_i = x_i cos_i - x_j sin_i and y_j = x_j cos_j + x_i sin_j. The pairs are (i, i + R/2), or (2i, 2i + 1) if
    interleaved. Elements past the first R are copied.

    Args:
        q: (B, Hq, S, D), or packed (T, Hq, D).
        k: (B, Hkv, S, D), or packed (T, Hkv, D), or None.
        cos, sin: tables (positions, R/2), or a row for each token, (B, S, R/2). If R > D/2 they may have R columns
            instead: an angle for each element of a pair.
        position_ids: (S,), (B, S) or (T,), the row of the tables for each token. Default: 0, 1, 2, ... Values outside
            the tables are clamped. With axes (A, B, S), (A, 1, S) or (A, T): A positions per token.
        axes: which of a token's positions gives the angle in each column of the tables, (R/2,) or (R,).
        inplace: write the results into q and k.

    Returns:
        q and k rotated, in their own dtypes. None for a k that is None.
    """
    cos, sin = angles_of_tokens(q, cos, sin, position_ids, axes)

    def rotated(x: Any) -> Any:
        y = None if x is None else _rotate(x, cos, sin, interleaved)
        return x.copy_(y) if inplace and x is not None else y

    return rotated(q), rotated(k)


def rope_transpose(
    dq: torch.Tensor,
    dk: OptionalTensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    axes: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, OptionalTensor]:
    """The backward of `rope`, its transpose: dx_i = dy_i cos_i + dy_j sin_j and dx_j = dy_j cos_j - dy_i sin_i.

    This is the inverse rotation where i and j have the same angle. Arguments and results are those of `rope`.
    """
    cos, sin = angles_of_tokens(dq, cos, sin, position_ids, axes)

    def rotated(dy: Any) -> Any:
        return None if dy is None else _rotate(dy, cos, sin, interleaved, transpose=True)

    return rotated(dq), rotated(dk)


def rope_qkv(
    qkv: torch.Tensor,
    q_heads: int,
    kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    axes: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of a fused projection, with q and k rotated by `rope`.

    qkv is (B, S, (q_heads + 2 kv_heads) D) and gives (B, H, S, D) each, or packed (T, (q_heads + 2 kv_heads) D) and
    gives (T, H, D) each.
    """
    counts = (q_heads, kv_heads, kv_heads)
    parts = qkv.unflatten(-1, (sum(counts), -1)).split(counts, -2)  # (..., H, D) each
    q, k, v = parts if qkv.ndim == 2 else (x.transpose(1, 2) for x in parts)
    q, k = rope(q, k, cos, sin, position_ids, axes=axes, interleaved=interleaved)
    return q, k, v


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
    axes: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """q (B, Hq, S, D) rotated. k (B, Hkv, S, D), rotated, and v (B, Hkv, S, Dv), as it is, are written into
    the caches (B, Hkv, L, D) and (B, Hkv, L, Dv).

    cache_position, (S,) or (B, S): the slot of each token in the caches, and its row of the tables unless position_ids
    are given. Tokens whose slot is outside 0 to L - 1 are not written.
    """
    if position_ids is None and axes is None and cos.ndim == 2:
        position_ids = cache_position
    q, k = rope(q, k, cos, sin, position_ids, axes=axes, interleaved=interleaved)
    for b, slots in enumerate(cache_position.long().expand(q.shape[0], -1)):
        there = (slots >= 0) & (slots < k_cache.shape[2])
        k_cache[b, :, slots[there]] = k[b, :, there]
        v_cache[b, :, slots[there]] = v[b, :, there]
    return q


def angles_of_tokens(
    q: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    axes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables' row of each token of q, with a dimension of 1 for the heads."""
    tokens = q.shape[-2] if q.ndim == 4 else q.shape[0]
    if cos.ndim == 2:
        if position_ids is None:
            position_ids = torch.arange(tokens, device=q.device)
        rows, columns = position_ids.long().clamp(0, max(cos.shape[0] - 1, 0)), None
        if axes is not None:
            axes = axes.long().clamp(0, rows.shape[0] - 1)
            rows, columns = rows[axes].movedim(0, -1), torch.arange(cos.shape[-1], device=q.device)
        cos, sin = (x[rows] if columns is None else x[rows, columns] for x in (cos, sin))
        # (S, R/2), (B, S, R/2) or (T, R/2)
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
