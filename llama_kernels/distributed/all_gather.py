"""Attention to all keys, gathered on every rank (as in Llama 3's training, arXiv 2407.21783).

It is one call, so out, lse and dq are those of one device. Gradients of keys are sent to their owners and summed there
in float32, in the order of the ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from llama_kernels.distributed import blocks
from llama_kernels.distributed.blocks import Grads, Mask, Scores, Visible
from llama_kernels.distributed.layout import Parts
from llama_kernels.distributed.transport import all_gather, sum_of_parts
from llama_kernels.ops.attention.call import Results


class Gathered(NamedTuple):
    """Attention of this rank's queries to the keys of all ranks. Keys are gathered again in the backward."""

    seen: Visible
    parts: Parts
    group: dist.ProcessGroup
    scores: Scores

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse, float32."""
        keys, values = self._gather(k, v)
        return blocks.forward(q, keys, values, sinks, self._mask, self.scores)

    def backward(
        self, results: Results, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> Grads:
        keys, values = self._gather(k, v)
        grads = blocks.backward(results, q, keys, values, sinks, self._mask, self.scores)
        dk, dv = (sum_of_parts(self.parts.divided(grad, 2), self.group) for grad in (grads.k, grads.v))
        return grads._replace(k=dk, v=dv)

    def _gather(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        transfers = [all_gather(x, self.group) for x in tensors]
        return [self.parts.in_order(transfer.wait(), 2) for transfer in transfers]

    @property
    def _mask(self) -> Mask:
        return blocks.mask_of_part(self.seen, Parts([self.parts.merged()]), 0)
