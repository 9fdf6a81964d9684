"""The attention function of attn_implementation="llama_kernels".

`attention_forward` is what Transformers calls in each layer. It takes one of these ways:

    a kernel, by the mask                    `attention` for a window, `_of_ranges` for one range of keys per query
    a kernel, by cu_seqlens                  `_packed`
    context parallelism                      `_context_parallel`, inside `llama_kernels.distributed.context_parallel`
    stock attention, with one warning        `_stock`, where `_why_stock` names a reason

The kernels do not support dropout, heads too wide for a program, or masks that are not one range of keys per query.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_kernels.core.autograd import Differentiable, needs_grad
from llama_kernels.core.checks import KERNEL_DTYPES, message
from llama_kernels.integrations.transformers.intervals import Window
from llama_kernels.integrations.transformers.masks import (
    KeyRanges,
    document_starts,
    documents_of,
    has_prefix,
    key_ranges,
    pack_window,
    unpack,
    without_hidden_keys,
    written_out,
)
from llama_kernels.integrations.transformers.modules import is_plain
from llama_kernels.integrations.transformers.source import decorated, global_names, passes_mask_on
from llama_kernels.ops.attention import attention, attention_varlen
from llama_kernels.ops.attention.decode import fits_decode
from llama_kernels.ops.attention.masked_decode import decode_attention
from llama_kernels.ops.attention.tables import fits
from llama_kernels.reference.attention import AttentionOptions

NAME = "llama_kernels"  # without "flash" or "/", which Transformers gives another meaning
FOLLOWS_MASK = "_llama_kernels_follows_mask"  # marks modules whose masks already separate packed documents
# Kinds of layers whose arguments say which keys are visible; "hybrid" has full attention, and a recurrence beside it.
_BY_ARGUMENTS = ("full_attention", "sliding_attention", "attention", "hybrid")
context_parallels: list[Any] = []  # the Contexts of llama_kernels.distributed.context_parallel, the innermost last
logger = logging.getLogger(__name__)


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
            the layer sees, as in chunked attention; the module changes its mask or
            passes arguments that are not those above, or the call is inside PyTorch's context_parallel.
    """
    _refuse_context_parallel()
    _refuse_other_attention(module)
    _refuse_integers(attention_mask)
    options: AttentionOptions = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    left = sliding_window - 1 if sliding_window else -1
    window = Window(left, 0 if causal else left)
    if has_prefix(attention_mask):
        _refuse_local_attention(module, sliding_window)
    Sq, Sk = query.shape[2], key.shape[2]
    reason = _why_stock(query, key, value, attention_mask, dropout, others)
    if (doc_start := documents_of(attention_mask)) is not None:
        reason = reason or (None if causal else "is_causal=False") or _only_in_mask(module, sliding_window)
        _refuse_in_context_parallel(reason)
        return _context_parallel(query, key, value, doc_start, window, options), None
    if attention_mask is None and causal and context_parallels:
        fix = "If accelerate drops it, leave cp_size out of its ParallelismConfig."
        raise ValueError(message("context_parallel", "attention_mask", "missing in a layer", "that of the model", fix))
    if reason is not None and cu_seq_lens_q is not None:
        wanted = "None, since stock attention does not read it"
        raise ValueError(message("attention_forward", "cu_seq_lens_q", f"given beside {reason}", wanted))
    if cu_seq_lens_q is not None:
        _refuse_bounds(_only_in_mask(module, sliding_window))
        bounds, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
        options |= {"is_causal": False, "window_size": window}
        return _packed(query, key, value, bounds, longest, options), None
    if reason is not None:
        attention_mask = _with_documents(module, attention_mask, position_ids, window, Sq, Sk)
        if attention_mask is None and (window.left >= 0 or (causal and 1 < Sq != Sk)):
            attention_mask = written_out(pack_window(window, query.device), Sq, Sk)
        given = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux, **others}
        return _stock(reason, module, query, key, value, attention_mask, is_causal=causal, **given)

    query, key = query.to(value.dtype), key.to(value.dtype)
    ranges: Window | KeyRanges
    if attention_mask is None:
        ranges = window
    else:
        ranges = unpack(attention_mask, Sq, Sk)
    if isinstance(ranges, Window):
        starts = _document_starts(module, attention_mask, position_ids, ranges, Sq, Sk)
        if starts is not None:
            starts = starts.int().expand(query.shape[0], -1)
        options |= {"is_causal": False, "window_size": ranges, "kv_start": starts}
        out = attention(query, key, value, **options)
    else:
        out = _of_ranges(query, key, value, ranges, options)
    return out.transpose(1, 2).contiguous(), None


# --- documents that position_ids alone separate ----------------------------------------------------------------------


