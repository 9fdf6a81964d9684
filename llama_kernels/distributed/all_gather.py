"""Attention to all keys, gathered on every rank (as Llama 3's training, arXiv 2407.21783): one call, so out, lse and dq
are those of one device. Gradients of keys are sent to their owners and summed there in float32, in the order of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from llama_kernels.core.registry import refuse_double_backward
from llama_kernels.distributed import blocks
from llama_kernels.distributed.blocks import Row, Scores, Visible
from llama_kernels.distributed.layout import Parts
from llama_kernels.distributed.transport import all_gather, sum_of_parts


def _gathered(parts: Parts, group: dist.ProcessGroup, *tensors: torch.Tensor) -> list[torch.Tensor]:
    transfers = [all_gather(x, group) for x in tensors]
    return [parts.in_order(transfer.wait(), 2) for transfer in transfers]


class AllGather(torch.autograd.Function):
    """q, k, v and sinks -> (out, lse) of this rank's queries. k and v are gathered again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, seen: Visible,
        parts: Parts, group: dist.ProcessGroup, scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        whole = Parts([parts.merged()])
        out, lse = blocks.forward(q, *_gathered(parts, group, k, v), seen.in_part(whole, 0), scores, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, *seen, out, lse)
        ctx.parts, ctx.whole, ctx.group, ctx.scores = parts, whole, group, scores
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, first, end, out, lse = ctx.saved_tensors
        do = torch.zeros_like(out) if do is None else do.contiguous()
        row = Row(out, lse, do, None if dlse is None else dlse.contiguous())
        bounds = Visible(first, end).in_part(ctx.whole, 0)
        gathered = _gathered(ctx.parts, ctx.group, k, v)
        dq, *grads, dsinks = blocks.backward(row, q, *gathered, bounds, ctx.scores, sinks)
        dk, dv = (sum_of_parts(ctx.parts.divided(grad, 2), ctx.group) for grad in grads)
        grads = (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks)
        return *refuse_double_backward("cp_attention", grads, (do, dlse, q, k, v, sinks)), None, None, None, None
