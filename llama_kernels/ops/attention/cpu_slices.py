"""Decoding on the CPU: a query of its own sees one range of keys, so k and v are sliced and there is no mask."""

from __future__ import annotations

import torch

from llama_kernels.ops.attention.call import AttentionCall


def calls_of_slices(call: AttentionCall) -> list[AttentionCall] | None:
    """The dense `call` as calls without bounds and window, whose results joined are those of `call`.

    They are one call for each sequence, or one for all where all see the same keys. None: a sequence has several
    queries, or a prefix, or `call` has no bounds and no window already.
    """
    bounded = call.kv_start is not None or call.kv_end is not None
    if call.q.shape[2] != 1 or call.kv_prefix is not None or not (bounded or call.left is not None):
        return None
    B, Sk = call.q.shape[0], call.k.shape[2]
    first = 0 if call.left is None else max(Sk - 1 - call.left, 0)  # the query is aligned with the last key
    if not bounded:
        return [_of_keys(call, slice(None), first, Sk)]
    ranges = [
        (max(first, start), min(end, Sk))
        for start, end in zip(_values(call.kv_start, B, 0), _values(call.kv_end, B, Sk), strict=True)
    ]
    if len(set(ranges)) == 1:
        return [_of_keys(call, slice(None), *ranges[0])]
    return [_of_keys(call, slice(b, b + 1), *keys) for b, keys in enumerate(ranges)]


def _values(bound: torch.Tensor | None, B: int, otherwise: int) -> list[int]:
    return [otherwise] * B if bound is None else bound.flatten().tolist()


def _of_keys(call: AttentionCall, sequences: slice, first: int, end: int) -> AttentionCall:
    """`sequences` of `call` with the keys from `first` to the one before `end`, all of which their queries see."""
    end = max(first, end)
    k, v = (x[sequences, :, first:end] for x in (call.k, call.v))
    return call._replace(
        q=call.q[sequences], k=k, v=v, kv_start=None, kv_end=None, longest_k=end - first, left=None, right=None
    )
