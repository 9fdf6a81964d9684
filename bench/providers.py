"""Who is measured. A provider is one small class: a method for each op it has, named after the op.

A method gets the work and the device, does what a user does once (import, tables, masks), and returns a function of the
op's arguments. What it cannot do it says by raising `Unsupported`; a package that is missing is found out here. Either
way the provider stays in the table, with the reason. PROVIDERS, at the end, is the list.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import types

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llama_kernels as lk
from bench.attention import PLAIN_LIMIT, Attention, AttentionVarlen, Decode, RopeAttention, plain_attention
from bench.memory_bound import (
    EPS,
    AddRMSNorm,
    QKNormRope,
    RMSNorm,
    Rope,
    RopeIntoCache,
    RopeQKV,
    plain_norm,
    plain_rope,
)
from bench.work import Function, Work

OURS = "llama_kernels"


class Unsupported(Exception):
    """Why a provider does not do a piece of work."""


class Provider:
    """`module`: what must be there to import; `package`: what to install for it. `cpu`: runs on CPU tensors too."""

    name: str
    module: str | None = None
    package: str | None = None
    cpu = False

    def function(self, work: Work, device: str) -> Function:
        """The op as this provider has it, ready to be called. Raises Unsupported."""
        if reason := self.why_not(work.op, device):
            raise Unsupported(reason)
        return getattr(self, work.op)(work, device)

    def has(self, op: str) -> bool:
        return hasattr(self, op)

    def why_not(self, op: str, device: str) -> str | None:
        """Why it cannot do `op` at any shape here, or None."""
        if not self.has(op):
            return f"has no {op}"
        if self.module is not None and not _importable(self.module):
            return f"not installed (pip install {self.package})"
        return "needs a GPU" if device == "cpu" and not self.cpu else None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is missing or broken
        return False


def _swap(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) <-> (B, S, H, D), a view."""
    return x.transpose(1, 2)


def _packed(x: torch.Tensor) -> torch.Tensor:
    """(1, H, T, D) -> (T, H, D), a view; and so is its gradient, where indexing would write one full of zeros."""
    return x.squeeze(0).transpose(0, 1)


def _unpacked(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) -> (1, H, T, D), a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _then_copied(work: RopeIntoCache, device: str, rotate: Function) -> Function:
    """q and k by `rotate`, which gets the cache position too, then k and v copied there."""
    slot, caches = torch.tensor([work.position], device=device), work.caches(device)
    cached = [x[:, :, work.position, None] for x in caches]

    def f(q, k, v):
        with torch.no_grad():
            q, k = rotate(q, k, slot)
            for cache, x in zip(caches, (k, v), strict=True):
                cache.index_copy_(2, slot, x)
        return q, *cached

    return f


class Ours(Provider):
    name = OURS
    cpu = True

    def rms_norm(self, work: RMSNorm, device: str) -> Function:
        return lambda x, weight: lk.rms_norm(x, weight, EPS)

    def add_rms_norm(self, work: AddRMSNorm, device: str) -> Function:
        return lambda x, residual, weight: lk.add_rms_norm(x, residual, weight, EPS)

    def rope(self, work: Rope, device: str) -> Function:
        cos, sin = work.tables(device)
        return lambda q, k: lk.rope(q, k, cos, sin)

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

    def rope_attention(self, work: RopeAttention, device: str) -> Function:
        cos, sin = work.tables(device)
        return lambda q, k, v: lk.rope_attention(q, k, v, cos, sin, window_size=(work.window, -1))

    def attention_varlen(self, work: AttentionVarlen, device: str) -> Function:
        cu, longest = work.cu_seqlens(device), max(work.lengths)
        return lambda q, k, v: _unpacked(lk.attention_varlen(*map(_packed, (q, k, v)), cu, cu, longest, longest))

    def decode(self, work: Decode, device: str) -> Function:
        return lk.attention


class Apart(Provider):
    """Our own ops one by one: what fusing them saves."""

    name = f"{OURS}, apart"
    cpu = True

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
        return _then_copied(work, device, lambda q, k, slot: lk.rope(q, k, cos, sin, slot))

    def rope_attention(self, work: RopeAttention, device: str) -> Function:
        cos, sin = work.tables(device)
        return lambda q, k, v: lk.attention(*lk.rope(q, k, cos, sin), v, window_size=(work.window, -1))


class Eager(Provider):
    """What a model's code writes, op by op."""

    name = "eager"
    cpu = True

    def rms_norm(self, work: RMSNorm, device: str) -> Function:
        return plain_norm

    def add_rms_norm(self, work: AddRMSNorm, device: str) -> Function:
        return work.plain

    def rope(self, work: Rope, device: str) -> Function:
        cos, sin = work.wide_tables(device, work.dtype)
        return lambda q, k: plain_rope(q, k, cos, sin)

    def qk_norm_rope(self, work: QKNormRope, device: str) -> Function:
        rotate = self.rope(work, device)
        return lambda q, k, q_weight, k_weight: rotate(plain_norm(q, q_weight), plain_norm(k, k_weight))

    def rope_qkv(self, work: RopeQKV, device: str) -> Function:
        rotate = self.rope(work, device)

        def f(qkv):
            q, k, v = work.split(qkv)
            return *rotate(q, k), v

        return f

    def rope_into_cache(self, work: RopeIntoCache, device: str) -> Function:
        cos, sin = (x[:, work.position, None] for x in work.wide_tables(device, work.dtype))
        return _then_copied(work, device, lambda q, k, slot: plain_rope(q, k, cos, sin))

    def attention(self, work: Attention, device: str) -> Function:
        scores = work.B * work.Hq * work.S**2
        if scores > PLAIN_LIMIT:
            raise Unsupported(f"would write {scores * work.dtype.itemsize / 2**30:.0f} GiB of scores")
        return work.plain

    rope_attention = attention

    def attention_varlen(self, work: AttentionVarlen, device: str) -> Function:
        if work.Hq * max(work.lengths) ** 2 > PLAIN_LIMIT:
            raise Unsupported("would write the scores of whole documents")
        return lambda *qkv: torch.cat(
            [plain_attention(*parts) for parts in zip(*(x.split(work.lengths, 2) for x in qkv), strict=True)], 2
        )

    def decode(self, work: Decode, device: str) -> Function:
        return work.plain


