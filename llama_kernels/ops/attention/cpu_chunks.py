"""The rows of a dense attention call of CPU tensors in chunks, each with the keys that its rows see.

Keys that no row of a chunk sees are left out: a causal call of many rows computes about half of its scores, a call with
a short window few of them. Sequences that see different keys are in chunks of their own: which keys are computed
together, and so the last bits of a result, would depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from llama_kernels.core.tensors import empty_in_order_of
from llama_kernels.ops.attention.call import AttentionCall

# The keys of a chunk begin and end at multiples of it. A vectorised sum then adds those of a row in one order, whatever
# keys other rows see.
_LANES = 16


class Chunk(NamedTuple):
    """Some rows of q, and the keys from the first to the last that one of them sees, or a few more."""

    rows: slice
    keys: slice
    see: torch.Tensor | None = None  # bool, (1, rows, keys): which key each row sees. None: every row sees them all
    sees_nothing: torch.Tensor | None = None  # bool, (1, rows): which row sees no key. None: none of them
    is_causal: bool = False  # row i of the chunk sees the first i + 1 of these keys alone; `see` is then None
    sequences: slice = slice(None)

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The part of x (B, H, Sq, ...)."""
        return x[self.sequences, :, self.rows]

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """The part of x (B, Hkv, Sk, D). Rows of keys that are not seen are 0, since they may hold NaN."""
        x = x[self.sequences, :, self.keys]
        if self.see is None:
            return x
        seen = self.see.view(torch.uint8).amax(-2).bool()  # `any` takes 30 times as long
        return x if seen.all() else x.masked_fill(~seen[:, None, :, None], 0)


def chunks(call: AttentionCall, size: int, unmasked: bool = False) -> Iterator[Chunk]:
    """All rows that see a key, in chunks of at most `size` rows.

    unmasked: chunks without `see` may have more rows, and be causal.
    """
    if 0 in (*call.q.shape, *call.k.shape):
        return
    for sequences, seen in _keys_of_rows(call).of_sequences():
        found: Iterable[Chunk] | None = _unmasked(seen) if unmasked else None
        for chunk in _masked(seen, size, call.k.shape[2]) if found is None else found:
            yield chunk._replace(sequences=sequences)


class _KeysOfRows(NamedTuple):
    """The first key that each row sees beside its prefix, the end of these keys, and the length of the prefix.

    Each is (B or 1, Sq). Where a row sees a prefix at most, the first key is Sk and the end 0.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    prefixes: torch.Tensor | None

    def of_sequences(self) -> Iterator[tuple[slice, _KeysOfRows]]:
        """The sequences that see the same keys, with these keys as (1, Sq): all of them, or each alone."""
        given = [x for x in self if x is not None]
        B = max(x.shape[0] for x in given)
        if all(x.shape[0] == 1 or torch.equal(x, x[:1].expand_as(x)) for x in given):
            yield slice(None), self._of(slice(0, 1))
            return
        for b in range(B):
            yield slice(b, b + 1), self._of(slice(b, b + 1))

    def _of(self, sequence: slice) -> _KeysOfRows:
        return _KeysOfRows._make(x if x is None or x.shape[0] == 1 else x[sequence] for x in self)


def _keys_of_rows(call: AttentionCall) -> _KeysOfRows:
    Sq, Sk, left, right = call.q.shape[2], call.k.shape[2], call.left, call.right
    position = torch.arange(Sk - Sq, Sk, device=call.q.device)[None]  # queries are aligned with the last keys
    start = torch.zeros_like(position) if left is None else (position - left).clamp_(0)
    end = torch.full_like(position, Sk) if right is None else (position + right + 1).clamp_(max=Sk)
    start = start if call.kv_start is None else torch.maximum(start, call.kv_start)
    end = end if call.kv_end is None else torch.minimum(end, call.kv_end)
    nothing = start >= end
    start, end = start.masked_fill(nothing, Sk), end.masked_fill(nothing, 0)
    return _KeysOfRows(start, end, None if call.kv_prefix is None else call.kv_prefix.clamp(0, Sk))


def _masked(seen: _KeysOfRows, size: int, Sk: int) -> Iterator[Chunk]:
    """Chunks of `size` rows, the last of which may be shorter."""
    starts, ends, prefixes = seen
    sees_nothing = starts >= ends if prefixes is None else (starts >= ends) & (prefixes == 0)
    for a in range(0, starts.shape[1], size):
        rows = slice(a, a + size)
        start, end = starts[:, rows], ends[:, rows]
        prefix = None if prefixes is None else prefixes[:, rows]
        first, last = int(start.min()), int(end.max())
        if prefix is not None and (longest := int(prefix.max())):
            first, last = 0, max(last, longest)
        if first >= last:
            continue
        first, last = first - first % _LANES, min(last + -last % _LANES, Sk)
        j = torch.arange(first, last, dtype=start.dtype, device=start.device)
        see = None
        if int(start.max()) > first:
            see = j >= start.unsqueeze(-1)
        if int(end.min()) < last:
            before_end = j < end.unsqueeze(-1)
            see = before_end if see is None else see & before_end
        if see is not None and prefix is not None:
            see = see | (j < prefix.unsqueeze(-1))
        yield Chunk(rows, slice(first, last), see, sees_nothing[:, rows])


def _unmasked(seen: _KeysOfRows) -> list[Chunk] | None:
    """All rows that see a key, in at most two chunks without `see`. None: there are no such chunks.

    Padding on the left leaves one chunk of a causal call. Padding on the right leaves two, since the rows that are
    padding see all keys that are not.
    """
    if seen.prefixes is not None:
        return None
    starts, ends = seen.starts[0].tolist(), seen.ends[0].tolist()
    seeing = [i for i, end in enumerate(ends) if end]
    if not seeing:
        return []
    a, b = seeing[0], seeing[-1] + 1
    first, end = starts[a], ends[b - 1]
    square = min(end - first, b - a)
    found = []
    if square > 1 and ends[a : a + square] == list(range(first + 1, first + square + 1)):
        found.append(Chunk(slice(a, a + square), slice(first, first + square), is_causal=True))
    rest = a + square if found else a
    if rest < b:
        found.append(Chunk(slice(rest, b), slice(first, end)))
    same = starts[a:b] == [first] * (b - a) and ends[rest:b] == [end] * (b - rest)
    return found if same else None


def empty_results(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in float32, 0 and -inf, as of rows that see no key."""
    out = empty_in_order_of(call.q, (*call.q.shape[:3], call.v.shape[-1]), torch.float32)
    return out.zero_(), call.q.new_full(call.q.shape[:3], -torch.inf, dtype=torch.float32)


def empty_gradients(call: AttentionCall) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv in float32, all 0."""
    return tuple(empty_in_order_of(x, dtype=torch.float32).zero_() for x in (call.q, call.k, call.v))
