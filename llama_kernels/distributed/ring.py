"""Ring attention (Liu et al., arXiv 2310.01889): blocks of keys travel from rank to rank, queries stay.

While a block is computed, the next one is being sent. Partial results and gradients are float32, and are added in a
fixed order. Only key heads are sent: among W ranks W - 1 hops of keys in the forward, and in the backward W - 1 of keys
and W - 1 of their gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from llama_kernels.distributed import blocks
from llama_kernels.distributed.blocks import Grads, Mask, Scores, Visible
from llama_kernels.distributed.layout import Parts
from llama_kernels.distributed.transport import Transfer, hop
from llama_kernels.ops.attention.call import Results
from llama_kernels.ops.attention.merge import merged


class Ring(NamedTuple):
    """Attention of this rank's queries to the keys of all ranks.

    Beside its own, a rank holds two blocks of keys and values: the one at work, and the one that it receives.
    """

    seen: Visible
    parts: Parts
    group: dist.ProcessGroup
    scores: Scores

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse, float32."""
        coming = hop((k, v), self.group) if self.ranks > 1 else None
        # A sink counts once for each row: with the rank's own keys.
        out, lse = blocks.forward(q, k, v, sinks, self._mask(0), self.scores)
        for step in range(1, self.ranks):
            assert coming is not None
            keys, values = coming.wait()
            coming = hop((keys, values), self.group) if step + 1 < self.ranks else None
            block = blocks.forward(q, keys, values, None, self._mask(step), self.scores)
            out, lse = merged((out, block[0]), (lse, block[1]))
        return out, lse

    def backward(
        self, results: Results, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> Grads:
        """The gradients of a block travel from the rank after its owner to the owner, which adds its own part last."""
        coming = hop((k, v), self.group) if self.ranks > 1 else None
        total = blocks.backward(results, q, k, v, sinks, self._mask(0), self.scores)
        travelling: Transfer[list[torch.Tensor]] | None = None
        for step in range(1, self.ranks):
            assert coming is not None
            keys, values = coming.wait()
            coming = hop((keys, values), self.group) if step + 1 < self.ranks else None
            block = blocks.backward(results, q, keys, values, None, self._mask(step), self.scores)
            total = total._replace(q=total.q + block.q)
            dk, dv = block.k, block.v
            if travelling is not None:
                dk, dv = (a + b for a, b in zip(travelling.wait(), (dk, dv), strict=True))
            travelling = hop((dk, dv), self.group)  # while the next block is computed
        if travelling is not None:
            dk, dv = travelling.wait()
            total = total._replace(k=dk + total.k, v=dv + total.v)
        return total

    @property
    def ranks(self) -> int:
        return self.group.size()

    def _mask(self, step: int) -> Mask:
        """What this rank's rows see of the block that it holds in this step: that of the rank `step` before it."""
        return blocks.mask_of_part(self.seen, self.parts, (self.group.rank() - step) % self.ranks)
