"""The ops in plain PyTorch in the dtype of their inputs, as Hugging Face's model code computes them."""

from __future__ import annotations

import math

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Normalised in float32, rounded, then scaled."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, S, D) rotated by the first S rows of the tables (positions, D/2), which are rounded to its dtype."""
    cos, sin = (torch.cat((t, t), -1)[: x.shape[-2]].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention, queries aligned with the last keys: scores in q's dtype, softmax in float32, then rounded."""
    group, Sq, Sk = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    distance = torch.arange(Sq, device=q.device)[:, None] + (Sk - Sq) - torch.arange(Sk, device=q.device)
    hidden = distance < 0 if left is None else (distance < 0) | (distance > left)
    s = s.masked_fill(hidden, -math.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:-1], 1)), -1)
    p = torch.softmax(s.float(), -1)[..., :Sk].to(q.dtype)
    return p @ v
