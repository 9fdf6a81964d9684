"""Calls of the public functions, each with fresh tensors, forward and backward. Small: only the arguments matter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import llama_kernels as lk
from llama_kernels.ops.attention.masked_decode import decode_attention
from tests.support.ops import OPS, REGISTERED, Make, Shape, calls, registered_calls

S, D = 32, 64
SHAPE, MAKE = Shape(S=S, D=D, N=256), Make(dtype=torch.bfloat16)


def heads(H: int, length: int = S, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
    return torch.randn(2, length, H, D).to(dtype).transpose(1, 2).requires_grad_(grad)


def train(results: Any) -> None:
    outs = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])


def of_table(label: str, options: bool, shape: Shape = SHAPE) -> None:
    call = dict(calls(shape, MAKE, options))[label]
    train(call(lk, *(x.detach().requires_grad_() for x in call.tensors)))


def in_place() -> None:
    lk.rope(**OPS["rope"].arguments(SHAPE, MAKE), inplace=True)


def into_cache() -> None:
    lk.rope_into_cache(**OPS["rope_into_cache"].arguments(SHAPE, MAKE))


def attention_with_everything() -> None:
    bound = torch.zeros(2, S, dtype=torch.int32)
    sinks = torch.zeros(4, requires_grad=True)
    options = {"scale": 0.1, "window_size": (8, 0), "softcap": 30.0, "kv_start": bound, "kv_end": bound + S,
               "kv_prefix": bound}  # fmt: skip
    train(lk.attention(heads(4), heads(2), heads(2), sinks=sinks, **options, return_lse=True))


def attention_of_fixed_queries() -> None:
    """delta has a launch of its own, since there is no dq."""
    train(lk.attention(heads(4, grad=False), heads(2), heads(2)))


def packed_attention_of_fixed_queries() -> None:
    arguments = OPS["attention_varlen"].arguments(SHAPE, MAKE)
    k, v = (arguments[name].detach().requires_grad_() for name in ("k", "v"))
    train(lk.attention_varlen(**{**arguments, "q": arguments["q"].detach(), "k": k, "v": v}))


def tangent(label: str) -> None:
    op, arguments = registered_calls(SHAPE, MAKE)[label]
    getattr(torch.ops.llama_kernels, op)(*arguments)


def decode() -> None:
    lk.attention(heads(4, 1, grad=False), heads(2, 600, grad=False), heads(2, 600, grad=False))


def chunk_of_a_prompt() -> None:
    lk.attention(heads(4, 64, grad=False), heads(2, 8192, grad=False), heads(2, 8192, grad=False))


def masked_decode() -> None:
    mask, sinks = torch.ones(2, 600, dtype=torch.bool), torch.zeros(4)
    given = (heads(4, 1, grad=False), heads(2, 600, grad=False), heads(2, 600, grad=False))
    decode_attention(*given, mask, sinks=sinks, softcap=5.0)


def hopper_rope_attention() -> None:
    with lk.hopper_attention():
        of_table("rope_attention", options=False)


def hopper_attention_varlen() -> None:
    """Forward: packed tokens have descriptors of their own."""
    with lk.hopper_attention():
        lk.attention_varlen(**OPS["attention_varlen"].arguments(SHAPE, MAKE))


# Too wide for one pass of the norm's backward: the weight's gradient has a kernel of its own.
WIDE = SHAPE._replace(B=1, S=2, N=20000)
PORTABLE: dict[str, Callable[[], None]] = {
    **{label: functools.partial(of_table, label, False) for label, _ in calls(SHAPE, MAKE)},
    **{f"{label}, options": functools.partial(of_table, label, True) for label in OPS if OPS[label].differentiable},
    "rms_norm, wide": functools.partial(of_table, "rms_norm", False, WIDE),
    "rope in place, no gradient": in_place,
    "rope_into_cache": into_cache,
    "attention, everything": attention_with_everything,
    "attention, fixed queries": attention_of_fixed_queries,
    "attention_varlen, fixed queries": packed_attention_of_fixed_queries,
    "decode": decode,
    "attention, a chunk of a prompt": chunk_of_a_prompt,
    "masked decode": masked_decode,
    **{label: functools.partial(tangent, label) for label in REGISTERED if label.endswith(" tangent")},
}
