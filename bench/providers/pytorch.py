"""PyTorch's own fused ops."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.providers.provider import Provider, Unsupported, packed, unpacked
from bench.works.attention import Attention, AttentionVarlen, Decode, RopeAttention
from bench.works.norms import EPS, AddRMSNorm, RMSNorm
from bench.works.rotations import plain_rope
from bench.works.shared_prompts import SharedPrompt
from bench.works.work import Function


class TorchNorm(Provider):
    name = "F.rms_norm"
    cpu = True

    def rms_norm(self, work: RMSNorm, device: str) -> Function:
        return lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)

    def add_rms_norm(self, work: AddRMSNorm, device: str) -> Function:
        def f(x, residual, weight):
            total = x + residual
            return F.rms_norm(total, weight.shape, weight, EPS), total

        return f


class Sdpa(Provider):
    """torch.nn.functional.scaled_dot_product_attention with one backend, or with the one that PyTorch chooses."""

    def __init__(self, name: str, backend: SDPBackend | None) -> None:
        self.name, self.backend = name, backend
        self.cpu = backend is None

    def _attend(self, is_causal: bool) -> Function:
        def attend(q, k, v):
            if self.backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
            with sdpa_kernel(self.backend):
                if self.backend is SDPBackend.EFFICIENT_ATTENTION:  # no GQA: k and v must be repeated
                    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
                    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
                return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

        return attend

    def attention(self, work: Attention, device: str) -> Function:
        if work.window >= 0:
            raise Unsupported("has no window but a mask written out")
        return self._attend(True)

    def rope_attention(self, work: RopeAttention, device: str) -> Function:
        attend, tables = self.attention(work, device), work.wide_tables(device, work.dtype)
        return lambda q, k, v: attend(*plain_rope(q, k, *tables), v)

    def decode(self, work: Decode, device: str) -> Function:
        return self._attend(False)


class Flex(Provider):
    """torch.compile of flex_attention. The block masks are made once, before any call."""

    name = "flex_attention"

    def _attend(self, visible: Function, Sq: int, Sk: int, device: str) -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(visible, None, None, Sq, Sk, device=device)
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)

    def attention(self, work: Attention, device: str) -> Function:
        window = work.S if work.window < 0 else work.window
        return self._attend(lambda b, h, i, j: (j <= i) & (i - j <= window), work.S, work.S, device)

    def attention_varlen(self, work: AttentionVarlen, device: str) -> Function:
        lengths = torch.tensor(work.lengths, device=device)
        document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        T = sum(work.lengths)
        return self._attend(lambda b, h, i, j: (j <= i) & (document[i] == document[j]), T, T, device)

    def shared_prompt(self, work: SharedPrompt, device: str) -> Function:
        start, prefix = (bound[0] for bound in work.bounds(0, work.S, device))
        return self._attend(lambda b, h, i, j: ((j <= i) & (j >= start[i])) | (j < prefix[i]), work.S, work.S, device)

    def decode(self, work: Decode, device: str) -> Function:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, enable_gqa=True)


class TorchVarlen(Provider):
    name = "varlen_attn"
    module, package = "torch.nn.attention.varlen", "'torch>=2.10'"

    def attention_varlen(self, work: AttentionVarlen, device: str) -> Function:
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = work.cu_seqlens(device), max(work.lengths)
        known = inspect.signature(varlen_attn).parameters  # releases differ in their names
        options = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        gqa = "enable_gqa" in known
        options |= {"enable_gqa": True} if gqa else {}

        def attend(q, k, v):
            q, k, v = map(packed, (q, k, v))
            if not gqa:
                k, v = (x.repeat_interleave(work.Hq // work.Hkv, 1) for x in (k, v))
            return unpacked(varlen_attn(q, k, v, cu, cu, longest, longest, **options))

        return attend
