"""A Llama in one file: RMSNorm, RoPE, grouped-query attention and SwiGLU. Its operations are an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import llama_kernels as lk


class Ops(NamedTuple):
    """The operations of the model that this package replaces."""

    norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x (..., C), weight (C,) -> (..., C)
    add_norm: Callable[..., Any]  # x, residual, weight -> norm(x + residual), x + residual
    rotate: Callable[..., Any]  # q (B, Hq, S, D), k (B, Hkv, S, D), cos, sin (S, D/2) -> q, k
    attend: Callable[..., Any]  # q, k, v (B, Hkv, S, D) -> (B, Hq, S, D), causal


def _stock_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


def _stock_add_norm(x, residual, weight):
    residual = residual + x
    return _stock_norm(residual, weight), residual


def _stock_rotate(q, k, cos, sin):
    def rotated(x):
        x0, x1 = x.chunk(2, -1)  # (B, H, S, D/2) each
        return torch.cat((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1).to(x.dtype)

    return rotated(q), rotated(k)


def _stock_attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


stock = Ops(_stock_norm, _stock_add_norm, _stock_rotate, _stock_attend)
ours = Ops(lk.rms_norm, lk.add_rms_norm, lk.rope, lk.attention)


@dataclass(frozen=True)
class Config:
    vocab: int = 256
    layers: int = 4
    width: int = 128  # C
    heads: int = 4  # Hq
    kv_heads: int = 2  # Hkv
    hidden: int = 352  # of the MLP
    positions: int = 128

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Attention(nn.Module):
    def __init__(self, config: Config, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        C, D = config.width, config.head_dim
        self.qkv = nn.Linear(C, (config.heads + 2 * config.kv_heads) * D, bias=False)
        self.out = nn.Linear(C, C, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = (self.config.heads, self.config.kv_heads, self.config.kv_heads)
        qkv = self.qkv(x).unflatten(-1, (-1, self.config.head_dim))  # (B, S, Hq + 2 Hkv, D)
        q, k, v = (x.transpose(1, 2) for x in qkv.split(heads, dim=2))  # (B, H, S, D), views of one projection
        q, k = self.ops.rotate(q, k, cos, sin)
        o = self.ops.attend(q, k, v)  # (B, Hq, S, D)
        return self.out(o.transpose(1, 2).flatten(2))  # (B, S, C)


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)  # (B, S, hidden) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.attention, self.mlp = Attention(config, ops), MLP(config)
        self.attention_norm = nn.Parameter(torch.ones(config.width))
        self.mlp_norm = nn.Parameter(torch.ones(config.width))

    def forward(self, x, residual, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
        """x is the last summand of the block before. Its addition to `residual` is fused with the norm that follows."""
        y, residual = self.ops.add_norm(x, residual, self.attention_norm)
        y, residual = self.ops.add_norm(self.attention(y, cos, sin), residual, self.mlp_norm)
        return self.mlp(y), residual


class Llama(nn.Module):
    """Tokens (B, S) -> logits (B, S, vocab). The parameters do not depend on `ops`."""

    cos: torch.Tensor  # (positions, D/2)
    sin: torch.Tensor

    def __init__(self, config: Config, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.width))
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        inv_freq, factor = lk.rope_frequencies(config.head_dim)
        cos, sin = lk.rope_tables(inv_freq, config.positions, factor)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # Summands of the residual stream start smaller, by the number of additions.
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * config.layers) ** 0.5 if last else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        S = tokens.shape[1]
        x = self.embedding(tokens)  # (B, S, C)
        residual = torch.zeros_like(x)
        for block in self.blocks:
            x, residual = block(x, residual, self.cos[:S], self.sin[:S])
        y, _ = self.ops.add_norm(x, residual, self.norm)
        return self.head(y)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, in nats, of each token given those before it; tokens (B, S + 1)."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
