"""The arguments of the registered ops of attention after q, k and v, by name: most calls have few of them."""

from __future__ import annotations

from typing import Any

import torch


def attention_options(
    Sq: int,
    Sk: int,
    scale: float,
    *,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softcap: float | None = None,
    left: int | None = None,
    right: int | None = 0,
) -> tuple[Any, ...]:
    """From `sinks` to `right`, in the order of `attention_forward`. Without options the call is dense and causal.

    Sq, Sk: in a packed batch, the lengths of the longest sequences of queries and of keys.
    """
    return sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, Sq, Sk, scale, softcap, left, right