def _document_starts(
    module: nn.Module, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, window: Window, Sq: int,
    Sk: int,
) -> torch.Tensor | None:  # fmt: skip
    """The first key of each query's document, (1 or B, Sq), in causal attention whose mask does not separate them."""
    if window.right != 0 or Sq != Sk or (attention_mask is not None and hasattr(module, FOLLOWS_MASK)):
        return None
    return document_starts(position_ids, Sq)


def _with_documents(
    module: nn.Module, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, window: Window, Sq: int,
    Sk: int,
) -> torch.Tensor | None:  # fmt: skip
    """The mask of stock attention. It hides other documents, as the kernels do with `_document_starts`."""
    mask = attention_mask
    if mask is None:
        mask = pack_window(window, None if position_ids is None else position_ids.device)
    if mask.dtype != torch.int32 or not isinstance(ranges := unpack(mask, Sq, Sk), Window):
        return attention_mask
    starts = _document_starts(module, attention_mask, position_ids, ranges, Sq, Sk)
    if starts is None:
        return attention_mask
    return written_out(mask, Sq, Sk) & (torch.arange(Sk, device=mask.device) >= starts[..., None])[:, None]


# --- calls of the kernels --------------------------------------------------------------------------------------------


def _context_parallel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, doc_start: torch.Tensor, window: Window,
    options: AttentionOptions,
) -> torch.Tensor:  # fmt: skip
    """Causal attention to the keys of all processes, inside `llama_kernels.distributed.context_parallel`."""
    from llama_kernels.distributed.attention import cp_attention

    if not context_parallels:
        fix = (
            "Run the backward inside context_parallel too, since it computes checkpointed layers again; or, if the "
            "mask is yours, pass attention_mask.bool()."
        )
        got = "that of a context_parallel, or integers, outside of context_parallel"
        raise ValueError(message("attention_forward", "attention_mask", got, "a mask of this call", fix))
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


# --- stock attention -------------------------------------------------------------------------------------------------


def _why_stock(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> str | None:
    """Why the kernels do not support this call, or None where they do."""
    if dropout:
        return "dropout of attention probabilities"
    if others.get("position_bias") is not None:
        return "position_bias"
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        return "a 4-D attention_mask that is not one range of keys for each query"
    if not all(is_plain(x) for x in (query, key, value)):
        return f"a {type(query).__name__} on {query.device.type}"
    if value.dtype not in KERNEL_DTYPES:
        return str(value.dtype)
    if query.shape[-1] > 576 or value.shape[-1] > 512 or (value.is_cuda and not fits(query, value)):
        return f"heads {max(query.shape[-1], value.shape[-1])} wide"
    return None


def _stock(
    reason: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    is_causal: bool,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    **others: Any,
) -> Any:
    """Run the call in SDPA, or in the model's eager function where it has a softcap or sinks, which SDPA lacks."""
    if not torch.compiler.is_compiling():
        _warn_of_stock(reason)
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        attention_mask = written_out(attention_mask, query.shape[2], key.shape[2])
    if softcap is None and s_aux is None:
        causal = query.shape[2] > 1 and attention_mask is None and is_causal  # not checked in Transformers 4
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, is_causal=causal, **others)
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = written_out(pack_window(Window(-1, 0), query.device), query.shape[2], key.shape[2])
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = hidden.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    eager = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    if eager is None:
        fix = "Use attn_implementation='eager'."
        raise ValueError(message("attention_forward", "attention_mask", reason, "a range of keys for each query", fix))
    return eager(module, query, key, value, attention_mask, softcap=softcap, s_aux=s_aux, **others)


@functools.cache
def _warn_of_stock(reason: str) -> None:
    """Warn, once per reason."""
    logger.warning("llama_kernels: %s: stock attention (SDPA or eager) runs instead of the kernels", reason)


# --- calls that are refused ------------------------------------------------------------------------------------------


def _refuse_in_context_parallel(reason: str | None) -> None:
    """Raise if a layer inside context_parallel would run stock attention, for this reason."""
    if reason is not None:
        wanted = "causal attention that the kernels support, full or in a window that the layer passes on"
        raise ValueError(
            message("context_parallel", "model", f"a model with this in an attention layer: {reason}", wanted)
        )


def _refuse_bounds(mask: str | None) -> None:
    """Raise if cu_seq_lens_q would replace a mask that says this, which the other arguments do not say."""
    if mask is not None:
        got, wanted = f"given to a layer with {mask}", "None, since it replaces the mask of the layer"
        fix = "Leave it out: position_ids, with use_cache=False, also keep documents apart."
        raise ValueError(message("attention_forward", "cu_seq_lens_q", got, wanted, fix))