class Compiled(Provider):
    """torch.compile of what `eager` runs."""

    name = "torch.compile"

    def _compiled(self, work: Work, device: str) -> Function:
        return torch.compile(Eager().function(work, device), fullgraph=True, dynamic=False)

    rms_norm = add_rms_norm = rope = qk_norm_rope = rope_qkv = rope_into_cache = _compiled


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
    """torch.nn.functional.scaled_dot_product_attention, with a backend or with the one it chooses by itself."""

    def __init__(self, name: str, backend: SDPBackend | None) -> None:
        self.name, self.backend = name, backend
        self.cpu = backend is None

    def _attend(self, is_causal: bool) -> Function:
        def attend(q, k, v):
            if self.backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
            with sdpa_kernel(self.backend):
                if self.backend is SDPBackend.EFFICIENT_ATTENTION:  # has no GQA: k and v are repeated in memory
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
    """torch.compile of flex_attention, with block masks made beforehand."""

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
        known = inspect.signature(varlen_attn).parameters  # causality and GQA were named otherwise in each release
        options = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        gqa = "enable_gqa" in known
        options |= {"enable_gqa": True} if gqa else {}

        def attend(q, k, v):
            q, k, v = map(_packed, (q, k, v))
            if not gqa:
                k, v = (x.repeat_interleave(work.Hq // work.Hkv, 1) for x in (k, v))
            return _unpacked(varlen_attn(q, k, v, cu, cu, longest, longest, **options))

        return attend


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

        return _rotary(apply_rotary_emb, work, device)


class FlashAttention(Provider):
    """What its generations share; `home` is where their functions are."""

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

        return lambda q, k, v: _swap(flash_attn_with_kvcache(*map(_swap, (q, k, v))))

    def rope(self, work: Rope, device: str) -> Function:
        from flash_attn.layers.rotary import apply_rotary_emb

        return _rotary(apply_rotary_emb, work, device)

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


def _rotary(apply_rotary_emb: Function, work: Rope, device: str) -> Function:
    """Of FlashAttention and quack: q and k one after the other."""
    cos, sin = work.tables(device)
    return lambda q, k: tuple(_swap(apply_rotary_emb(_swap(x), cos, sin)) for x in (q, k))


def _flash(flash_attn_func: Function, work: Attention) -> Function:
    """The releases of FlashAttention differ in whether lse comes back too."""
    options = {"window_size": (work.window, 0)} if work.window >= 0 else {}

    def attend(q, k, v):
        out = flash_attn_func(*map(_swap, (q, k, v)), causal=True, **options)
        return _swap(out[0] if isinstance(out, tuple) else out)

    return attend


def _flash_varlen(flash_attn_varlen_func: Function, work: AttentionVarlen, device: str) -> Function:
    cu, longest = work.cu_seqlens(device), max(work.lengths)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest, "causal": True}

    def attend(q, k, v):
        out = flash_attn_varlen_func(*map(_packed, (q, k, v)), **options)
        return _unpacked(out[0] if isinstance(out, tuple) else out)

    return attend


class Xformers(Provider):
    name = "xformers"
    module, package = "xformers", "xformers"

    def _attend(self, work: Attention | AttentionVarlen, bias: object) -> Function:
        from xformers.ops import memory_efficient_attention

        G = work.Hq // work.Hkv

        def attend(q, k, v):
            q = _swap(q).unflatten(2, (work.Hkv, G))  # (B, S, Hkv, G, D)
            k, v = (_swap(x).unsqueeze(3).expand(-1, -1, -1, G, -1) for x in (k, v))
            return _swap(memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3))

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
            return tuple(_swap(apply_rotary_pos_emb(_swap(x), freqs, "bshd", fused=True)) for x in (q, k))

        return rotate

    def attention(self, work: Attention, device: str) -> Function:
        from transformer_engine.pytorch import DotProductAttention

        window = {"window_size": (work.window, 0)} if work.window >= 0 else {}
        attend = DotProductAttention(work.Hq, work.D, num_gqa_groups=work.Hkv, attn_mask_type="causal",
                                     qkv_format="bshd", attention_dropout=0.0, **window)  # fmt: skip
        return lambda q, k, v: _swap(attend(*map(_swap, (q, k, v))).unflatten(-1, (work.Hq, work.D)))


PROVIDERS: tuple[Provider, ...] = (
    Ours(),
    Apart(),
    Eager(),
    Compiled(),
    TorchNorm(),
    Sdpa("sdpa", None),
    Sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    Sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    Sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
    Flex(),
    TorchVarlen(),
    Liger(),
    Quack(),
    FlashAttention2(),
    FlashAttention3(),
    FlashAttention4(),
    Xformers(),
    TransformerEngine(),
    Unsloth(),
)
