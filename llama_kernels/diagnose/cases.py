"""The calls of the parity check: inputs of each op, and the same in eager code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from llama_kernels.diagnose import eager
from llama_kernels.rotary import rope_frequencies, rope_tables

Normal = Callable[..., torch.Tensor]  # sizes -> normally distributed numbers
Inputs = dict[str, Any]  # the arguments of one call, by name
Outputs = tuple[torch.Tensor, ...]


class Sizes(NamedTuple):
    """Sizes of the inputs. `rows` and `columns` are those of RMSNorm."""

    batch: int
    q_heads: int
    kv_heads: int
    tokens: int
    width: int
    rows: int
    columns: int


# On a GPU the sizes of a common model, with a number of tokens that is no multiple of a tile. In the interpreter the
# smallest for which errors are still comparable.
ON_GPU = Sizes(batch=2, q_heads=8, kv_heads=2, tokens=500, width=128, rows=512, columns=4096)
ON_CPU = Sizes(batch=1, q_heads=4, kv_heads=2, tokens=150, width=64, rows=64, columns=512)
INTERPRETED = Sizes(batch=1, q_heads=4, kv_heads=2, tokens=40, width=32, rows=16, columns=256)


class Case(NamedTuple):
    """One call of a public function.

    op: the name of the function.
    inputs: makes the keyword arguments.
    eager: the function in plain PyTorch. It takes the same arguments and returns a tuple of the same results.
    outputs: the names of the results.
    differentiable: the arguments whose gradients are compared.
    written: the arguments that are written in place, which are compared as results are.
    """

    op: str
    inputs: Callable[[Sizes, Normal], Inputs]
    eager: Callable[..., Outputs]
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    options: str = ""

    @property
    def label(self) -> str:
        return f"{self.op}, {self.options}" if self.options else self.op


def cases() -> Iterator[Case]:
    """Every op once; attention also as in decoding, and with its other options."""
    qkv, out = ("q", "k", "v"), ("out",)
    yield Case("rope", _rope, lambda q, k, cos, sin: (eager.rope(q, cos, sin), eager.rope(k, cos, sin)),
               ("q", "k"), ("q", "k"))  # fmt: skip
    yield Case("rope_qkv", _rope_qkv, _eager_rope_qkv, qkv, ("qkv",))
    yield Case("rope_into_cache", _rope_into_cache, _eager_rope_into_cache, ("q",), (), ("k_cache", "v_cache"))
    yield Case("rms_norm", _rms_norm, lambda x, weight: (eager.rms_norm(x, weight),), ("y",), ("x", "weight"))
    yield Case("add_rms_norm", _add_rms_norm, _eager_add_rms_norm, ("y", "residual_out"), ("x", "residual", "weight"))
    yield Case("qk_norm_rope", _qk_norm_rope, _eager_qk_norm_rope, ("q", "k"), ("q", "k", "q_weight", "k_weight"))
    yield Case("attention", _qkv, lambda q, k, v: (eager.attention(q, k, v),), out, qkv)
    yield Case("attention", _decoding, lambda q, k, v: (eager.attention(q, k, v),), out, qkv, options="decoding")
    yield Case("attention", _attention_options, _eager_attention_options, out, (*qkv, "sinks"),
               options="window, softcap, sinks")  # fmt: skip
    yield Case("attention_varlen", _varlen, _eager_varlen, out, qkv)
    yield Case("rope_attention", _rope_attention, _eager_rope_attention, out, qkv)


# --- inputs ----------------------------------------------------------------------------------------------------------


def _heads(s: Sizes, normal: Normal, heads: int, tokens: int | None = None) -> torch.Tensor:
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


# --- eager code ------------------------------------------------------------------------------------------------------


def _eager_rope_qkv(qkv: torch.Tensor, q_heads: int, kv_heads: int, cos: torch.Tensor, sin: torch.Tensor) -> Outputs:
    heads = qkv.unflatten(-1, (q_heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = heads.split((q_heads, kv_heads, kv_heads), 1)
    return eager.rope(q, cos, sin), eager.rope(k, cos, sin), v


def _eager_rope_into_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> Outputs:
    cos, sin = cos[cache_position], sin[cache_position]
    k_cache[:, :, cache_position] = eager.rope(k, cos, sin)
    v_cache[:, :, cache_position] = v
    return (eager.rope(q, cos, sin),)


def _eager_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Outputs:
    total = x + residual
    return eager.rms_norm(total, weight), total


def _eager_qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> Outputs:
    q, k = eager.rms_norm(q, q_weight), eager.rms_norm(k, k_weight)
    return eager.rope(q, cos, sin), eager.rope(k, cos, sin)


def _eager_attention_options(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, softcap: float, window_size: tuple[int, int]
) -> Outputs:
    return (eager.attention(q, k, v, window_size[0], softcap, sinks),)


def _eager_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Outputs:
    lengths = cu_seqlens_q.diff().tolist()
    sequences = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
    return (torch.cat([eager.attention(*each)[0].transpose(0, 1) for each in sequences]),)


def _eager_rope_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Outputs:
    return (eager.attention(eager.rope(q, cos, sin), eager.rope(k, cos, sin), v),)