def _only_in_mask(module: nn.Module, sliding_window: int | None) -> str | None:
    """What only the mask of this layer says about the keys that are visible, or None: its other arguments say all."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None) or ()
    if isinstance(layer, int) and layer < len(kinds):
        kinds = (kinds[layer],)
    for kind in kinds:
        if kind not in _BY_ARGUMENTS:
            return str(kind)
    window = getattr(config, "sliding_window", None)
    if window and not sliding_window and (not kinds or "sliding_attention" in kinds):
        return f"a sliding window of {window} that it does not pass on"
    return None


def _refuse_local_attention(module: nn.Module, sliding_window: int | None) -> None:
    """Raise where the mask of shared prompts would show a layer more or fewer keys than repeated prompts would."""
    if context_parallels:
        raise ValueError(message("share_prompts", "model", "inside context_parallel", "one process with all tokens"))
    kinds = set(getattr(getattr(module, "config", None), "layer_types", None) or ()) - {"full_attention"}
    local = f"sliding_window={sliding_window}" if sliding_window else _only_in_mask(module, sliding_window)
    if kinds or local:
        layers = ", ".join(sorted(kinds)) or f"sliding attention: {local}"
        got = f"a model with layers of {layers}"
        fix = "Repeat the prompt for each completion with this model."
        raise ValueError(message("share_prompts", "model", got, "layers that attend to all earlier tokens", fix))


def _refuse_context_parallel() -> None:
    """Raise inside PyTorch's context_parallel, where key has the keys of this rank only."""
    sdpa = F.scaled_dot_product_attention  # builtin, until context_parallel replaces it with a Python function
    if isinstance(sdpa, types.FunctionType) and sdpa.__module__.startswith("torch.distributed.tensor.experimental"):
        fix = "Use attn_implementation='sdpa' with torch's context_parallel."
        got = "one rank's part of the keys, inside context_parallel"
        raise ValueError(message("attention_forward", "key", got, "all keys of the sequence", fix))


def _refuse_other_attention(module: nn.Module) -> None:
    """Raise if `why_other_attention` names a reason. In a patched module it did not."""
    if torch.compiler.is_compiling() or hasattr(module, FOLLOWS_MASK):
        return
    if reason := why_other_attention(decorated(type(module).forward)[-1]):
        fix = "Use attn_implementation='eager' or 'sdpa' for this model."
        wanted = "a layer that passes its attention_mask on unchanged, and arguments that every attention function has"
        raise ValueError(message("attention_forward", "module", f"a {type(module).__name__}: {reason}", wanted, fix))


def _refuse_integers(mask: torch.Tensor | None) -> None:
    """Raise if `mask` is the caller's, of integers: neither a packed mask, which has no dimension of queries, nor one
    that SDPA takes. Eager attention would add 0 and 1 to the scores."""
    if mask is None or mask.dtype == torch.bool or mask.is_floating_point():
        return
    if mask.dtype != torch.int32 or mask.ndim != 4 or mask.shape[2] > 1:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        wanted = "bool, or numbers to add to the scores"
        raise TypeError(message("attention_forward", "attention_mask", got, wanted, "Pass attention_mask.bool()."))


def why_other_attention(forward: Any) -> str | None:
    """Why the forward of a module that calls AttentionInterface computes another attention than ours, or None.

    A packed mask has no element for each query and key. Arguments that are not known, such as the sinks of each query
    in Inkling 2, would be ignored.
    """
    return _why_other_attention(forward, tuple(eager_functions(forward)))


@functools.lru_cache(maxsize=1024)  # every layer of a model with our attention by name asks in every call
def _why_other_attention(forward: Any, eager: tuple[Any, ...]) -> str | None:
    """`why_other_attention`. eager: the eager attention functions that the forward names."""
    if not passes_mask_on(forward):
        return "its forward computes with attention_mask"
    if unknown := [name for function in eager for name in _unknown_arguments(function)]:
        return f"its attention function takes {', '.join(unknown)}"
    return None


def eager_functions(forward: Any) -> list[Any]:
    """The eager attention functions that a forward names."""
    names = (name for name in sorted(global_names(forward)) if name.endswith("eager_attention_forward"))
    return [forward.__globals__[name] for name in names if name in forward.__globals__]


def _unknown_arguments(eager: Any) -> list[str]:
    """The arguments of an eager attention function that `attention_forward` does not have.

    The first five, up to the mask, are passed by position. SDPA adds position_bias.
    """
    known = {*inspect.signature(attention_forward).parameters, "position_bias"}
    parameters = list(inspect.signature(eager).parameters.values())[5:]
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in known]


# --- registration ----------------------------------------------------------------------------------------------------


def register() -> None:
    """Make attn_implementation="llama_kernels" known to Transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_ranges)
