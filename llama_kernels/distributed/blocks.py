"""Attention of some queries to one block of keys: which keys each row sees there, and the calls of the ops.

With a causal mask, a window and documents, a query sees one interval of global positions. A block holds an increasing
list of positions, so the keys of an interval are adjacent in it. Attention to a block is therefore one call with
kv_start and kv_end, for every layout of the tokens and wherever documents begin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.distributed.layout import Parts
from llama_kernels.ops.attention.call import AttentionCall, Results, Wanted, Window
from llama_kernels.ops.attention.op import attention_forward, run_backward

# --- which keys a row sees -------------------------------------------------------------------------------------------


class Visible(NamedTuple):
    """The global positions that each row sees, from `first` to `end` - 1: (B, S) int64."""

    first: torch.Tensor
    end: torch.Tensor


def visible(positions: torch.Tensor, doc_start: torch.Tensor, doc_end: torch.Tensor | int, window: Window) -> Visible:
    """What the rows at `positions` (S,) see in a window, in documents from doc_start (B, S) to doc_end - 1."""
    positions = positions.expand(doc_start.shape)
    first, end = doc_start.long(), torch.as_tensor(doc_end, device=doc_start.device).expand(doc_start.shape)
    if window.left is not None:
        first = torch.maximum(first, positions - window.left)
    if window.right is not None:
        end = torch.minimum(end, positions + window.right + 1)
    return Visible(first.contiguous(), end.contiguous())


def document_ends(doc_start: torch.Tensor) -> torch.Tensor:
    """One past the last token of each token's document, of doc_start (B, tokens) of the whole sequence."""
    tokens = doc_start.shape[1]
    here = torch.arange(tokens, device=doc_start.device).expand(doc_start.shape)
    begins = torch.where(doc_start == here, here, tokens)  # of a token that begins a document: its position
    following = torch.cat((begins[:, 1:], begins.new_full((begins.shape[0], 1), tokens)), 1)
    return following.flip(1).cummin(1).values.flip(1)


# --- the calls -------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """How scores are computed, the same in every block."""

    scale: float
    softcap: float | None


class Mask(NamedTuple):
    """What the rows see of a block: the keys from kv_start to kv_end - 1, (B, S) int32, or what a window leaves."""

    kv_start: torch.Tensor | None
    kv_end: torch.Tensor | None
    left: int | None = None
    right: int | None = None


def mask_of_part(seen: Visible, parts: Parts, part: int) -> Mask:
    """What rows see among the keys of one part."""
    return Mask(parts.keys_before(part, seen.first), parts.keys_before(part, seen.end))


class Grads(NamedTuple):
    """Gradients of one block, or of several added up: float32."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None  # None: there are no sinks


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, mask: Mask, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the block, both float32."""
    out, lse = attention_forward(*_call(q, k, v, sinks, mask, scores))
    return out, lse


def backward(
    results: Results, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, mask: Mask,
    scores: Scores,
) -> Grads:  # fmt: skip
    """The block's share of dq, its dk and dv, and dsinks of these rows. results: of whole rows, over all blocks."""
    wanted = Wanted(dq=True, dk=True, dv=True, dsinks=sinks is not None, deterministic=True, grad_dtype=torch.float32)
    dq, dk, dv, dsinks = run_backward(_call(q, k, v, sinks, mask, scores), results, wanted)
    return Grads(dq, dk, dv, None if sinks is None else dsinks)


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, mask: Mask, scores: Scores
) -> AttentionCall:
    return AttentionCall(
        q, k, v, sinks, mask.kv_start, mask.kv_end, cu_seqlens_q=None, cu_seqlens_k=None,
        longest_q=q.shape[2], longest_k=k.shape[2], scale=scores.scale, softcap=scores.softcap,
        left=mask.left, right=mask.right, out_dtype=torch.float32,
    )  # fmt: skip
