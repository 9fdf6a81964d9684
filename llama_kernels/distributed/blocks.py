"""Attention of some queries to one block of keys: which keys each row sees there, and the calls of the ops.

With a causal mask, a window and documents, a query sees one interval of global positions. A block holds an increasing
list of positions, so the keys of an interval are adjacent in it. Attention to a block is therefore one call with
kv_start and kv_end, for every layout of the tokens and wherever documents begin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.distributed.layout import Parts
from llama_kernels.ops.attention.call import Results, Window
from llama_kernels.ops.attention.op import attention_backward, attention_forward

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
    sizes = (None, None, q.shape[2], k.shape[2])
    bounds, window = (mask.kv_start, mask.kv_end), (mask.left, mask.right)
    out, lse = attention_forward(q, k, v, sinks, *bounds, *sizes, *scores, *window, torch.float32)
    return out, lse


def backward(
    results: Results, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, mask: Mask,
    scores: Scores,
) -> Grads:  # fmt: skip
    """The block's share of dq, its dk and dv, and dsinks of these rows. results: of whole rows, over all blocks."""
    sizes = (None, None, q.shape[2], k.shape[2])
    bounds, window = (mask.kv_start, mask.kv_end), (mask.left, mask.right)
    needed, deterministic = (True, True, True, sinks is not None), True
    dq, dk, dv, dsinks = attention_backward(
        results.do, results.dlse, q, k, v, results.out, results.lse, sinks, *bounds, *sizes, *scores, *window,
        *needed, deterministic, torch.float32,
    )  # fmt: skip
    return Grads(dq, dk, dv, None if sinks is None else dsinks)
