"""RoPE, then self-attention: what a layer of Llama computes between its projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

from .attention import attention
from .rope import rope

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .attention import AttentionOptions


@overload
def rope_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    position_ids: torch.Tensor | None = None, *, axes: torch.Tensor | None = None,
    interleaved: bool = False, return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...  # fmt: skip


@overload
def rope_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    position_ids: torch.Tensor | None = None, *, axes: torch.Tensor | None = None,
    interleaved: bool = False, return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def rope_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    position_ids: torch.Tensor | None = None, *, axes: torch.Tensor | None = None,
    interleaved: bool = False, return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def rope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    axes: torch.Tensor | None = None,
    interleaved: bool = False,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    kv_prefix: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """attention(*rope(q, k, cos, sin, position_ids, axes=axes, interleaved=interleaved), v, is_causal=is_causal, ...).

    q (B, Hq, S, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv); the other arguments are those of `rope` and `attention`.
    Returns out (B, Hq, S, Dv), and with return_lse also lse (B, Hq, S).
    """
    return attention(
        *rope(q, k, cos, sin, position_ids, axes=axes, interleaved=interleaved),
        v,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        kv_start=kv_start,
        kv_end=kv_end,
        kv_prefix=kv_prefix,
        return_lse=return_lse,
        deterministic=deterministic,
    )
