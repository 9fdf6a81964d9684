"""Other libraries with kernels."""

from __future__ import annotations

import types

import torch

import llama_kernels as lk
from bench.providers.flash_attention import rotary
from bench.providers.provider import Provider, swap
from bench.works.attention import Attention, AttentionVarlen
from bench.works.norms import EPS, AddRMSNorm, RMSNorm
from bench.works.rotations import Rope
from bench.works.work import Function


class Liger(Provider):
    name = "liger"
    module, package = "liger_kernel", "liger-kernel"

    def rms_norm(self, work: RMSNorm, device: str) -> Function:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS)

    def add_rms_norm(self, work: AddRMSNorm, device: str) -> Function:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS)

    def rope(self, work: Rope, device: str) -> Function:
        from liger_kernel.ops.rope import LigerRopeFunction

        cos, sin = work.wide_tables(device, work.dtype)
        return lambda q, k: LigerRopeFunction.apply(q, k, cos, sin)


class Unsloth(Provider):
    name = "unsloth"
    module, package = "unsloth", "unsloth"

    def rms_norm(self, work: RMSNorm, device: str) -> Function:
        from unsloth.kernels import fast_rms_layernorm

        return lambda x, weight: fast_rms_layernorm(types.SimpleNamespace(weight=weight, variance_epsilon=EPS), x)

    def rope(self, work: Rope, device: str) -> Function:
        from unsloth.kernels import fast_rope_embedding

        cos, sin = (x[0] for x in work.wide_tables(device, work.dtype))
        return lambda q, k: fast_rope_embedding(q, k, cos, sin)


class Quack(Provider):
    name = "quack"
    module, package = "quack", "quack-kernels"

    def rms_norm(self, work: RMSNorm, device: str) -> Function:
        from quack.rmsnorm import rmsnorm

        return lambda x, weight: rmsnorm(x, weight, eps=EPS)

    def add_rms_norm(self, work: AddRMSNorm, device: str) -> Function:
        from quack.rmsnorm import rmsnorm

        return lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)

    def rope(self, work: Rope, device: str) -> Function:
        from quack.rotary import apply_rotary_emb

        return rotary(apply_rotary_emb, work, device)


class Xformers(Provider):
    name = "xformers"
    module, package = "xformers", "xformers"

    def _attend(self, work: Attention | AttentionVarlen, bias: object) -> Function:
        from xformers.ops import memory_efficient_attention

        G = work.Hq // work.Hkv

        def attend(q, k, v):
            q = swap(q).unflatten(2, (work.Hkv, G))  # (B, S, Hkv, G, D)
            k, v = (swap(x).unsqueeze(3).expand(-1, -1, -1, G, -1) for x in (k, v))
            return swap(memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3))

        return attend

    def attention(self, work: Attention, device: str) -> Function:
        from xformers.ops.fmha import attn_bias

        if work.window < 0:
            return self._attend(work, attn_bias.LowerTriangularMask())
        return self._attend(work, attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(work.window + 1))

    def attention_varlen(self, work: AttentionVarlen, device: str) -> Function:
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        return self._attend(work, BlockDiagonalCausalMask.from_seqlens(list(work.lengths), device=device))


class TransformerEngine(Provider):
    name = "transformer-engine"
    module, package = "transformer_engine", "'transformer-engine[pytorch]'"

    def rms_norm(self, work: RMSNorm, device: str) -> Function:
        from transformer_engine.pytorch import RMSNorm as Module

        module = Module(work.N, eps=EPS, device=device, dtype=work.dtype)
        return lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x,))

    def rope(self, work: Rope, device: str) -> Function:
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

        inv_freq, _ = lk.rope_frequencies(work.D, 500000.0)
        angles = torch.arange(work.S, device=device, dtype=torch.float32)[:, None] * inv_freq.to(device)
        freqs = torch.cat((angles, angles), -1)[:, None, None]  # (S, 1, 1, D)

        def rotate(q, k):
            return tuple(swap(apply_rotary_pos_emb(swap(x), freqs, "bshd", fused=True)) for x in (q, k))

        return rotate

    def attention(self, work: Attention, device: str) -> Function:
        from transformer_engine.pytorch import DotProductAttention

        window = {"window_size": (work.window, 0)} if work.window >= 0 else {}
        attend = DotProductAttention(work.Hq, work.D, num_gqa_groups=work.Hkv, attn_mask_type="causal",
                                     qkv_format="bshd", attention_dropout=0.0, **window)  # fmt: skip
        return lambda q, k, v: swap(attend(*map(swap, (q, k, v))).unflatten(-1, (work.Hq, work.D)))
