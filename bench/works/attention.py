"""Attention: dense, packed and decoding."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch

import llama_kernels as lk
from bench.works.rotations import Rope, plain_rotation
from bench.works.work import Call, Piece, Work

QUERIES = 1024  # queries of a piece
PLAIN_LIMIT = 2**31  # scores; plain PyTorch, which writes all of them, is not measured above


def pairs(S: int, window: int = -1) -> int:
    """The number of visible (query, key) under a causal mask of S tokens. `window`: keys to the left, or -1 for all."""
    reach = S if window < 0 else min(window + 1, S)
    return reach * (reach + 1) // 2 + (S - reach) * reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyAttention(Work):
    """What all kinds of attention share."""

    Hq: int
    Hkv: int
    D: int

    arguments: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    outputs: ClassVar[tuple[str, ...]] = ("o",)

    def _drawn(self, B: int, S: int, device: str) -> Call:
        """B sequences of S tokens, in the memory order of projections."""
        q, k, v, do = (
            torch.randn(B, S, H, self.D, device=device, dtype=self.dtype).transpose(1, 2)
            for H in (self.Hq, self.Hkv, self.Hkv, self.Hq)
        )
        return Call((q, k, v), (do,))

    def reference(self, q, k, v):
        return lk.reference.attention(q, k, v, window_size=(self._window, -1))

    def plain(self, q, k, v):
        return plain_attention(q, k, v, self._window)

    @property
    def _window(self) -> int:
        return getattr(self, "window", -1)

    def judged(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The last key head and its query heads, in the last sequence: its offsets in memory are the largest."""
        return x[-1:, -(1 if name in ("dk", "dv") else self.Hq // self.Hkv) :]

    def _cut(self, call: Call, ends: list[int]) -> Iterator[Piece]:
        """Pieces of at most QUERIES rows of one sequence. The sequences end at `ends`; q, k, v are (B, H, T, D)."""
        q, k, v = (self.judged(name, x) for name, x in zip(("dq", "dk", "dv"), call.args, strict=True))
        do = self.judged("o", call.grads[0])
        every, start = slice(None), 0
        for end in ends:
            for a in range(start, end, QUERIES):
                b = min(a + QUERIES, end)
                first = start if self._window < 0 else max(start, a - self._window)
                rows, keys = (every, every, slice(a, b)), (every, every, slice(first, b))
                yield Piece(Call((q[rows], k[keys], v[keys]), (do[rows],)), (rows,), (rows, keys, keys))
            start = end

    @property
    @abc.abstractmethod
    def tokens(self) -> tuple[int, int]:
        """The numbers of queries and keys in all sequences."""

    @property
    @abc.abstractmethod
    def visible_pairs(self) -> int:
        """The number of visible pairs (query, key) in all sequences."""

    def least_bytes(self) -> tuple[int, int]:
        q, k = (n * H * self.D * self.dtype.itemsize for n, H in zip(self.tokens, (self.Hq, self.Hkv), strict=True))
        lse = self.tokens[0] * self.Hq * 4
        return 2 * q + 2 * k + lse, 4 * q + 4 * k + lse  # q, k, v, o; the same, do, dq, dk, dv

    def least_flops(self) -> tuple[int, int]:
        """Two products for each visible pair in the forward, five in the backward."""
        product = 2 * self.Hq * self.D * self.visible_pairs
        return 2 * product, 5 * product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(AnyAttention):
    """Causal attention to at most `window` keys to the left (-1: all).

    q (B, Hq, S, D), k, v (B, Hkv, S, D), views of (B, S, H, D) -> o.
    """

    B: int
    S: int
    window: int = -1

    op: ClassVar[str] = "attention"

    def draw(self, device: str) -> Call:
        return self._drawn(self.B, self.S, device)

    @property
    def tokens(self) -> tuple[int, int]:
        return self.B * self.S, self.B * self.S

    @property
    def visible_pairs(self) -> int:
        return self.B * pairs(self.S, self.window)

    def pieces(self, call: Call) -> Iterator[Piece]:
        return self._cut(call, [self.S])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundedAttention(Attention):
    """Attention with bounds that hide no key, as in a patched model with an attention_mask of ones."""

    op: ClassVar[str] = "bounded_attention"

    def bounds(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """kv_start and kv_end, (B, S) int32."""
        start = torch.zeros(self.B, self.S, dtype=torch.int32, device=device)
        return start, torch.full_like(start, self.S)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeAttention(Attention):
    """RoPE of q and k at positions 0 to S - 1, then attention. The backward rotates dq and dk inversely."""

    op: ClassVar[str] = "rope_attention"

    tables, wide_tables = Rope.tables, Rope.wide_tables

    def least_bytes(self) -> tuple[int, int]:
        forward, backward = super().least_bytes()
        tables = 2 * self.S * (self.D // 2) * 4
        return forward + tables, backward + tables

    # The last query of a piece is at the position of its last key; the scores depend only on distances.

    def reference(self, q, k, v):
        cos, sin = self.tables(q.device)
        positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        q, k = lk.reference.rope(q, None, cos, sin, positions)[0], lk.reference.rope(k, None, cos, sin)[0]
        return super().reference(q, k, v)

    def plain(self, q, k, v):
        tables, (Sq, Sk) = self.wide_tables(q.device, q.dtype), (q.shape[2], k.shape[2])
        q = plain_rotation(q, *(table[:, Sk - Sq : Sk] for table in tables))
        return super().plain(q, plain_rotation(k, *(table[:, :Sk] for table in tables)), v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionVarlen(AnyAttention):
    """Causal attention within each packed document. q (1, Hq, T, D), k, v (1, Hkv, T, D), views of (T, H, D) -> o."""

    lengths: tuple[int, ...]

    op: ClassVar[str] = "attention_varlen"

    def draw(self, device: str) -> Call:
        return self._drawn(1, sum(self.lengths), device)

    @property
    def ends(self) -> list[int]:
        return torch.tensor(self.lengths).cumsum(0).tolist()

    def cu_seqlens(self, device: str) -> torch.Tensor:
        return torch.tensor([0, *self.ends], dtype=torch.int32, device=device)

    @property
    def tokens(self) -> tuple[int, int]:
        return sum(self.lengths), sum(self.lengths)

    @property
    def visible_pairs(self) -> int:
        return sum(map(pairs, self.lengths))

    def pieces(self, call: Call) -> Iterator[Piece]:
        return self._cut(call, self.ends)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(AnyAttention):
    """Attention of one new token to a cache. q (B, Hq, 1, D), k, v (B, Hkv, Sk, D) -> o."""

    B: int
    Sk: int

    op: ClassVar[str] = "decode"
    directions: ClassVar[tuple[str, ...]] = ("forward",)

    def draw(self, device: str) -> Call:
        q, do = (torch.randn(self.B, self.Hq, 1, self.D, device=device, dtype=self.dtype) for _ in range(2))
        k, v = (torch.randn(self.B, self.Hkv, self.Sk, self.D, device=device, dtype=self.dtype) for _ in range(2))
        return Call((q, k, v), (do,))

    @property
    def tokens(self) -> tuple[int, int]:
        return self.B, self.B * self.Sk

    @property
    def visible_pairs(self) -> int:
        return self.B * self.Sk

    def pieces(self, call: Call) -> Iterator[Piece]:
        args = tuple(self.judged(name, x) for name, x in zip(("dq", "dk", "dv"), call.args, strict=True))
        yield Piece(Call(args, (self.judged("o", call.grads[0]),)), (...,), (..., ..., ...))


def plain_attention(q, k, v, window: int = -1) -> torch.Tensor:
    """Eager attention of Transformers: it repeats k and v and writes the scores. Causality is bottom-right aligned."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    i = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2], device=q.device)
    hidden = j > i if window < 0 else (j > i) | (i - j > window)
    p = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1, dtype=torch.float32).to(q.dtype)
    return p @ v
