"""Calls of the public functions, each with fresh tensors, forward and backward. Small: only the arguments matter."""

from __future__ import annotations

from collections.abc import Callable

import torch

import llama_kernels as lk
from llama_kernels.ops.attention.masked_decode import decode_attention

S, D = 32, 64


def heads(H: int, length: int = S, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
    return torch.randn(2, length, H, D).to(dtype).transpose(1, 2).requires_grad_(grad)


def tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(S, D // 2), torch.randn(S, D // 2), torch.randint(S, (2, S))


def train(*outs: torch.Tensor) -> None:
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])


def rms_norm() -> None:
    train(lk.rms_norm(torch.randn(6, 256, requires_grad=True), torch.ones(256, requires_grad=True)))


def rms_norm_wide() -> None:
    """Too wide for one pass of the backward: the weight's gradient has a kernel of its own."""
    train(lk.rms_norm(torch.randn(2, 20000, requires_grad=True), torch.ones(20000, requires_grad=True)))


def add_rms_norm() -> None:
    x, residual = (torch.randn(2, 3, 256).bfloat16().requires_grad_() for _ in range(2))
    train(*lk.add_rms_norm(x, residual, torch.ones(256, requires_grad=True), offset=1.0))


def rope() -> None:
    train(*lk.rope(heads(4), heads(2), *tables()))


def rope_inplace() -> None:
    lk.rope(heads(4, grad=False), heads(2, grad=False), *tables(), inplace=True)


def rope_qkv() -> None:
    qkv = torch.randn(2, S, 8 * D, requires_grad=True)
    train(*lk.rope_qkv(qkv, 4, 2, *tables()[:2], interleaved=True))


def rope_into_cache() -> None:
    cache = (heads(2, 48, grad=False), heads(2, 48, grad=False))
    given = (heads(H, grad=False) for H in (4, 2, 2))
    lk.rope_into_cache(*given, *cache, torch.arange(S), *tables())


def qk_norm_rope() -> None:
    weights = [torch.ones(D, requires_grad=True) for _ in range(2)]
    train(*lk.qk_norm_rope(heads(4), heads(2), *weights, *tables()))


def attention() -> None:
    train(lk.attention(heads(4), heads(2), heads(2)))


def attention_with_everything() -> None:
    bound = torch.zeros(2, S, dtype=torch.int32)
    sinks = torch.zeros(4, requires_grad=True)
    options = {"scale": 0.1, "window_size": (8, 0), "softcap": 30.0, "kv_start": bound, "kv_end": bound + S}
    train(*lk.attention(heads(4), heads(2), heads(2), sinks=sinks, **options, return_lse=True))


def attention_varlen() -> None:
    cu_seqlens = torch.tensor([0, 20, 2 * S], dtype=torch.int32)
    q, k, v = (torch.randn(2 * S, H, D).half().requires_grad_() for H in (4, 2, 2))
    train(lk.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 44, 44))


def rope_attention() -> None:
    train(lk.rope_attention(heads(4), heads(2), heads(2), *tables()))


def decode() -> None:
    lk.attention(heads(4, 1, grad=False), heads(2, 600, grad=False), heads(2, 600, grad=False))


def masked_decode() -> None:
    mask, sinks = torch.ones(2, 600, dtype=torch.bool), torch.zeros(4)
    given = (heads(4, 1, grad=False), heads(2, 600, grad=False), heads(2, 600, grad=False))
    decode_attention(*given, mask, sinks=sinks, softcap=5.0)


def hopper_rope_attention() -> None:
    with lk.hopper_attention():
        train(lk.rope_attention(heads(4), heads(2), heads(2), *tables(), deterministic=False))


def hopper_attention_varlen() -> None:
    """Forward: packed tokens have descriptors of their own."""
    cu_seqlens = torch.tensor([0, 20, 2 * S], dtype=torch.int32)
    q, k, v = (torch.randn(2 * S, H, D).half() for H in (4, 2, 2))
    with lk.hopper_attention():
        lk.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 44, 44)


PORTABLE: tuple[Callable[[], None], ...] = (
    rms_norm, rms_norm_wide, add_rms_norm, rope, rope_inplace, rope_qkv, rope_into_cache, qk_norm_rope, attention,
    attention_with_everything, attention_varlen, rope_attention, decode, masked_decode,
)  # fmt: skip
