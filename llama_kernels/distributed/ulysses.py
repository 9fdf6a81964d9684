"""Ulysses (Jacobs et al., arXiv 2309.14509): an all-to-all gives each rank all tokens of some of the heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from llama_kernels.distributed.layout import Parts
from llama_kernels.distributed.transport import all_to_all


class Exchange(torch.autograd.Function):
    """Some tokens of all heads, (B, H, S / W, D) -> all tokens of some heads, (B, H / W, S, D); or the inverse."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: Parts, group: dist.ProcessGroup, inverse: bool) -> torch.Tensor:
        ctx.parts, ctx.group, ctx.inverse = parts, group, inverse
        if inverse:
            return torch.cat(all_to_all(parts.divided(x, 2), group).wait(), 1)
        return parts.in_order(all_to_all(x.chunk(len(parts.lists), 1), group).wait(), 2)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return Exchange.apply(dx, ctx.parts, ctx.group, not ctx.inverse), None, None, None


def to_heads(parts: Parts, group: dist.ProcessGroup, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """All tokens of this rank's share of the heads. Where there are fewer heads than ranks, ranks share one."""
    ranks = len(parts.lists)
    repeated = (x.repeat_interleave(max(ranks // x.shape[1], 1), 1) for x in tensors)
    return [Exchange.apply(x, parts, group, False) for x in repeated]


def to_tokens(parts: Parts, group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    """All heads of this rank's tokens."""
    return Exchange.apply(x, parts, group, True)
