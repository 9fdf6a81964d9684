"""One attention call as the kernels take it: sizes, strides, scores and widths, dense and packed alike."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from llama_kernels.core.tensors import empty_in_order_of, next_power_of_2, sizes_of


class Sizes(NamedTuple):
    """Packed: B sequences, none longer than `longest`, in Sq and Sk tokens."""

    B: int
    Hq: int
    group: int  # query heads a key head
    Sq: int
    Sk: int
    longest_q: int
    longest_k: int


class Scoring(NamedTuple):
    """From q @ k^T to logits and, times `unit`, to powers of two: s = softcap * tanh(qk * prescale / softcap)."""

    scale: float
    prescale: float | None  # None where the scale can wait: behind the row maximum it rides on the exponent for nothing
    softcap: float | None
    unit: float


class Window(NamedTuple):
    """Keys a query sees before and after the one it stands at; None: all. right=0 is causal."""

    left: int | None
    right: int | None


def call_sizes(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor | None, longest_q: int, longest_k: int
) -> Sizes:
    B, Hq, Sq = sizes_of(q)
    _, Hkv, Sk = sizes_of(k)
    if cu_seqlens_q is not None:
        B = cu_seqlens_q.shape[0] - 1
    return Sizes(B, Hq, max(Hq // max(Hkv, 1), 1), Sq, Sk, longest_q, longest_k)


def size_arguments(sizes: Sizes) -> Sizes:
    """As kernels take them: Sk and the longest lengths as their negatives.

    Triton makes a constant of an integer argument that is 1. With a length that is known to be 1 or less, loops and
    branches fold into code on which ptxas crashes (Triton 3.6, sm_90, D = 32 and 64). A negative number is never 1, and
    still shows the compiler a multiple of 16, which @triton.jit's do_not_specialize would hide. Sq stays as it is: to
    negate it costs D = 128 a register that it has not.
    """
    return sizes._replace(Sk=-sizes.Sk, longest_q=-sizes.longest_q, longest_k=-sizes.longest_k)


def call_scoring(scale: float, softcap: float | None) -> Scoring:
    log2e = math.log2(math.e)
    if softcap is None and scale > 0:
        return Scoring(scale, None, None, scale * log2e)
    return Scoring(scale, scale, softcap, log2e)


def call_window(left: int | None, right: int | None, longest_q: int, longest_k: int) -> Window:
    """Sides so wide that they hide no key of any sequence go: a mask that changes nothing is not computed."""
    left = None if left is None or left >= longest_k - 1 else left
    right = None if right is None or right >= longest_q - 1 else right
    return Window(left, right)


def call_widths(q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """The kernels' compile-time widths: of a head of q and k, of v, and the powers of two that hold them."""
    return _widths(q.shape[-1], v.shape[-1])


@functools.cache
def _widths(D: int, DV: int) -> dict[str, int]:
    return {"D": D, "DV": DV, "BLOCK_D": width_class(D), "BLOCK_DV": width_class(DV)}


def width_class(D: int) -> int:
    return max(next_power_of_2(D), 16)


def far(*tensors: torch.Tensor) -> bool:
    """Whether rows lie so far apart that the offsets inside one tile, of 256 rows at most, need 64 bits."""
    return any(x.stride(-2 if x.ndim == 4 else 0) >= 2**23 for x in tensors)


def lse_strides(lse: torch.Tensor) -> tuple[int, int, int]:
    """Of batch, head and token of (B, Hq, Sq) or packed (Hq, Tq)."""
    return lse.stride() if lse.ndim == 3 else (0, *lse.stride())


def bound_strides(bound: torch.Tensor | None) -> tuple[int, int, int] | None:
    """Of batch, head (all share it) and token of kv_start or kv_end, (B, Sq) or packed (Tq,)."""
    if bound is None:
        return None
    return (bound.stride(0), 0, bound.stride(1)) if bound.ndim == 2 else (0, 0, bound.stride(0))


def empty_outputs(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out in q's memory order with v's width, and lse (B, Hq, Sq) or (Hq, Tq) float32."""
    out = empty_in_order_of(q, (*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1] if q.ndim == 4 else (q.shape[1], q.shape[0]), dtype=torch.float32)
    return out, lse


def empty_grads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, *needed: bool
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dsinks, each in its tensor's memory order; no elements where not needed."""
    tensors = (q, k, v, sinks)
    return tuple(empty_in_order_of(x) if need else q.new_empty(0) for x, need in zip(tensors, needed, strict=True))
