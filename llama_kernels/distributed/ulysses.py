"""Ulysses (Jacobs et al., arXiv 2309.14509): an all-to-all gives each rank all tokens of some of the heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from llama_kernels.distributed import blocks
from llama_kernels.distributed.blocks import Grads, Mask, Scores
from llama_kernels.distributed.layout import Parts
from llama_kernels.distributed.transport import all_to_all
from llama_kernels.ops.attention.call import Results


class Exchange(NamedTuple):
    """Between some tokens of all heads, (B, H, S / W, D), and all tokens of some heads, (B, H / W, S, D)."""

    parts: Parts
    group: dist.ProcessGroup

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens of this rank's share of the heads. Where there are fewer heads than ranks, ranks share one."""
        repeated = x.repeat_interleave(self.sharing(x.shape[1]), 1)
        return self.parts.in_order(all_to_all(repeated.chunk(self.group.size(), 1), self.group).wait(), 2)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """All heads of this rank's tokens."""
        return torch.cat(all_to_all(self.parts.divided(x, 2), self.group).wait(), 1)

    def sum_to_tokens(self, x: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """`to_tokens` of float32 gradients, summed over the ranks that share one of `heads` and rounded to `dtype`."""
        sharing = self.sharing(heads)
        if sharing == 1:  # nothing is summed, so half the bytes travel
            return self.to_tokens(x.to(dtype))
        return self.to_tokens(x).unflatten(1, (heads, sharing)).sum(2).to(dtype)

    def sharing(self, heads: int) -> int:
        """How many ranks have the same one of `heads`."""
        return max(self.group.size() // heads, 1)


class Local(NamedTuple):
    """Attention to the keys that this rank holds."""

    mask: Mask
    scores: Scores

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse, float32."""
        return blocks.forward(q, k, v, sinks, self.mask, self.scores)

    def backward(
        self, results: Results, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> Grads:
        return blocks.backward(results, q, k, v, sinks, self.mask, self.scores)
