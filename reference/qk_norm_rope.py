"""RMSNorm of every head of q and k, then RoPE, as in the attention layers of Qwen3 and Gemma 3."""

from __future__ import annotations

from typing import Any

import torch

from .rms_norm import rms_norm
from .rope import OptionalTensor, rope


def qk_norm_rope(
    q: torch.Tensor,
    k: OptionalTensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    axes: torch.Tensor | None = None,
    eps: float | None = 1e-6,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[torch.Tensor, OptionalTensor]:
    """rope(rms_norm(q, q_weight), rms_norm(k, k_weight)), with no rounding between the two.

    q (B, Hq, S, D) or packed (T, Hq, D); k likewise with Hkv heads, or None; q_weight and k_weight (D,) or None. The
    other arguments are those of `rms_norm` and `rope`. Returns q and k, in their own dtypes.
    """

    def normalised(x: Any, weight: torch.Tensor | None) -> Any:
        if x is None:
            return None
        return rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), weight, eps, offset=offset)

    pair = normalised(q, q_weight), normalised(k, k_weight)
    q_out, k_out = rope(*pair, cos, sin, position_ids, axes=axes, interleaved=interleaved)
    return q_out.to(q.dtype), k_out if k is None else k_out.to(k.dtype)
