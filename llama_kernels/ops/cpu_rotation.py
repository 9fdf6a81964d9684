"""The rotation of CPU tensors, in fewer steps than the reference takes, with the same bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llama_kernels.ops.rotation import Rotation, full_width
from llama_kernels.reference.rope import angles_of_tokens


def rotate_on_cpu(rotation: Rotation, q: torch.Tensor, k: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """q and k, (B, H, S, D) or (T, H, D) each, rotated, in their dtypes and any memory order; k may be None."""
    angles = _Angles.of(rotation, q)
    return angles.rotate(q), None if k is None else angles.rotate(k)


def write_into_cache(cache: torch.Tensor, heads: torch.Tensor, slots: torch.Tensor) -> None:
    """Write heads (B, H, S, D) into cache (B, H, L, D), to the slots (S,), (1, S) or (B, S), but not those outside."""
    if slots.ndim == 2 and slots.shape[0] > 1:
        for of_cache, of_heads, of_slots in zip(cache, heads, slots, strict=True):
            write_into_cache(of_cache[None], of_heads[None], of_slots)
        return
    slots = slots.flatten().long()
    outside = [not 0 <= slot < cache.shape[2] for slot in slots.tolist()]
    if any(outside):
        there = torch.tensor(outside, device=slots.device).logical_not_()
        heads, slots = heads[:, :, there], slots[there]
    cache.index_copy_(2, slots, heads)


class _Angles(NamedTuple):
    """y = x * cos + partner(x) * sin for each element x of a head, where the partner is the other element of its pair.

    The sine of the first element of a pair is negative. Products with it, and so sums, have the bits of a difference.
    """

    cos: torch.Tensor  # (S, R), (B, 1, S, R) or (T, 1, R), float32; likewise sin
    sin: torch.Tensor
    interleaved: bool

    @staticmethod
    def of(rotation: Rotation, q: torch.Tensor) -> _Angles:
        """The angles of the tokens of q."""
        of_cos, of_sin, position_ids, interleaved, inverse, axes = rotation
        tables: Any = angles_of_tokens(q, of_cos, of_sin, position_ids, axes)
        cos, sin = (table.float() for table in tables)
        full = full_width(cos, q.shape[-1])
        sin0, sin1 = _pairs(sin, interleaved) if full else (sin, sin)
        signed = (sin1, sin0.neg()) if inverse else (sin0.neg(), sin1)
        if not full:
            cos = _joined((cos, cos), interleaved)
        return _Angles(cos, _joined(signed, interleaved), interleaved)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, S, D) or (T, H, D) rotated, in its dtype."""
        R, rows = self.cos.shape[-1], x.float()
        rotated = rows if x.shape[-1] == R else rows[..., :R]
        y = (rotated * self.cos).add_(self._partner(rotated).mul_(self.sin))
        return (y if rotated is rows else torch.cat((y, rows[..., R:]), -1)).to(x.dtype)

    def _partner(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of x (..., R) in which the two elements of each pair are exchanged."""
        if self.interleaved:
            return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return x.roll(x.shape[-1] // 2, -1)


def _pairs(table: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, ...]:
    """(..., R) as (..., R/2) of the first elements of pairs and of the second."""
    return (table[..., ::2], table[..., 1::2]) if interleaved else table.chunk(2, -1)


def _joined(pairs: tuple[torch.Tensor, ...], interleaved: bool) -> torch.Tensor:
    """The inverse of `_pairs`."""
    return torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
