"""FlashAttention 2, 3 and 4."""

from __future__ import annotations

import importlib

from bench.providers.provider import Provider, packed, swap, unpacked
from bench.works.attention import Attention, AttentionVarlen, Decode
from bench.works.norms import EPS, AddRMSNorm, RMSNorm
from bench.works.rotations import Rope
from bench.works.work import Function


class FlashAttention(Provider):
    """What all versions share. `home` is the module that has their functions."""

    home: str

    def attention(self, work: Attention, device: str) -> Function:
        return _flash(importlib.import_module(self.home).flash_attn_func, work)

    def attention_varlen(self, work: AttentionVarlen, device: str) -> Function:
        return _flash_varlen(importlib.import_module(self.home).flash_attn_varlen_func, work, device)


class FlashAttention2(FlashAttention):
    name, home = "flash-attn-2", "flash_attn"
    module, package = "flash_attn.flash_attn_interface", "flash-attn"

    def decode(self, work: Decode, device: str) -> Function:
        from flash_attn import flash_attn_with_kvcache

        return lambda q, k, v: swap(flash_attn_with_kvcache(*map(swap, (q, k, v))))

    def rope(self, work: Rope, device: str) -> Function:
        from flash_attn.layers.rotary import apply_rotary_emb

        return rotary(apply_rotary_emb, work, device)

    def rms_norm(self, work: RMSNorm, device: str) -> Function:
        from flash_attn.ops.triton.layer_norm import rms_norm_fn

        return lambda x, weight: rms_norm_fn(x, weight, None, eps=EPS)

    def add_rms_norm(self, work: AddRMSNorm, device: str) -> Function:
        from flash_attn.ops.triton.layer_norm import rms_norm_fn

        return lambda x, residual, weight: rms_norm_fn(x, weight, None, residual=residual, eps=EPS, prenorm=True)


class FlashAttention3(FlashAttention):
    name, home = "flash-attn-3", "flash_attn_interface"
    module, package = "flash_attn_interface", "flash-attn-3"


class FlashAttention4(FlashAttention):
    name, home = "flash-attn-4", "flash_attn.cute"
    module, package = "flash_attn.cute", "--pre flash-attn-4"


def rotary(apply_rotary_emb: Function, work: Rope, device: str) -> Function:
    """RoPE of FlashAttention and quack, which rotates q and k in two calls."""
    cos, sin = work.tables(device)
    return lambda q, k: tuple(swap(apply_rotary_emb(swap(x), cos, sin)) for x in (q, k))


def _flash(flash_attn_func: Function, work: Attention) -> Function:
    """Some releases of FlashAttention return lse as well."""
    options = {"window_size": (work.window, 0)} if work.window >= 0 else {}

    def attend(q, k, v):
        out = flash_attn_func(*map(swap, (q, k, v)), causal=True, **options)
        return swap(out[0] if isinstance(out, tuple) else out)

    return attend


def _flash_varlen(flash_attn_varlen_func: Function, work: AttentionVarlen, device: str) -> Function:
    cu, longest = work.cu_seqlens(device), max(work.lengths)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest, "causal": True}

    def attend(q, k, v):
        out = flash_attn_varlen_func(*map(packed, (q, k, v)), **options)
        return unpacked(out[0] if isinstance(out, tuple) else out)

    return attend
