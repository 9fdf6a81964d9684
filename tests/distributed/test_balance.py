"""Layouts that balance the work of packed documents."""

from __future__ import annotations

import pytest
import torch

from llama_kernels.distributed import Layout, balanced_layout

pytestmark = pytest.mark.once


def packed(*rows: tuple[int, ...]) -> torch.Tensor:
    """doc_start of rows of documents of these lengths."""
    starts = [torch.tensor(lengths).cumsum(0) - torch.tensor(lengths) for lengths in rows]
    return torch.stack([s.repeat_interleave(torch.tensor(n)) for s, n in zip(starts, rows, strict=True)]).int()


def seen_of_each_part(layout: Layout, doc_start: torch.Tensor) -> torch.Tensor:
    """(ranks, ranks): how many keys of the rank of the column the queries of the rank of the row see."""
    seen = torch.zeros(layout.ranks, layout.ranks, dtype=torch.int64)
    for rank, rows in enumerate(layout.lists):
        for part in range(layout.ranks):
            first, end = layout.keys_before(part, doc_start[:, rows].long()), layout.keys_before(part, rows + 1)
            seen[rank, part] = (end - first).sum()
    return seen


def slowest_rank(seen: torch.Tensor) -> float:
    """The most work of a rank, where an equal share is 1."""
    return (seen.sum(1).max() * len(seen) / seen.sum()).item()


def ring(seen: torch.Tensor) -> float:
    """When the last rank of a ring ends, forward, where an equal share is 1: a rank sends the block that it is given on
    when it begins with it, and so a rank that is late delays the next one."""
    ranks = len(seen)
    begins = [0] * ranks
    for step in range(1, ranks):
        ends = [begins[rank] + seen[rank, (rank - step + 1) % ranks].item() for rank in range(ranks)]
        begins = [max(ends[rank], begins[rank - 1]) for rank in range(ranks)]
    last = max(begins[rank] + seen[rank, (rank + 1) % ranks].item() for rank in range(ranks))
    return last * ranks / seen.sum().item()


DOCUMENTS = {
    "one is long": packed((5000, *[400] * 10, 4000, *[100] * 30, 384)),
    "the last is long": packed((*[256] * 32, 8192)),
    "all are short": packed((*[100] * 163, 84)),
    "two rows": packed((10000, *[300] * 21, 84), (*[1024] * 8, 8192)),
}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_ranks_have_equal_work(name, ranks):
    doc_start = DOCUMENTS[name]
    tokens = doc_start.shape[1]
    layout = balanced_layout(doc_start, ranks)
    assert all(len(positions) == tokens // ranks for positions in layout.lists)
    seen, zigzag = (seen_of_each_part(x, doc_start) for x in (layout, Layout(tokens, ranks)))
    assert seen.sum() == zigzag.sum() == (torch.arange(tokens) - doc_start + 1).sum()
    assert slowest_rank(seen) < 1.02
    assert ring(seen) < 1.1


def test_zigzag_is_not_balanced_where_documents_are_packed():
    doc_start = DOCUMENTS["the last is long"]
    seen = seen_of_each_part(Layout(doc_start.shape[1], 8), doc_start)
    assert slowest_rank(seen) > 1.4 and ring(seen) > 1.4


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_one_document_in_two_chunks_a_rank_makes_zigzag(ranks):
    tokens = 64 * ranks
    layout, zigzag = balanced_layout(packed((tokens,)), ranks, chunk=32), Layout(tokens, ranks)
    assert all(map(torch.equal, layout.lists, zigzag.lists))


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((torch.zeros(1, 256), 2), TypeError, "doc_start is torch.float32; wanted torch.int32"),
        ((torch.zeros(256, dtype=torch.int32), 2), ValueError, r"doc_start is of shape \(256,\); wanted \(B, tokens\)"),
        ((packed((300,)), 2), ValueError, "of 300 tokens; wanted a multiple of ranks .*, 256. Pad .* to 512 tokens"),
        ((packed((256,)), 0), ValueError, "ranks is 0"),
        ((torch.full((1, 256), 3, dtype=torch.int32), 2), ValueError, "doc_start is outside of 0"),
        ((torch.full((1, 256), -1, dtype=torch.int32), 2), ValueError, "doc_start is outside of 0"),
    ],
    ids=["dtype", "dimensions", "length", "ranks", "after the token", "negative"],
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=f"balanced_layout: .*{text}"):
        balanced_layout(*arguments)
