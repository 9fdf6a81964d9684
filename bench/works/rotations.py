"""RoPE, alone and together with RMSNorm of heads, a packed projection or a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch

import llama_kernels as lk
from bench.works.norms import EPS, plain_norm
from bench.works.work import Call, Piece, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope(Work):
    """q (B, Hq, S, D), k (B, Hkv, S, D), both views of (B, S, H, D) memory -> q, k rotated."""

    B: int
    S: int
    Hq: int
    Hkv: int
    D: int

    op: ClassVar[str] = "rope"
    arguments: ClassVar[tuple[str, ...]] = ("q", "k")
    outputs: ClassVar[tuple[str, ...]] = ("q_rotated", "k_rotated")

    def draw(self, device: str) -> Call:
        q, k, dq, dk = (
            torch.randn(self.B, self.S, H, self.D, device=device, dtype=self.dtype).transpose(1, 2)
            for H in (self.Hq, self.Hkv, self.Hq, self.Hkv)
        )
        return Call((q, k), (dq, dk))

    def tables(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin (S, D/2) float32."""
        inv_freq, _ = lk.rope_frequencies(self.D, 500000.0)
        return lk.rope_tables(inv_freq.to(device), self.S)

    def wide_tables(self, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin (1, S, D) with both halves, as Transformers passes them to its layers."""
        cos, sin = (torch.cat((x, x), -1)[None].to(dtype) for x in self.tables(device))
        return cos, sin

    def head_bytes(self, heads: int) -> int:
        """Bytes of `heads` heads of all tokens."""
        return self.B * self.S * heads * self.D * self.dtype.itemsize

    @property
    def table_bytes(self) -> int:
        return 2 * self.S * (self.D // 2) * 4

    def least_bytes(self) -> tuple[int, int]:
        each_way = 2 * self.head_bytes(self.Hq + self.Hkv) + self.table_bytes
        return each_way, each_way

    def reference(self, q, k):
        return lk.reference.rope(q, k, *self.tables(q.device))

    def plain(self, q, k):
        return plain_rope(q, k, *self.wide_tables(q.device, q.dtype))

    def pieces(self, call: Call) -> Iterator[Piece]:
        """One piece for each sequence."""
        for b in range(self.B):
            one = slice(b, b + 1)
            part = Call(*(tuple(x[one] for x in tensors) for tensors in call))
            yield Piece(part, (one,) * len(call.grads), (one,) * len(call.args))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MRope(Rope):
    """Rope of tokens with three positions each: text, an image of 32 by 32 places, and text. M-RoPE of Qwen2-VL.

    q, k as in Rope. All sequences have the same positions.
    """

    op: ClassVar[str] = "mrope"

    @property
    def sections(self) -> tuple[int, int, int]:
        """Columns of the tables for time, height and width: 1/4, 3/8 and 3/8, as in Qwen2-VL."""
        half = self.D // 2
        return half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8

    def position_ids(self, device: str) -> torch.Tensor:
        """(3, 1, S)."""
        i = torch.arange(self.S, device=device)
        first, side = self.S // 4, 32
        place = (i - first).clamp(0, side * side)
        in_image = (i >= first) & (place < side * side)
        after = i - torch.clamp(i - first, 0, side * side - side)  # an image takes as many positions as its longer side
        of_axes = (torch.full_like(i, first), first + place // side, first + place % side)
        return torch.stack([torch.where(in_image, x, after) for x in of_axes])[:, None]

    def axes(self, device: str) -> torch.Tensor:
        return lk.rope_axes(self.sections, device=device)

    def merged_tables(self, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin (1, S, D): for each token, the columns of its positions, as Transformers passes them to its
        layers."""
        rows, columns = self.position_ids(device)[self.axes(device)].movedim(0, -1), torch.arange(self.D // 2)
        chosen = (x[rows, columns.to(device)] for x in self.tables(device))
        cos, sin = (torch.cat((x, x), -1).to(dtype) for x in chosen)
        return cos, sin

    def least_bytes(self) -> tuple[int, int]:
        each_way = super().least_bytes()[0] + 3 * self.S * 8 + self.D // 2 * 8
        return each_way, each_way

    def reference(self, q, k):
        positions, axes = self.position_ids(q.device), self.axes(q.device)
        return lk.reference.rope(q, k, *self.tables(q.device), positions, axes=axes)

    def plain(self, q, k):
        return plain_rope(q, k, *self.merged_tables(q.device, q.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QKNormRope(Rope):
    """q, k as in Rope, q_weight, k_weight (D,) -> q, k after RMSNorm of every head and rotation."""

    op: ClassVar[str] = "qk_norm_rope"
    arguments: ClassVar[tuple[str, ...]] = ("q", "k", "q_weight", "k_weight")

    def draw(self, device: str) -> Call:
        (q, k), grads = super().draw(device)
        weights = (torch.rand(self.D, device=device, dtype=self.dtype) + 0.5 for _ in range(2))
        return Call((q, k, *weights), grads)

    def least_bytes(self) -> tuple[int, int]:
        heads, rest = self.head_bytes(self.Hq + self.Hkv), self.table_bytes + 2 * self.D * self.dtype.itemsize
        return 2 * heads + rest, 3 * heads + rest  # x, y; x, dy, dx

    def reference(self, q, k, q_weight, k_weight):
        return lk.reference.qk_norm_rope(q, k, q_weight, k_weight, *self.tables(q.device), eps=EPS)

    def plain(self, q, k, q_weight, k_weight):
        return super().plain(plain_norm(q, q_weight), plain_norm(k, k_weight))

    def pieces(self, call: Call) -> Iterator[Piece]:
        for (q_and_k, grads), outputs, arguments in super().pieces(Call(call.args[:2], call.grads)):
            yield Piece(Call((*q_and_k, *call.args[2:]), grads), outputs, (*arguments, ..., ...))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeQKV(Rope):
    """A packed projection qkv (B, S, (Hq + 2 Hkv) D) -> q, k rotated, v, each (B, H, S, D)."""

    op: ClassVar[str] = "rope_qkv"
    arguments: ClassVar[tuple[str, ...]] = ("qkv",)
    outputs: ClassVar[tuple[str, ...]] = ("q_rotated", "k_rotated", "v")

    def draw(self, device: str) -> Call:
        _, (dq, dk) = super().draw(device)
        qkv = torch.randn(self.B, self.S, (self.Hq + 2 * self.Hkv) * self.D, device=device, dtype=self.dtype)
        return Call((qkv,), (dq, dk, torch.randn_like(dk)))

    def least_bytes(self) -> tuple[int, int]:
        forward, backward = super().least_bytes()  # the forward returns v as a view
        return forward, backward + 2 * self.head_bytes(self.Hkv)

    def reference(self, qkv):
        return lk.reference.rope_qkv(qkv, self.Hq, self.Hkv, *self.tables(qkv.device))

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v as views."""
        heads = qkv.unflatten(-1, (-1, self.D)).transpose(1, 2)
        return heads.split((self.Hq, self.Hkv, self.Hkv), 1)

    def plain(self, qkv):
        q, k, v = self.split(qkv)
        return *super().plain(q, k), v


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeIntoCache(Rope):
    """One new token: q (B, Hq, 1, D), k, v (B, Hkv, 1, D) -> q rotated, and k and v read from caches of S tokens.

    Every provider makes its own `caches`.
    """

    op: ClassVar[str] = "rope_into_cache"
    arguments: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    outputs: ClassVar[tuple[str, ...]] = ("q_rotated", "k_cached", "v_cached")
    directions: ClassVar[tuple[str, ...]] = ("forward",)

    @property
    def position(self) -> int:
        """Where in the caches the token goes."""
        return self.S // 2

    def caches(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.zeros(self.B, self.Hkv, self.S, self.D, device=device, dtype=self.dtype) for _ in range(2))

    def draw(self, device: str) -> Call:
        sizes = (self.Hq, self.Hkv, self.Hkv)
        args = tuple(torch.randn(self.B, H, 1, self.D, device=device, dtype=self.dtype) for H in sizes)
        return Call(args, tuple(torch.zeros_like(x) for x in args))

    def least_bytes(self) -> tuple[int, int]:
        return 2 * self.B * (self.Hq + 2 * self.Hkv) * self.D * self.dtype.itemsize + 2 * (self.D // 2) * 4, 0

    def angles(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin (1, D/2) of the position."""
        return tuple(x[self.position, None] for x in self.tables(device))

    def reference(self, q, k, v):
        return *lk.reference.rope(q, k, *self.angles(q.device)), v

    def plain(self, q, k, v):
        cos, sin = (x[:, self.position, None] for x in self.wide_tables(q.device, q.dtype))
        return *plain_rope(q, k, cos, sin), v

    def pieces(self, call: Call) -> Iterator[Piece]:
        yield Piece(call, (..., ..., ...), (..., ..., ...))


def plain_rope(q, k, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """apply_rotary_pos_emb of Transformers; cos, sin (1, S, D)."""
    return tuple(plain_rotation(x, cos, sin) for x in (q, k))


def plain_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x0, x1 = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-x1, x0), dim=-1) * sin.unsqueeze(1)
