"""llama_kernels, with its fused ops and with separate ops."""

from __future__ import annotations

import torch

import llama_kernels as lk
from bench.providers.eager import then_copied
from bench.providers.provider import OURS, Provider, packed, unpacked
from bench.works.attention import Attention, AttentionVarlen, BoundedAttention, Decode, RopeAttention
from bench.works.norms import EPS
from bench.works.rotations import MRope, QKNormRope, Rope, RopeIntoCache, RopeQKV
from bench.works.shared_prompts import SharedPrompt
from bench.works.tangents import Tangents, tangents_by
from bench.works.work import Function, Work


class Ours(Provider):
    name = OURS
    cpu = True

    def any_op(self, work: Work, device: str) -> Function:
        """The public function, for ops that need no other arguments than those of the work; and its forward mode."""
        if isinstance(work, Tangents):
            return tangents_by(self.function(work.of, device))
        return getattr(lk, work.op)

    def rope(self, work: Rope, device: str) -> Function:
        cos, sin = work.tables(device)
        return lambda q, k: lk.rope(q, k, cos, sin)

    def mrope(self, work: MRope, device: str) -> Function:
        (cos, sin), positions, axes = work.tables(device), work.position_ids(device), work.axes(device)
        return lambda q, k: lk.rope(q, k, cos, sin, positions, axes=axes)

    def qk_norm_rope(self, work: QKNormRope, device: str) -> Function:
        cos, sin = work.tables(device)
        return lambda *heads_and_weights: lk.qk_norm_rope(*heads_and_weights, cos, sin, eps=EPS)

    def rope_qkv(self, work: RopeQKV, device: str) -> Function:
        cos, sin = work.tables(device)
        return lambda qkv: lk.rope_qkv(qkv, work.Hq, work.Hkv, cos, sin)

    def rope_into_cache(self, work: RopeIntoCache, device: str) -> Function:
        cos, sin = work.tables(device)
        slot, caches = torch.tensor([work.position], device=device), work.caches(device)
        cached = [x[:, :, work.position, None] for x in caches]

        def f(q, k, v):
            with torch.no_grad():
                return lk.rope_into_cache(q, k, v, *caches, slot, cos, sin), *cached

        return f

    def attention(self, work: Attention, device: str) -> Function:
        return lambda q, k, v: lk.attention(q, k, v, window_size=(work.window, -1))

    def bounded_attention(self, work: BoundedAttention, device: str) -> Function:
        kv_start, kv_end = work.bounds(device)
        return lambda q, k, v: lk.attention(q, k, v, kv_start=kv_start, kv_end=kv_end)

    def rope_attention(self, work: RopeAttention, device: str) -> Function:
        cos, sin = work.tables(device)
        return lambda q, k, v: lk.rope_attention(q, k, v, cos, sin, window_size=(work.window, -1))

    def attention_varlen(self, work: AttentionVarlen, device: str) -> Function:
        cu, longest = work.cu_seqlens(device), max(work.lengths)
        return lambda q, k, v: unpacked(lk.attention_varlen(*map(packed, (q, k, v)), cu, cu, longest, longest))

    def shared_prompt(self, work: SharedPrompt, device: str) -> Function:
        kv_start, kv_prefix = work.bounds(0, work.S, device)
        return lambda q, k, v: lk.attention(q, k, v, kv_start=kv_start, kv_prefix=kv_prefix)

    def decode(self, work: Decode, device: str) -> Function:
        return lk.attention


class Apart(Provider):
    """Separate calls of our ops in place of a fused op, to show what fusing saves."""

    name = f"{OURS}, apart"
    cpu = True

    def mrope(self, work: MRope, device: str) -> Function:
        """With a merged table, as in patched models."""
        cos, sin = work.merged_tables(device, work.dtype)
        return lambda q, k: lk.rope(q, k, cos, sin)

    def qk_norm_rope(self, work: QKNormRope, device: str) -> Function:
        cos, sin = work.tables(device)

        def f(q, k, q_weight, k_weight):
            return lk.rope(lk.rms_norm(q, q_weight, EPS), lk.rms_norm(k, k_weight, EPS), cos, sin)

        return f

    def rope_qkv(self, work: RopeQKV, device: str) -> Function:
        cos, sin = work.tables(device)

        def f(qkv):
            q, k, v = work.split(qkv)
            return *lk.rope(q, k, cos, sin), v

        return f

    def rope_into_cache(self, work: RopeIntoCache, device: str) -> Function:
        cos, sin = work.tables(device)
        return then_copied(work, device, lambda q, k, slot: lk.rope(q, k, cos, sin, slot))

    def rope_attention(self, work: RopeAttention, device: str) -> Function:
        cos, sin = work.tables(device)
        return lambda q, k, v: lk.attention(*lk.rope(q, k, cos, sin), v, window_size=(work.window, -1))
