"""A layout that gives processes equal work where documents of different lengths are packed into a sequence."""

from __future__ import annotations

import torch

from llama_kernels.core.checks import check_count, check_tensors, message, shape_of
from llama_kernels.distributed.layout import Layout

_OP = "balanced_layout"


def balanced_layout(doc_start: torch.Tensor, ranks: int, *, chunk: int = 128) -> Layout:
    """The layout in which each rank has the same number of tokens and, under a causal mask, nearly the same work.

    "zigzag" balances one document. Where several are packed, the rank with the longest works while the others wait.
    Here the sequence is cut into chunks, and the work of a chunk is the number of keys that its tokens see, in all rows
    of the batch. In the order of their work, the largest first, `ranks` chunks at a time are given out, one to each
    rank: the largest to the rank that has the least work so far. Of one document in 2 ranks chunks this makes "zigzag".

    Args:
        doc_start: (B, tokens) int32, the global position of the first token of each token's document; with Hugging
            Face, position minus position_ids. The same on every process. It is copied to the CPU, which waits for a
            GPU: give a CPU tensor where there is one.
        ranks: processes that share the sequence.
        chunk: tokens of a chunk. Shorter ones balance better; attention computes tiles of up to 128 queries, whose
            keys are loaded together. tokens is a multiple of ranks * chunk.

    Raises:
        TypeError: doc_start is not int32, or ranks or chunk is not an int.
        ValueError: doc_start is not (B, tokens), or names a token after its own; the sequence cannot be cut so.
    """
    check_tensors(_OP, (torch.int32,), doc_start=doc_start)
    for name, count in (("ranks", ranks), ("chunk", chunk)):
        check_count(_OP, name, count, "a number of at least 1")
    if doc_start.ndim != 2:
        raise ValueError(message(_OP, "doc_start", shape_of(doc_start), "(B, tokens)"))
    tokens, unit = doc_start.shape[1], ranks * chunk
    if tokens % unit:
        got, fix = (
            f"of {tokens} tokens",
            f"Pad the sequence to {-(-tokens // unit) * unit} tokens, or take a smaller chunk.",
        )
        raise ValueError(message(_OP, "doc_start", got, f"a multiple of ranks * chunk, {unit}", fix))
    first, position = doc_start.cpu().long(), torch.arange(tokens)
    if ((first < 0) | (first > position)).any():
        raise ValueError(message(_OP, "doc_start", "outside of 0 to its token's position", "the start of its document"))

    work = (position - first + 1).sum(0).view(-1, chunk).sum(1)
    given = torch.empty(len(work), dtype=torch.int64)  # the rank of each chunk
    load = torch.zeros(ranks, dtype=torch.int64)
    for chunks in work.argsort(descending=True, stable=True).split(ranks):
        least_first = load.argsort(stable=True)
        given[chunks] = least_first
        load[least_first] += work[chunks]
    by_chunk = position.view(-1, chunk)
    return Layout(tokens, ranks, [by_chunk[given == rank].flatten() for rank in range(ranks)])
