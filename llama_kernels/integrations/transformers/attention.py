"""The attention function of attn_implementation="llama_kernels".

`attention_forward` is what Transformers calls in each layer. It takes one of these ways:

    an error                                 attention_refusals.py
    context parallelism                      `_context_parallel`, inside `llama_kernels.distributed.context_parallel`
    a kernel, by cu_seqlens                  `_packed`
    stock attention, with one warning        attention_stock.py, where `why_stock` names a reason
    a kernel, by the mask                    `_by_mask`: for a window, or for one range of keys per query
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from llama_kernels.core.autograd import Differentiable, needs_grad
from llama_kernels.integrations.transformers.attention_refusals import check_call, check_layer
from llama_kernels.integrations.transformers.attention_stock import run_stock, why_stock, with_documents
from llama_kernels.integrations.transformers.documents import FOLLOWS_MASK
from llama_kernels.integrations.transformers.intervals import WindowSize, starts_in_window
from llama_kernels.integrations.transformers.masks import key_ranges
from llama_kernels.integrations.transformers.packed_masks import (
    KeyRanges,
    documents_of,
    is_one_document,
    unpack,
    without_hidden_keys,
)
from llama_kernels.ops.attention import attention, attention_varlen
from llama_kernels.ops.attention.decode import fits_decode
from llama_kernels.ops.attention.masked_decode import decode_attention
from llama_kernels.reference.attention import AttentionOptions

NAME = "llama_kernels"  # without "flash" or "/", which Transformers gives another meaning
context_parallels: list[Any] = []  # the Contexts of llama_kernels.distributed.context_parallel, the innermost last


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with the arguments and results that Transformers expects.

    Args:
        query: (B, Hq, Sq, D).
        key, value: (B, Hkv, Sk, D).
        attention_mask: the result of `key_ranges`, or the caller's own mask (B, H or 1, Sq, Sk). If it is None,
            is_causal (default: that of the module), sliding_window and the documents in position_ids decide which keys
            are visible; the last query is aligned with the last key, as a cache needs it. Wrappers may drop the mask,
            as DeepSpeed's sequence parallelism does.
        scaling, softcap, s_aux: the scale, softcap and sinks of `attention`.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: bounds of packed sequences, and the length of the
            longest. If given, attention_mask is ignored.
        dropout, others: with dropout or a position_bias, stock attention runs.

    Returns:
        out (B, Sq, Hq, D), and the attention weights: None where a kernel ran, otherwise those of stock attention.

    Raises:
        TypeError: the caller's own mask holds integers.
        ValueError: cu_seq_lens_q is given and only stock attention supports the call, or only the mask says which keys
            the layer sees, as in chunked attention; the module changes its mask or passes arguments that are not those
            above, or the call is inside PyTorch's context_parallel.
    """
    inside = bool(context_parallels)
    check_layer(module, attention_mask, sliding_window, in_context_parallel=inside)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    reason = why_stock(module, query, key, value, attention_mask, dropout, others)
    check_call(
        module, attention_mask, reason, causal=causal, sliding_window=sliding_window, cu_seq_lens_q=cu_seq_lens_q,
        in_context_parallel=inside,
    )  # fmt: skip

    left = sliding_window - 1 if sliding_window else -1
    window = WindowSize(left, 0 if causal else left)
    options: AttentionOptions = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if (doc_start := documents_of(attention_mask)) is not None:
        return _context_parallel(query, key, value, doc_start, window, options), None
    if cu_seq_lens_q is not None:
        bounds, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
        options |= {"is_causal": False, "window_size": window}
        return _packed(query, key, value, bounds, longest, options), None
    if attention_mask is not None and (hasattr(module, FOLLOWS_MASK) or is_one_document(attention_mask)):
        position_ids = None  # the mask says what its documents are
    if reason is not None:
        attention_mask = with_documents(attention_mask, position_ids, window, query.shape[2], key.shape[2])
        given = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux, **others}
        return run_stock(reason, module, query, key, value, attention_mask, window, is_causal=causal, **given)
    out = _by_mask(query, key, value, attention_mask, window, position_ids, options)
    return out.transpose(1, 2).contiguous(), None


# --- calls of the kernels --------------------------------------------------------------------------------------------


