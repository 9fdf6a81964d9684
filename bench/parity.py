"""Everyone's numbers at small shapes, without a clock: `python -m bench parity`. Kernels run in Triton's interpreter
where there is no GPU. Exits with 1 where ours are wrong: the gate for CI."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from bench.attention import Attention, AttentionVarlen, Decode, RopeAttention
from bench.memory_bound import AddRMSNorm, QKNormRope, RMSNorm, Rope, RopeIntoCache, RopeQKV
from bench.work import Work

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def works(dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Work]:
    """Every op and option of the bench, small enough for an interpreter."""
    small: tuple[Work, ...] = (
        RMSNorm(shape="rows of 4096", M=48, N=4096),
        RMSNorm(shape="head norm 128", M=512, N=128),
        AddRMSNorm(shape="rows of 2048", M=48, N=2048),
        Rope(shape="heads 8/2", B=2, S=48, Hq=8, Hkv=2, D=128),
        QKNormRope(shape="heads 8/2", B=2, S=48, Hq=8, Hkv=2, D=128),
        RopeQKV(shape="heads 8/2", B=2, S=48, Hq=8, Hkv=2, D=128),
        RopeIntoCache(shape="3 sequences", B=3, S=48, Hq=8, Hkv=2, D=128),
        Attention(shape="heads 4/2", B=2, S=160, Hq=4, Hkv=2, D=64),
        RopeAttention(shape="heads 4/2", B=2, S=160, Hq=4, Hkv=2, D=64),
        Attention(shape="head width 128", B=1, S=130, Hq=2, Hkv=1, D=128),
        Attention(shape="window", B=1, S=200, Hq=4, Hkv=2, D=64, window=70),
        AttentionVarlen(shape="packed", lengths=(70, 5, 120, 1), Hq=4, Hkv=2, D=64),
        Decode(shape="cache of 700", B=2, Sk=700, Hq=8, Hkv=2, D=64),
    )
    for dtype in dtypes:
        for work in small:
            yield dataclasses.replace(work, dtype=dtype)
