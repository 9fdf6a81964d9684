"""The calls of the parity check: the inputs of each op, and the op in plain PyTorch.

The functions in plain PyTorch compute in the dtype of their inputs, as Hugging Face's model code does. Their names and
arguments are those of the public functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_kernels.rotary import rope_frequencies, rope_tables

Normal = Callable[..., Tensor]  # sizes -> normally distributed numbers
Inputs = dict[str, Any]  # the arguments of a call, by name


class Sizes(NamedTuple):
    """Sizes of the inputs. `rows` and `columns` are those of RMSNorm."""

    batch: int
    q_heads: int
    kv_heads: int
    tokens: int
    width: int
    rows: int
    columns: int


# On a GPU, the sizes of a common model, with a number of tokens that is not a multiple of a tile. In the interpreter,
# the smallest sizes at which errors can be compared.
ON_GPU = Sizes(batch=2, q_heads=8, kv_heads=2, tokens=500, width=128, rows=512, columns=4096)
ON_CPU = Sizes(batch=1, q_heads=4, kv_heads=2, tokens=150, width=64, rows=64, columns=512)
IN_INTERPRETER = Sizes(batch=1, q_heads=4, kv_heads=2, tokens=40, width=32, rows=16, columns=256)

# --- inputs ----------------------------------------------------------------------------------------------------------


def _heads(s: Sizes, normal: Normal, heads: int, tokens: int | None = None) -> Tensor:
    """(B, H, S, D) in the memory order of a projection, (B, S, H, D)."""
    return normal(s.batch, tokens or s.tokens, heads, s.width).transpose(1, 2)


def _tables(s: Sizes, normal: Normal) -> Inputs:
    cos, sin = rope_tables(rope_frequencies(s.width, base=500000.0)[0], s.tokens)
    return {"cos": cos.to(normal(1).device), "sin": sin.to(normal(1).device)}


def _rope(s: Sizes, normal: Normal) -> Inputs:
    return {"q": _heads(s, normal, s.q_heads), "k": _heads(s, normal, s.kv_heads), **_tables(s, normal)}


def _rope_qkv(s: Sizes, normal: Normal) -> Inputs:
    counts = {"q_heads": s.q_heads, "kv_heads": s.kv_heads}
    return {"qkv": normal(s.batch, s.tokens, (s.q_heads + 2 * s.kv_heads) * s.width), **counts, **_tables(s, normal)}


def _rope_into_cache(s: Sizes, normal: Normal) -> Inputs:
    new = s.tokens // 3
    slots = torch.arange(new, 2 * new, device=normal(1).device)
    q, k, v = (_heads(s, normal, heads, new) for heads in (s.q_heads, s.kv_heads, s.kv_heads))
    caches = {name: normal(s.batch, s.kv_heads, s.tokens, s.width) for name in ("k_cache", "v_cache")}
    return {"q": q, "k": k, "v": v, **caches, "cache_position": slots, **_tables(s, normal)}


def _rms_norm(s: Sizes, normal: Normal) -> Inputs:
    return {"x": normal(s.rows, s.columns), "weight": normal(s.columns)}


def _add_rms_norm(s: Sizes, normal: Normal) -> Inputs:
    return {"residual": normal(s.rows, s.columns), **_rms_norm(s, normal)}


def _qk_norm_rope(s: Sizes, normal: Normal) -> Inputs:
    return {**_rope(s, normal), "q_weight": normal(s.width), "k_weight": normal(s.width)}


def _qkv(s: Sizes, normal: Normal) -> Inputs:
    return {"q": _heads(s, normal, s.q_heads), "k": _heads(s, normal, s.kv_heads), "v": _heads(s, normal, s.kv_heads)}


def _decoding(s: Sizes, normal: Normal) -> Inputs:
    return {**_qkv(s, normal), "q": _heads(s, normal, s.q_heads, 1)}


def _attention_options(s: Sizes, normal: Normal) -> Inputs:
    return {**_qkv(s, normal), "sinks": normal(s.q_heads), "softcap": 5.0, "window_size": (s.tokens // 3, 0)}


def _varlen(s: Sizes, normal: Normal) -> Inputs:
    bounds = torch.tensor([0, s.tokens // 5, s.tokens // 2, s.tokens], dtype=torch.int32, device=normal(1).device)
    tensors = {name: x[0].transpose(0, 1) for name, x in _qkv(s, normal).items()}
    longest = {"max_seqlen_q": s.tokens - s.tokens // 2, "max_seqlen_k": s.tokens - s.tokens // 2}
    return {**tensors, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, **longest}


def _rope_attention(s: Sizes, normal: Normal) -> Inputs:
    return {**_qkv(s, normal), **_tables(s, normal)}


# --- plain PyTorch ---------------------------------------------------------------------------------------------------


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, S, D) rotated by the first S rows of the tables (positions, D/2), which are rounded to its dtype."""
    cos, sin = (torch.cat((t, t), -1)[: x.shape[-2]].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def rope_qkv(qkv: Tensor, q_heads: int, kv_heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.unflatten(-1, (q_heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = heads.split((q_heads, kv_heads, kv_heads), 1)
    return *rope(q, k, cos, sin), v


def rope_into_cache(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_position: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    q, k_cache[:, :, cache_position] = rope(q, k, cos[cache_position], sin[cache_position])
    v_cache[:, :, cache_position] = v
    return q


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalized in float32, rounded, then scaled."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight), total


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return rope(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int] = (-1, 0),
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention, queries aligned with the last keys: scores in q's dtype, softmax in float32, then rounded."""
    group, Sq, Sk = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    distance = torch.arange(Sq, device=q.device)[:, None] + (Sk - Sq) - torch.arange(Sk, device=q.device)
    left = window_size[0] if window_size[0] >= 0 else Sk
    s = s.masked_fill((distance < 0) | (distance > left), -math.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:-1], 1)), -1)
    p = torch.softmax(s.float(), -1)[..., :Sk].to(q.dtype)
    return p @ v


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    """Attention of packed sequences (tokens, heads, head_dim), each with as many queries as keys."""
    lengths = cu_seqlens_q.diff().tolist()
    sequences = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([attention(*each)[0].transpose(0, 1) for each in sequences])


def rope_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attention(*rope(q, k, cos, sin), v)


# --- the calls -------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One call of a public function.

    eager: the function in plain PyTorch. It has the name, arguments and results of the public function.
    inputs: makes the keyword arguments.
    outputs: the names of the results.
    differentiable: the arguments whose gradients are compared.
    written: the arguments that are written in place. They are compared as results are.
    options: what distinguishes the call from others of the same function.
    """

    eager: Callable[..., Any]
    inputs: Callable[[Sizes, Normal], Inputs]
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    options: str = ""

    @property
    def op(self) -> str:
        return self.eager.__name__

    @property
    def label(self) -> str:
        return f"{self.op}, {self.options}" if self.options else self.op


_QKV, _OUT = ("q", "k", "v"), ("out",)
# Every op once. Attention also as in decoding, and with its other options.
CASES = (
    Case(rope, _rope, ("q", "k"), ("q", "k")),
    Case(rope_qkv, _rope_qkv, _QKV, ("qkv",)),
    Case(rope_into_cache, _rope_into_cache, ("q",), written=("k_cache", "v_cache")),
    Case(rms_norm, _rms_norm, ("y",), ("x", "weight")),
    Case(add_rms_norm, _add_rms_norm, ("y", "residual_out"), ("x", "residual", "weight")),
    Case(qk_norm_rope, _qk_norm_rope, ("q", "k"), ("q", "k", "q_weight", "k_weight")),
    Case(attention, _qkv, _OUT, _QKV),
    Case(attention, _decoding, _OUT, _QKV, options="decoding"),
    Case(attention, _attention_options, _OUT, (*_QKV, "sinks"), options="window, softcap, sinks"),
    Case(attention_varlen, _varlen, _OUT, _QKV),
    Case(rope_attention, _rope_attention, _OUT, _QKV),
)
