"""Ring attention (Liu et al., arXiv 2310.01889): blocks of keys travel from rank to rank, queries stay.

While a block is computed, the next one is on its way. Partial results and gradients are float32, and are added in a
fixed order. Only the key heads travel: W - 1 hops forward; W - 1 of keys and W - 1 of gradients backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from llama_kernels import reference
from llama_kernels.core.registry import refuse_double_backward
from llama_kernels.distributed import blocks
from llama_kernels.distributed.blocks import Row, Scores, Visible
from llama_kernels.distributed.layout import Parts
from llama_kernels.distributed.transport import Transfer, hop


class Ring(torch.autograd.Function):
    """q, k, v and sinks -> (out, lse) of this rank's queries.

    Beside its own, a rank holds two blocks of keys and values: the one at work and the one that comes.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, seen: Visible,
        parts: Parts, group: dist.ProcessGroup, scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        coming = hop((k, v), group) if ranks > 1 else None
        # A sink counts once for each row: with the rank's own keys.
        out, lse = blocks.forward(q, k, v, seen.in_part(parts, rank), scores, sinks)
        for step in range(1, ranks):
            assert coming is not None
            kv = coming.wait()
            coming = hop(kv, group) if step + 1 < ranks else None
            block = blocks.forward(q, *kv, seen.in_part(parts, (rank - step) % ranks), scores, None)
            out, lse = reference.merge_attention((out, block[0]), (lse, block[1]))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, *seen, out, lse)
        ctx.parts, ctx.group, ctx.scores = parts, group, scores
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, first, end, out, lse = ctx.saved_tensors
        seen, group = Visible(first, end), ctx.group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        do = torch.zeros_like(out) if do is None else do.contiguous()
        row = Row(out, lse, do, None if dlse is None else dlse.contiguous())

        # The gradients of a block start at the rank after its owner, and end at the owner, who adds what it computed
        # itself while its keys were on their way out.
        coming = hop((k, v), group) if ranks > 1 else None
        dq, *own, dsinks = blocks.backward(row, q, k, v, seen.in_part(ctx.parts, rank), ctx.scores, sinks)
        travelling: Transfer[list[torch.Tensor]] | None = None
        for step in range(1, ranks):
            assert coming is not None
            kv = coming.wait()
            coming = hop(kv, group) if step + 1 < ranks else None
            bounds = seen.in_part(ctx.parts, (rank - step) % ranks)
            share, *grads, _ = blocks.backward(row, q, *kv, bounds, ctx.scores, None)
            dq = dq + share
            if travelling is not None:
                grads = [a + b for a, b in zip(travelling.wait(), grads, strict=True)]
            travelling = hop(grads, group)  # while the next block is computed
        if travelling is not None:
            own = [a + b for a, b in zip(travelling.wait(), own, strict=True)]
        grads = (dq.to(q.dtype), *(grad.to(k.dtype) for grad in own), dsinks)
        return *refuse_double_backward("cp_attention", grads, (do, dlse, q, k, v, sinks)), None, None, None, None
