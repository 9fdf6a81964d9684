"""Decoding on the CPU: a query of its own sees one range of keys, so k and v are sliced and there is no mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llama_kernels.ops.attention.call import AttentionCall

Range = tuple[int, int]  # of keys: the first, and one past the last, which is not below the first


def ranges_of(call: AttentionCall) -> list[Range] | None:
    """The keys that the query of each sequence of the dense `call` sees: one range where it is that of all.

    None: a sequence has several queries, or a prefix, or there is no sequence.
    """
    if call.q.shape[2] != 1 or call.kv_prefix is not None or not call.q.shape[0]:
        return None
    B, Sk = call.q.shape[0], call.k.shape[2]
    first = 0 if call.left is None else max(Sk - 1 - call.left, 0)  # the query is aligned with the last key
    if call.kv_start is None and call.kv_end is None:
        return [(first, Sk)]
    starts, ends = _values(call.kv_start, B, 0), _values(call.kv_end, B, Sk)
    firsts = [min(max(first, start), Sk) for start in starts]
    ranges = [(first, max(first, min(end, Sk))) for first, end in zip(firsts, ends, strict=True)]
    return ranges[:1] if len(set(ranges)) == 1 else ranges


def _values(bound: torch.Tensor | None, B: int, otherwise: int) -> list[int]:
    return [otherwise] * B if bound is None else bound.flatten().tolist()


def calls_of(call: AttentionCall, ranges: list[Range]) -> Iterator[AttentionCall]:
    """`call` as calls without bounds and window, one for each range of `ranges_of`."""
    B = call.q.shape[0] // len(ranges)
    for n, (first, end) in enumerate(ranges):
        q, k, v = (x[n * B : (n + 1) * B] for x in (call.q, call.k, call.v))
        yield call._replace(
            q=q, k=k[:, :, first:end], v=v[:, :, first:end], kv_start=None, kv_end=None, longest_k=end - first,
            left=None, right=None,
        )  # fmt: skip
