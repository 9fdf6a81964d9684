"""Rotary positions, then self-attention: what a layer of a Llama does between its projections."""

from __future__ import annotations

import torch

from .attention import attention
from .rope import rope


def rope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """attention(*rope(q, k, cos, sin, position_ids), v).

    q (B, Hq, S, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) -> out (B, Hq, S, Dv), lse (B, Hq, S).
    """
    return attention(
        *rope(q, k, cos, sin, position_ids, interleaved=interleaved),
        v,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        kv_start=kv_start,
        kv_end=kv_end,
        return_lse=return_lse,
        deterministic=deterministic,
    )