def _by_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    window: WindowSize, position_ids: torch.Tensor | None, options: AttentionOptions,
) -> torch.Tensor:  # fmt: skip
    """Attention to the keys that attention_mask shows, or `window` where it is None. Returns (B, Hq, Sq, Dv).

    position_ids: where a document begins within a window, unless it is None.
    """
    Sq, Sk = query.shape[2], key.shape[2]
    query, key = query.to(value.dtype), key.to(value.dtype)
    ranges: WindowSize | KeyRanges = window
    if attention_mask is not None:
        ranges = unpack(attention_mask, Sq, Sk)
    if not isinstance(ranges, WindowSize):
        return _of_ranges(query, key, value, ranges, options)
    starts = starts_in_window(position_ids, ranges, Sq, Sk)
    if starts is not None:
        starts = starts.int().expand(query.shape[0], -1)
    options |= {"is_causal": False, "window_size": ranges, "kv_start": starts}
    return attention(query, key, value, **options)


def _context_parallel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, doc_start: torch.Tensor, window: WindowSize,
    options: AttentionOptions,
) -> torch.Tensor:  # fmt: skip
    """Causal attention to the keys of all processes, inside `llama_kernels.distributed.context_parallel`."""
    from llama_kernels.distributed.attention import cp_attention

    context = context_parallels[-1]
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = cp_attention(
        query, key, value, mesh=context.mesh, layout=context.layout, method=context.method,
        doc_start=doc_start.contiguous(), window_size=window, scale=options["scale"], softcap=options["softcap"],
        sinks=options["sinks"],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def _of_ranges(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranges: KeyRanges, options: AttentionOptions
) -> torch.Tensor:
    """Attention of each query to its range of keys. Returns (B, Hq, Sq, Dv)."""
    B = query.shape[0]
    ranges = KeyRanges._make(x if x is None or x.shape[0] == B else x.expand(B, -1) for x in ranges)
    described = ranges.order if ranges.valid is None else ranges.valid
    if described is not None and described.shape[1] == 1:
        ranges = _of_one_key(ranges, key.shape[2])
    if ranges.valid is not None:
        valid = ranges.valid.bool()
        if fits_decode(query, key) and not needs_grad(query, key, value, options["sinks"]):
            call: dict[str, Any] = {"kv_start": ranges.start.contiguous(), "kv_end": ranges.end.contiguous(), **options}
            return decode_attention(query, key, value, valid, **call)
        ranges = without_hidden_keys(ranges.start.long(), ranges.end.long(), valid, None)
    if ranges.order is not None:
        key, value = _Rearranged.call("attention", key, value, ranges.order, ranges.inverse)
    prefix = None if ranges.prefix is None else ranges.prefix.contiguous()
    options |= {"kv_start": ranges.start.contiguous(), "kv_end": ranges.end.contiguous(), "kv_prefix": prefix}
    options |= {"is_causal": False}
    out = attention(query, key, value, **options)
    if ranges.sound is not None:
        out = out.masked_fill((ranges.sound[:, :1] == 0)[:, :, None, None], float("nan"))
    return out


def _of_one_key(ranges: KeyRanges, Sk: int) -> KeyRanges:
    """A mask of one key, applied to all Sk keys, as stock attention broadcasts it.

    Transformers 5.20 makes such a mask for the cache of RecurrentGemma.
    """
    sees = ranges.end > ranges.start
    if ranges.valid is not None:
        sees = sees & ranges.valid.bool()
    return KeyRanges(torch.zeros_like(ranges.start), sees.int() * Sk)


class _Rearranged(Differentiable):
    """k and v (B, H, S, D) with their tokens in the order of `KeyRanges`.

    The backward gathers with the inverse order. It adds nothing up, so gradients repeat bit for bit.
    """

    @staticmethod
    def forward(
        op: str, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return _take((k, v), order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, _, _, order, inverse = inputs
        ctx.save_for_backward(order, inverse)

    @staticmethod
    def backward(ctx: Any, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, inverse = ctx.saved_tensors
        return None, *_Rearranged.call(ctx.op, dk, dv, inverse, order), None, None


def _take(tensors: tuple[torch.Tensor, ...], order: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each tensor (B, H, S, D) with its tokens in the order of `KeyRanges`."""
    index = (order ^ (order >> 31)).long()[:, None, :, None]  # hidden keys have -1 - position: x ^ -1 is -1 - x
    return tuple(x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in tensors)


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor | None],
    longest: tuple[int | None, int | None],
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention in a batch whose rows are concatenated and divided into sequences by cu_seqlens: (B, Sq, Hq, Dv)."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))  # (B * S, H, D)
    bounds_q, bounds_k = bounds[0], bounds[0] if bounds[1] is None else bounds[1]
    longest_q, longest_k = (n if isinstance(n, int) else x.shape[0] for n, x in zip(longest, (q, k), strict=True))
    out = attention_varlen(q, k, v, bounds_q, bounds_k, longest_q, longest_k, **options)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


# --- registration ----------------------------------------------------------------------------------------------------


def register() -> None:
    """Make attn_implementation="llama_kernels" known to Transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_ranges)
