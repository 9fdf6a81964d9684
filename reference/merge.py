"""Attention over disjoint sets of keys, merged into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def merge_attention(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of rows whose keys were divided among several calls.

    lse = log(sum_i exp(lse_i)) and out = sum_i exp(lse_i - lse) out_i, in float32, or in float64 for float64 outs.

    Args:
        outs: of each call, (B, H, S, D), or packed (T, H, D).
        lses: of each call, (B, H, S), or packed (H, T).

    Returns:
        out in the dtype of outs[0], and lse. A row that no call sees a key of gives 0 and -inf.
    """
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    parts = torch.stack([lse.to(wide) for lse in lses])
    largest = parts.detach().amax(0)
    largest = largest.masked_fill(largest == -torch.inf, 0)  # exp(-inf - 0) is 0, exp(-inf + inf) is NaN
    shares = torch.exp(parts - largest)
    mass = shares.sum(0)
    empty = mass == 0
    mass = mass.masked_fill(empty, 1)
    lse = (largest + mass.log()).masked_fill(empty, -torch.inf)
    weights = (shares / mass).unsqueeze(-1)
    if outs[0].ndim == 3:
        weights = weights.transpose(1, 2)  # (T, H, 1)
    out = torch.stack([weight * out.to(wide) for weight, out in zip(weights, outs, strict=True)]).sum(0)
    return out.to(outs[0].dtype), lse
