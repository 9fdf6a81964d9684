"""The rows of a dense attention call of CPU tensors in chunks, each with the keys that its rows see.

Keys that no row of a chunk sees are left out: a causal call of many rows computes about half of its scores, a call with
a short window few of them.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    see: torch.Tensor | None  # bool, (B or 1, rows, keys): which key each row sees. None: every row sees them all
    blind: torch.Tensor  # bool, (B or 1, rows): which row sees no key

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of these keys in x (B, Hkv, Sk, D). Those that no row sees are 0, since they may hold NaN."""
        x = x[:, :, self.keys]
        if self.see is None:
            return x
        seen = self.see.view(torch.uint8).amax(-2).bool()  # `any` takes 30 times as long
        return x if seen.all() else x.masked_fill(~seen[:, None, :, None], 0)


def chunks(call: AttentionCall, size: int) -> Iterator[Chunk]:
    """Chunks of `size` rows; the last may be shorter. Chunks whose rows see no key are left out."""
    if 0 in (*call.q.shape, *call.k.shape):
        return
    starts, ends, prefixes = _ranges(call)
    blind = starts >= ends if prefixes is None else (starts >= ends) & (prefixes == 0)
    for a in range(0, call.q.shape[2], size):
        rows = slice(a, a + size)
        start, end = starts[:, rows], ends[:, rows]
        prefix = None if prefixes is None else prefixes[:, rows]
        first, last = int(start.min()), int(end.max())
        if prefix is not None and (longest := int(prefix.max())):
            first, last = 0, max(last, longest)
        if first >= last:
            continue
        first, last = first - first % _LANES, min(last + -last % _LANES, call.k.shape[2])
        j = torch.arange(first, last, dtype=start.dtype, device=start.device)
        see = None
        if int(start.max()) > first:
            see = j >= start.unsqueeze(-1)
        if int(end.min()) < last:
            before_end = j < end.unsqueeze(-1)
            see = before_end if see is None else see & before_end
        if see is not None and prefix is not None:
            see = see | (j < prefix.unsqueeze(-1))
        yield Chunk(rows, slice(first, last), see, blind[:, rows])


def _ranges(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The first key that each row sees beside its prefix, the end of these keys, and the length of the prefix.

    Each is (B or 1, Sq). Where a row sees a prefix at most, the first key is Sk and the end 0.
    """
    Sq, Sk, left, right = call.q.shape[2], call.k.shape[2], call.left, call.right
    position = torch.arange(Sk - Sq, Sk, device=call.q.device)[None]  # queries are aligned with the last keys
    start = torch.zeros_like(position) if left is None else (position - left).clamp_(0)
    end = torch.full_like(position, Sk) if right is None else (position + right + 1).clamp_(max=Sk)
    start = start if call.kv_start is None else torch.maximum(start, call.kv_start)
    end = end if call.kv_end is None else torch.minimum(end, call.kv_end)
    nothing = start >= end
    start, end = start.masked_fill(nothing, Sk), end.masked_fill(nothing, 0)
    return start, end, None if call.kv_prefix is None else call.kv_prefix.clamp(0, Sk)


def empty_results(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in float32, 0 and -inf, as of rows that see no key."""
    out = empty_in_order_of(call.q, (*call.q.shape[:3], call.v.shape[-1]), torch.float32)
    return out.zero_(), call.q.new_full(call.q.shape[:3], -torch.inf, dtype=torch.float32)


def empty_gradients(call: AttentionCall) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv in float32, all 0."""
    return tuple(empty_in_order_of(x, dtype=torch.float32).zero_() for x in (call.q, call.k, call.v))
