"""The rotation of CPU tensors, in fewer steps than the reference takes, with the same bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llama_kernels.ops.rotation import full_width
from llama_kernels.reference.rope import angles_of_tokens


class CpuAngles(NamedTuple):
    """y = x * cos + partner(x) * sin for each element x of a head, where the partner is the other element of its pair.

    The sine of the first element of a pair is negative. Products with it, and so sums, have the bits of a difference.
    """

    cos: torch.Tensor  # (S, R), (B, 1, S, R) or (T, 1, R), float32; likewise sin
    sin: torch.Tensor
    interleaved: bool

    @staticmethod
    def of(call: Any) -> CpuAngles:
        """The angles of a call of the op `rope`."""
        tables = angles_of_tokens(call.q, call.cos, call.sin, call.position_ids, call.axes)
        cos, sin = (table.float() for table in tables)
        interleaved, full = call.interleaved, full_width(call.cos, call.q.shape[-1])
        sin0, sin1 = _pairs(sin, interleaved) if full else (sin, sin)
        signed = (sin1, sin0.neg()) if call.inverse else (sin0.neg(), sin1)
        if not full:
            cos = _joined((cos, cos), interleaved)
        return CpuAngles(cos, _joined(signed, interleaved), interleaved)

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
