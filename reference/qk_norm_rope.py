"""RMSNorm of every head of q and k, then RoPE: as Qwen3 and Gemma 3 attend."""

from __future__ import annotations

import torch

from .rms_norm import rms_norm
from .rope import rope


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    eps: float | None = 1e-6,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """rope(rms_norm(q, q_weight), rms_norm(k, k_weight)), not rounded in between.

    q (B, Hq, S, D) or packed (T, Hq, D); k likewise or None; weights (D,) or None.
    """

    def normalised(x: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        return rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), weight, eps, offset=offset)

    pair = normalised(q, q_weight), normalised(k, k_weight)
    out = rope(*pair, cos, sin, position_ids, interleaved=interleaved)
    return tuple(None if x is None else y.to(x.dtype) for x, y in zip((q, k), out, strict=True))
