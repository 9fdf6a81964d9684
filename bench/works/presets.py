"""The work that a run measures: the shapes of published models, sweeps over sizes, and small shapes for parity."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

from bench.works.attention import AnyAttention, Attention, AttentionVarlen, BoundedAttention, Decode, RopeAttention
from bench.works.models import MODELS, models_by
from bench.works.norms import NORMS, AddRMSNorm, RMSNorm
from bench.works.rotations import MRope, QKNormRope, Rope, RopeIntoCache, RopeQKV
from bench.works.shared_prompts import SharedPrompt
from bench.works.tangents import TANGENTS, AddRMSNormTangents, QKNormRopeTangents, RMSNormTangents, RopeTangents
from bench.works.work import Work

KINDS: tuple[type[Work], ...] = (
    *(*NORMS, Rope, MRope, QKNormRope, RopeQKV, RopeIntoCache, *TANGENTS),
    *(Attention, BoundedAttention, RopeAttention, AttentionVarlen, SharedPrompt, Decode),
)
OPS = tuple(kind.op for kind in KINDS)
MEMORY_BOUND = tuple(kind.op for kind in KINDS if not issubclass(kind, AnyAttention))
PRESETS = ("models", "sweeps", "attention", "memory_bound", "training", "smoke", "all")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def works_of(preset: str) -> Iterator[Work]:
    """The works of one of PRESETS. "training" has none: its models are in bench.training.scale."""
    packed = tuple(_packed(16384))
    if preset in ("models", "all"):
        yield from (*_memory_bound_models(), *_other_rotations_and_tangents(), *_attention_models(), *packed)
    if preset in ("sweeps", "memory_bound", "all"):
        yield from _memory_bound_sweeps()
    if preset in ("sweeps", "attention", "all"):
        yield from _attention_sweeps()
    if preset == "smoke":
        some = itertools.chain(_memory_bound_models(), _attention_models())
        yield from (*(work for work in some if work.shape.startswith(("Llama 3.2 1B", "Llama 3.1 8B"))), *packed)


# --- memory-bound ops ------------------------------------------------------------------------------------------------


def _memory_bound_models(tokens: int = 16384) -> Iterator[Work]:
    """Each op at the widths of published models."""
    for name, m in models_by("hidden"):
        for kind in NORMS:
            yield kind(shape=name, M=tokens, N=m.hidden)
    for name, m in MODELS.items():
        if m.qk_norm:
            yield RMSNorm(shape=f"{name}, heads of q and k", M=tokens * (m.heads + m.kv_heads), N=m.head_dim)
            yield QKNormRope(shape=name, B=4, S=tokens // 4, Hq=m.heads, Hkv=m.kv_heads, D=m.head_dim)
    for name, m in models_by("heads", "kv_heads", "head_dim"):
        heads = {"Hq": m.heads, "Hkv": m.kv_heads, "D": m.head_dim}
        yield Rope(shape=name, B=4, S=tokens // 4, **heads)
        yield RopeQKV(shape=name, B=4, S=tokens // 4, **heads)
        yield RopeIntoCache(shape=name, B=16, S=4096, **heads)


def _other_rotations_and_tangents(tokens: int = 16384) -> Iterator[Work]:
    """Three positions a token, and forward mode, at the sizes of one model each."""
    heads = {"B": 4, "S": tokens // 4, "D": 128}
    yield MRope(shape="Qwen2-VL 7B", Hq=28, Hkv=4, **heads)
    yield RMSNormTangents(shape="rows of 4096", M=tokens, N=4096)
    yield AddRMSNormTangents(shape="rows of 4096", M=tokens, N=4096)
    yield RopeTangents(shape="heads 32/8", Hq=32, Hkv=8, **heads)
    yield QKNormRopeTangents(shape="heads 32/8", Hq=32, Hkv=8, **heads)


def _memory_bound_sweeps() -> Iterator[Work]:
    """RMSNorm over row lengths (tensors of at most 512 MB) and over few rows; RoPE over sequence lengths."""
    for N in (64, 128):
        yield RMSNorm(shape=f"head norm {N}", M=2**20, N=N)
    for log in range(10, 19):
        N = 2**log
        rows = min(2**15, 2**28 // N)
        yield RMSNorm(shape=f"rows of {N}", M=rows, N=N)
        if N <= 2**14:
            yield AddRMSNorm(shape=f"rows of {N}", M=rows, N=N)
    for M in (1, 16, 128):
        yield RMSNorm(shape=f"{M} rows", M=M, N=4096)
    for S in (512, 2048, 8192, 32768):
        for kind in (Rope, QKNormRope, RopeQKV):
            yield kind(shape=f"32k tokens, S={S}", B=32768 // S, S=S, Hq=32, Hkv=8, D=128)
    for B in (1, 16, 128):
        yield RopeIntoCache(shape=f"{B} sequences", B=B, S=4096, Hq=32, Hkv=8, D=128)


# --- attention -------------------------------------------------------------------------------------------------------


def _packed(tokens: int) -> Iterator[Work]:
    """Packed documents of unequal lengths, as many of equal length beside them, completions of one prompt, bounds."""
    lengths = documents(tokens)
    equal = (tokens // len(lengths),) * len(lengths)
    for shape, each in (("packed documents", lengths), ("equal documents", equal)):
        yield AttentionVarlen(shape=shape, lengths=each, Hq=32, Hkv=8, D=128)
    yield SharedPrompt(
        shape="8 completions", prompt=tokens // 8, completions=8, length=tokens // 64, Hq=32, Hkv=8, D=128
    )
    yield BoundedAttention(shape="S=8192, bounds", B=tokens // 8192, S=8192, Hq=32, Hkv=8, D=128)


def documents(tokens: int, shortest: int = 128) -> tuple[int, ...]:
    """16 fixed lengths, short and long as in pretraining data, that add up to `tokens`."""
    shares = [1, 8, 2, 32, 4, 1, 16, 2, 4, 8, 1, 16, 2, 4, 8, 19]
    lengths = [max(share * tokens // 128, shortest) for share in shares[:-1]]
    return (*lengths, tokens - sum(lengths))


def _attention_models(tokens: int = 16384) -> Iterator[Work]:
    """Training on sequences of 4k tokens and one step of decoding, at the heads of published models."""
    for name, m in models_by("heads", "kv_heads", "head_dim", "window"):
        heads = {"Hq": m.heads, "Hkv": m.kv_heads, "D": m.head_dim}
        S = min(4096, tokens)
        yield Attention(shape=name, B=tokens // S, S=S, **heads)
        yield RopeAttention(shape=name, B=tokens // S, S=S, **heads)
        if m.window > 0:
            yield Attention(shape=f"{name}, window", B=tokens // S, S=S, window=m.window - 1, **heads)
        yield Decode(shape=name, B=16, Sk=4096, **heads)


def _attention_sweeps(tokens: int = 32768) -> Iterator[Work]:
    """Sequence lengths at a fixed number of tokens, head sizes and ratios, packed documents, and lengths of caches."""
    for heads in ((32, 8, 128), (32, 8, 64), (16, 8, 256)):
        Hq, Hkv, D = heads
        for S in (512, 1024, 2048, 4096, 8192, 16384, 32768):
            yield Attention(shape=f"32k tokens, S={S}", B=tokens // S, S=S, Hq=Hq, Hkv=Hkv, D=D)
            if S in (512, 2048, 8192, 32768):
                yield RopeAttention(shape=f"32k tokens, S={S}", B=tokens // S, S=S, Hq=Hq, Hkv=Hkv, D=D)
    for Hq, Hkv in ((16, 16), (64, 8)):
        yield Attention(shape=f"heads {Hq}/{Hkv}", B=tokens // 8192, S=8192, Hq=Hq, Hkv=Hkv, D=128)
    yield Attention(shape="window 1024", B=tokens // 8192, S=8192, window=1023, Hq=32, Hkv=8, D=128)
    yield from _packed(tokens)
    for B, Sk in ((1, 1024), (1, 4096), (1, 32768), (1, 131072), (16, 1024), (16, 4096), (16, 32768), (64, 4096)):
        yield Decode(shape=f"batch {B}, cache {Sk}", B=B, Sk=Sk, Hq=32, Hkv=8, D=128)


# --- parity ----------------------------------------------------------------------------------------------------------


def small(dtypes: Sequence[torch.dtype] = tuple(DTYPES.values())) -> Iterator[Work]:
    """Every op and option of the bench, at shapes small enough for Triton's interpreter."""
    works: tuple[Work, ...] = (
        *(kind(shape="rows of 4096", M=48, N=4096) for kind in NORMS),
        RMSNorm(shape="head norm 128", M=512, N=128),
        Rope(shape="heads 8/2", B=2, S=48, Hq=8, Hkv=2, D=128),
        MRope(shape="three positions", B=2, S=48, Hq=8, Hkv=2, D=128),
        QKNormRope(shape="heads 8/2", B=2, S=48, Hq=8, Hkv=2, D=128),
        RMSNormTangents(shape="rows of 1000", M=48, N=1000),
        AddRMSNormTangents(shape="rows of 1000", M=48, N=1000),
        RopeTangents(shape="heads 8/2", B=2, S=24, Hq=8, Hkv=2, D=64),
        QKNormRopeTangents(shape="heads 8/2", B=2, S=24, Hq=8, Hkv=2, D=64),
        RopeQKV(shape="heads 8/2", B=2, S=48, Hq=8, Hkv=2, D=128),
        RopeIntoCache(shape="3 sequences", B=3, S=48, Hq=8, Hkv=2, D=128),
        Attention(shape="heads 4/2", B=2, S=160, Hq=4, Hkv=2, D=64),
        RopeAttention(shape="heads 4/2", B=2, S=160, Hq=4, Hkv=2, D=64),
        Attention(shape="head width 128", B=1, S=130, Hq=2, Hkv=1, D=128),
        Attention(shape="window", B=1, S=200, Hq=4, Hkv=2, D=64, window=70),
        BoundedAttention(shape="heads 4/2", B=2, S=160, Hq=4, Hkv=2, D=64),
        AttentionVarlen(shape="packed", lengths=(70, 5, 120, 1), Hq=4, Hkv=2, D=64),
        SharedPrompt(shape="3 completions", prompt=100, completions=3, length=40, Hq=4, Hkv=2, D=64),
        Decode(shape="cache of 700", B=2, Sk=700, Hq=8, Hkv=2, D=64),
    )
    for dtype in dtypes:
        for work in works:
            yield dataclasses.replace(work, dtype=dtype)
