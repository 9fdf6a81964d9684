"""Attention of completions that share a prompt in one sequence: `kv_prefix`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch

import llama_kernels as lk
from bench.works.attention import AnyAttention, pairs
from bench.works.work import Call, Piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedPrompt(AnyAttention):
    """Causal attention within a prompt, and of each completion to the prompt and to itself.

    q (1, Hq, S, D), k, v (1, Hkv, S, D), views of (1, S, H, D) -> o. S is prompt + completions * length tokens.
    """

    prompt: int
    completions: int
    length: int  # of each completion

    op: ClassVar[str] = "shared_prompt"

    @property
    def S(self) -> int:
        return self.prompt + self.completions * self.length

    def draw(self, device: str) -> Call:
        return self._drawn(1, self.S, device)

    def bounds(self, first: int, end: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """kv_start and kv_prefix of rows first to end - 1, (1, rows) int32."""
        i = torch.arange(first, end, device=device)[None]
        own = i - (i - self.prompt) % self.length
        completion = i >= self.prompt
        return torch.where(completion, own, 0).int(), torch.where(completion, self.prompt, 0).int()

    # The last query of a piece is at the position of its last key.

    def reference(self, q, k, v):
        kv_start, kv_prefix = self.bounds(k.shape[2] - q.shape[2], k.shape[2], q.device)
        return lk.reference.attention(q, k, v, kv_start=kv_start, kv_prefix=kv_prefix)

    def plain(self, q, k, v):
        kv_start, kv_prefix = self.bounds(k.shape[2] - q.shape[2], k.shape[2], q.device)
        k, v = (x.repeat_interleave(self.Hq // self.Hkv, 1) for x in (k, v))
        i = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
        j = torch.arange(k.shape[2], device=q.device)
        see = ((j >= kv_start.mT) & (j <= i)) | (j < kv_prefix.mT)
        scores = (q @ k.mT * self.D**-0.5).masked_fill(~see, float("-inf"))
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v

    @property
    def tokens(self) -> tuple[int, int]:
        return self.S, self.S

    @property
    def visible_pairs(self) -> int:
        return pairs(self.prompt) + self.completions * (pairs(self.length) + self.length * self.prompt)

    def pieces(self, call: Call) -> Iterator[Piece]:
        return self._cut(call, [self.S])
