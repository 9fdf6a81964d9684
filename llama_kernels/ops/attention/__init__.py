"""Grouped-query attention, dense and packed: the public functions.

A call runs through checks.py, op.py (registered ops and autograd) and dispatch.py (which kernel, and why) to forward.py
and backward.py (delta.py, dkdv.py, dq.py), to decode.py for few queries and many keys, to hopper/, or to cpu.py.
call.py has the call as one structure, tiles.py what the kernels share on the device, tables.py their tile sizes, and
masked_decode.py the decode kernel as an op with a mask over the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

from llama_kernels.ops.attention.checks import Packing, checked_call
from llama_kernels.ops.attention.op import attend
from llama_kernels.reference.attention import AttentionOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention", "attention_varlen"]


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention: out = softmax(q @ kᵀ · scale + mask) @ v, tile by tile, without the Sq x Sk matrix.

    Query head h reads key and value head h // (Hq // Hkv); k and v are never repeated. Scores, softmax and sums are
    float32; probabilities are rounded to v's dtype before they meet v. Blocks of keys that the mask hides are skipped.
    Few queries, as in decoding, are split over the keys, with the heads that share them in one tile.
    Under autocast q, k and v are cast to its dtype. GQA: Ainslie et al., arXiv 2305.13245; the algorithm: Dao,
    FlashAttention-2, arXiv 2307.08691.

    Args:
        q: (B, Hq, Sq, D), bfloat16, float16 or float32, D from 1 to 256. Any strides, (B, S, H, D) seen through
            .transpose(1, 2) among them; a last dimension that is not contiguous is copied.
        k, v: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), of q's dtype, Hq a multiple of Hkv.
        is_causal: query i sees keys j <= i + Sk - Sq. Aligned at the bottom right, as a KV cache needs it; PyTorch's
            scaled_dot_product_attention aligns at the top left. Equal where Sq == Sk.
        scale: of the scores; None is D ** -0.5.
        window_size: (left, right), -1 for no limit: query i also sees only keys from i + Sk - Sq - left to
            i + Sk - Sq + right, both included, as in flash-attn.
        softcap: scores s become softcap · tanh(s / softcap). None or 0.0: they stay as they are.
        sinks: (Hq,), one more logit a head, which takes its share of the softmax (and of lse) and gives no value.
            Differentiable.
        kv_start, kv_end: (B, Sq) int32: row i also sees no key before kv_start[b, i], nor kv_end[b, i] or any after it.
            Padded and packed batches, and caches longer than what is in them, without unpadding, host sync or graph
            break; the blocks outside are skipped.
        return_lse: also return the log of the sum of exponentials of each row's scores. Differentiable.
        deterministic: True asks for gradients that repeat bit for bit, None follows
            torch.are_deterministic_algorithms_enabled(). Only dq of the Hopper kernels does not by itself
            (`llama_kernels.hopper_attention`); they then leave the gradients to the portable ones.

    Returns:
        out, (B, Hq, Sq, Dv) in q's dtype and memory order; with return_lse also lse, (B, Hq, Sq) float32, natural
        logarithm. A row that sees no key gives 0 and -inf (with sinks: 0 and the sink).

    Raises:
        TypeError: an argument is no tensor, or of another dtype, or the dtypes of q, k and v differ.
        ValueError: shapes, head counts, devices, window_size or softcap do not fit.
    """
    call = checked_call(
        "attention", q, k, v, is_causal=is_causal, scale=scale, window_size=window_size, softcap=softcap, sinks=sinks,
        kv_start=kv_start, kv_end=kv_end, deterministic=deterministic,
    )  # fmt: skip
    out, lse = attend("attention", call, deterministic)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, return_lse: Literal[False] = False, **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, return_lse: Literal[True], **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, return_lse: bool, **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` of each sequence of a packed batch on its own.

    Args:
        q: (Tq, Hq, D); k, v: (Tk, Hkv, D) and (Tk, Hkv, Dv): the tokens of all sequences, one after another.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on the tensors' device: sequence b owns the tokens from
            cu_seqlens[b] to cu_seqlens[b + 1]. Sequences may be empty. Values are never trusted: what points outside of
            the tensors is clamped into them, since reading them back to check would stall the GPU
            (`llama_kernels.checked` does). Nothing is promised of sequences that overlap.
        max_seqlen_q, max_seqlen_k: no sequence is longer; what is, is cut off there.
        kv_start, kv_end: (Tq,) int32, counted from the first key of the row's own sequence.
        Others as in `attention`, Sq and Sk being the lengths of each sequence.

    Returns:
        out, (Tq, Hq, Dv); with return_lse also lse, (Hq, Tq). Tokens that no sequence owns give 0 and -inf.

    Raises:
        TypeError, ValueError: as `attention`; also for cu_seqlens and max_seqlen of another kind or shape.
    """
    op, packing = "attention_varlen", Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = checked_call(
        op, q, k, v, packing, is_causal=is_causal, scale=scale, window_size=window_size, softcap=softcap, sinks=sinks,
        kv_start=kv_start, kv_end=kv_end, deterministic=deterministic,
    )  # fmt: skip
    out, lse = attend(op, call, deterministic)
    return (out, lse) if return_lse else out
