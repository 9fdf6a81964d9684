"""Grouped-query attention, dense and packed: the public functions.

A call goes through these files:

    checks.py         checks the arguments, and builds an AttentionCall
    call.py           AttentionCall, the call as one structure, and what is derived from it: sizes, scoring, window
    op.py             the registered ops and their autograd.Function
    dispatch.py       which kernel computes the call, and why
    forward.py        the forward: kernel and launcher. Start reading the kernels here
    decode.py         the forward of few queries and many keys; combine.py combines its parts
    key_split.py      when the forward is split over the keys too
    backward.py       the launches of the backward, whose kernels are in delta.py, dkdv.py, dq.py and rounding.py
    hopper/           kernels for Hopper GPUs, some of them on by default
    cpu*.py           CPU tensors, in plain PyTorch

The kernels share device functions: masks.py (which keys a row sees, and which blocks of them a tile visits), softmax.py
(scores and the online softmax) and tiles.py (how a tile is found, loaded and stored). tables.py has the tile sizes, and
says which of them each pass of a call takes; tile_list.py has the tiles of packed batches. merge.py has
`merge_attention`. masked_decode.py is an op for decoding with a mask over the keys, which the integrations use.
flops.py tells PyTorch's FlopCounterMode the FLOPs of the ops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

from llama_kernels.core.checks import check_flag
from llama_kernels.ops.attention.checks import Packing, checked_call
from llama_kernels.ops.attention.op import run_call
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
    kv_prefix: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention: out = softmax(q @ kᵀ · scale + mask) @ v, tile by tile, without the Sq x Sk matrix.

    Query head h attends with key and value head h // (Hq // Hkv); k and v are never repeated. Scores, softmax and sums
    are float32; probabilities are rounded to v's dtype before the product with v. Blocks of keys that are hidden from
    every row of a tile are skipped. Under autocast, q, k and v are cast to its dtype.

    With few queries, as in decoding, the keys are split over the GPU, and one tile holds all query heads of a key head.
    With few tiles of rows and 4,096 keys or more, as for a chunk of a prompt, the keys are split too: the parts take up
    to 9 MB per sequence at D = 128 on an H100 while the call runs, and up to 120 MB on an MI300X.

    GQA: Ainslie et al., arXiv 2305.13245. The algorithm: Dao, FlashAttention-2, arXiv 2307.08691.

    Args:
        q: (B, Hq, Sq, D), bfloat16, float16 or float32, D from 1 to 576 (in float32 to 512; on consumer GPUs and CDNA
            to 512, in float32 to 256). Any strides, such as those of (B, S, H, D) after .transpose(1, 2); a last
            dimension that is not contiguous is copied.
        k, v: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), of q's dtype, Dv from 1 to 512. Hq is a multiple of Hkv.
        is_causal: query i sees only keys j <= i + Sk - Sq. The mask is aligned at the bottom right, as a KV cache needs
            it. PyTorch's scaled_dot_product_attention aligns it at the top left, which is the same where Sq == Sk.
        scale: factor of the scores. None: D ** -0.5.
        window_size: (left, right), each -1 for no limit. Query i sees only keys from i + Sk - Sq - left to
            i + Sk - Sq + right, both included, as in flash-attn.
        softcap: scores s become softcap · tanh(s / softcap). None or 0.0: they are not capped.
        sinks: (Hq,), in any of these dtypes: one more logit for each head, as in GPT-OSS. It counts in the softmax and
            in lse, and has no value. Differentiable.
        kv_start, kv_end: (B, Sq) int32. Query i sees only keys j with kv_start[b, i] <= j < kv_end[b, i]. For padded
            and packed batches, and caches longer than their contents: without unpadding, host sync or graph break.
            Keys before the least kv_start and from the largest kv_end of a sequence on may hold NaN, unless kv_prefix
            shows them. Other hidden keys must be finite.
        kv_prefix: (B, Sq) int32. Query i also sees the first kv_prefix[b, i] keys, whatever is_causal, window_size,
            kv_start and kv_end hide. For completions that share a prompt in one sequence, first tokens that stay
            visible beside a window, and prefixes without a causal mask.
        return_lse: also return lse, the logarithm of the sum of the exponentials of each row's scores. Differentiable.
        deterministic: True: the gradients repeat bit for bit. None: as torch.are_deterministic_algorithms_enabled()
            says. Only dq of the Hopper kernels (`llama_kernels.hopper_attention`) may differ from run to run; where it
            must not, the portable kernels compute the gradients.

    Returns:
        out, (B, Hq, Sq, Dv) in q's dtype and memory order; with return_lse also lse, (B, Hq, Sq) float32, natural
        logarithm. A row that sees no key gives 0 and -inf (with sinks: 0 and the sink).

    Raises:
        TypeError: An argument is not a tensor, or has another dtype than it may have, or q, k and v differ in dtype.
        ValueError: Shapes, numbers of heads, devices, window_size, scale or softcap do not fit.
    """
    check_flag("attention", "return_lse", return_lse)
    call = checked_call(
        "attention", q, k, v, is_causal=is_causal, scale=scale, window_size=window_size, softcap=softcap, sinks=sinks,
        kv_start=kv_start, kv_end=kv_end, kv_prefix=kv_prefix, deterministic=deterministic,
    )  # fmt: skip
    out, lse = run_call("attention", call, deterministic)
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
    kv_prefix: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` within each sequence of a packed batch.

    Args:
        q: (Tq, Hq, D), the tokens of all sequences, one sequence after another.
        k, v: (Tk, Hkv, D) and (Tk, Hkv, Dv), likewise.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on q's device. Sequence b is the tokens in
            [cu_seqlens[b], cu_seqlens[b + 1]), which may be none. The values are not checked, since that would wait for
            the GPU; they are clamped, so that nothing outside the tensors is read. Inside `llama_kernels.checked` they
            are checked. Results of overlapping sequences are undefined.
        max_seqlen_q, max_seqlen_k: the length of the longest sequence, or more. Longer sequences are cut off there.
        kv_start, kv_end, kv_prefix: (Tq,) int32, counted from the first key of the row's own sequence.
        Others: as in `attention`, where Sq and Sk are the lengths of each sequence.

    Returns:
        out, (Tq, Hq, Dv); with return_lse also lse, (Hq, Tq). Tokens of no sequence give 0 and -inf.

    Raises:
        TypeError, ValueError: As `attention`; also where cu_seqlens or max_seqlen do not fit.
    """
    op, packing = "attention_varlen", Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_flag(op, "return_lse", return_lse)
    call = checked_call(
        op, q, k, v, packing, is_causal=is_causal, scale=scale, window_size=window_size, softcap=softcap, sinks=sinks,
        kv_start=kv_start, kv_end=kv_end, kv_prefix=kv_prefix, deterministic=deterministic,
    )  # fmt: skip
    out, lse = run_call(op, call, deterministic)
    return (out, lse) if return_lse else out
