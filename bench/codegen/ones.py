"""Calls with sizes of 1, for the compile gate: they must compile and fit into shared memory.

Triton takes an integer argument of 1 as a constant and compiles another kernel for it. So every size that can be 1 is 1
in some call: the lengths of documents, the number of tokens, the batch, the heads, the rows, and the width of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from bench.attention_options import attention_options
from bench.codegen.compiling import Case
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention import decode
from llama_kernels.ops.attention.call import AttentionCall

_case = functools.partial(Case, ones=True)


class _Size(NamedTuple):
    name: str
    B: int = 2
    Hq: int = 8
    Hkv: int = 2
    Sq: int = 300
    Sk: int = 300
    tokens: int | None = None  # of all packed documents, each of at most Sq and Sk tokens; None: dense


_SIZES = (
    _Size("documents of one token", Sq=1, Sk=1, tokens=512),
    _Size("one token in all", B=1, Sq=1, Sk=1, tokens=1),
    _Size("one query a document", Sq=1, tokens=512),
    _Size("one key a document", Sk=1, tokens=512),
    _Size("one token of one head", B=1, Hq=1, Hkv=1, Sq=1, Sk=1),
    _Size("one query", Sq=1),
    _Size("one key", Sk=1),
    _Size("one sequence of one head", B=1, Hq=1, Hkv=1),
)


def cases() -> Iterator[Case]:
    for D in (64, 128, 32, 256):
        for size in _SIZES:
            for options in ("causal", "window", "bounds", "all"):
                full = D != 64 or not (size is _SIZES[0] or (options, size) == ("causal", _SIZES[4]))
                launch = functools.partial(_attention, D, torch.bfloat16, size, options)
                yield _case("attention", f"D={D} bfloat16 {options}: {size.name}", launch, full)
        for dtype in (torch.float16, torch.float32):
            launch = functools.partial(_attention, D, dtype, _SIZES[0], "causal")
            yield _case("attention", f"D={D} {str(dtype)[6:]} causal: {_SIZES[0].name}", launch, True)
        yield _case("decode", f"D={D}: one query of one head", functools.partial(_decode, D), True)
        for interleaved in (False, True):
            label = f"D={D}{' interleaved' * interleaved}: one token of one head"
            launch = functools.partial(_rotations, D, interleaved)
            yield _case("rope", label, launch, True)
    for N in (1, 2, 64, 4096, 32768):
        yield _case("rms_norm", f"N={N}: one row", functools.partial(_norms, N), True)


def _attention(D: int, dtype: torch.dtype, size: _Size, options: str) -> None:
    B, Hq, Hkv, Sq, Sk, T = size[1:]
    if T is None:
        q, do = (torch.empty(B, Sq, Hq, D, dtype=dtype).transpose(1, 2) for _ in range(2))
        k, v = (torch.empty(B, Sk, Hkv, D, dtype=dtype).transpose(1, 2) for _ in range(2))
        lse, cu_seqlens, bound = torch.empty(B, Hq, Sq), None, torch.zeros(B, Sq, dtype=torch.int32)
    else:
        q, k, v, do = (torch.empty(T, H, D, dtype=dtype) for H in (Hq, Hkv, Hkv, Hq))
        lse, cu_seqlens = torch.empty(Hq, T), torch.zeros(B + 1, dtype=torch.int32)
        bound = torch.zeros(T, dtype=torch.int32)
    if options not in ("bounds", "all"):
        bound = None
    softcap = 30.0 if options == "all" else None
    left, right = {"causal": (None, 0), "window": (1, 1), "bounds": (None, None), "all": (64, 0)}[options]
    sinks = torch.empty(Hq) if options == "all" else None
    call = attention_options(
        Sq, Sk, 0.1, sinks=sinks, kv_start=bound, kv_end=bound, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        softcap=softcap, left=left, right=right,
    )  # fmt: skip
    KERNELS["attention_forward"](q, k, v, *call)
    dlse = lse if options == "all" else None
    needed = (True, True, True, sinks is not None)
    KERNELS["attention_backward"](do, dlse, q, k, v, do, lse, *call, *needed, None)


def _decode(D: int) -> None:
    q, k = torch.empty(1, 1, 1, D, dtype=torch.bfloat16), torch.empty(1, 1, 2048, D, dtype=torch.bfloat16)
    bound, key_mask = torch.zeros(1, 1, dtype=torch.int32), torch.empty(1, 2048, dtype=torch.bool)
    KERNELS["attention_forward"](q, k, k, *attention_options(1, 2048, 0.1, kv_start=bound, kv_end=bound))
    one_key = k[:, :, :1]
    call = AttentionCall(q, one_key, one_key, *attention_options(1, 1, 0.1, right=None))
    decode.launch_decode(call, key_mask[:, :1])


def _rotations(D: int, interleaved: bool) -> None:
    q = torch.empty(1, 1, 1, D, dtype=torch.bfloat16)
    weights, cache = (torch.empty(D, dtype=q.dtype),) * 2, torch.empty(1, 1, 64, D, dtype=q.dtype)
    angles = (torch.empty(1, D // 2), torch.empty(1, D // 2), torch.zeros(1, 1, dtype=torch.int64))
    KERNELS["rope"](q, q, *angles, interleaved, False)
    KERNELS["rope_into_cache"](q, q, q, cache, cache, angles[-1], *angles, interleaved)
    KERNELS["qk_norm_rope"](q, q, *weights, *angles, 1e-6, 0.0, interleaved)
    KERNELS["qk_norm_rope_backward"](q, q, q, q, *weights, *angles, 1e-6, 0.0, interleaved, True)
    lse, bound = torch.empty(1, 1, 1), torch.zeros(1, 1, dtype=torch.int32)
    rest = (interleaved, 0.1, None, None, 0, True, True, True, False, None)
    KERNELS["rope_attention_backward"](q, None, q, q, q, q, lse, None, bound, bound, *angles, *rest)


def _norms(N: int) -> None:
    x, weight, rstd = torch.empty(1, N, dtype=torch.bfloat16), torch.empty(N, dtype=torch.bfloat16), torch.empty(1, 1)
    for residual in (None, x):
        KERNELS["rms_norm_forward"](x, residual, weight, 1e-6, 0.0)
        KERNELS["rms_norm_backward"](x, residual, x, weight, rstd, 1e-6, 0.0, x.dtype, True, True)
