"""Transformers' attention masks as ranges of keys, without an (S, S) matrix and without waiting for the GPU.

`key_ranges` is registered with Transformers' AttentionMaskInterface. A forward calls it once for each kind of mask and
passes the result to every attention layer. Transformers composes masks from functions of its own: causal, sliding
window, packed documents and so on. intervals.py computes each query's interval of visible keys from the composition.
A composition with any other function becomes an ordinary mask, with an element for every query and key.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import is_fake
from transformers.masking_utils import causal_mask_function, create_causal_mask, eager_mask, sdpa_mask

from llama_kernels.core.autograd import functorch_is_active
from llama_kernels.integrations.transformers.documents import noted_document_starts
from llama_kernels.integrations.transformers.intervals import (
    FULL_MASK,
    MaskFunction,
    Rows,
    WindowSize,
    interval_of,
    traced_interval,
    window_of,
)
from llama_kernels.integrations.transformers.packed_masks import KeyRanges, pack, pack_window, without_hidden_keys

_count_modes = torch._C._len_torch_dispatch_stack
# Models whose blocks of mutually visible tokens need not be contiguous: all images of a sequence are one block.
_SCATTERED_BLOCKS = ("molmo2", "molmo2_text")
# Models in which code beside AttentionInterface computes with the masks of the same config: attention of another kind
# (bigbird_pegasus, informer), relative positions that are added to the mask (beit), a convolution (lasr_encoder), a
# router of experts (nllb-moe), a mask with its sequences in another order (lightglue).
COMPUTED_MASKS = ("beit", "bigbird_pegasus", "informer", "lasr_encoder", "lightglue", "nllb-moe")
# Models whose pooling head, of one query, makes a mask from the same config, and gives it to nn.MultiheadAttention.
_POOLING_HEADS = ("siglip2_vision_model",)
# Whether a model's code may ask for a mask although it only says causal: from Transformers 5.15 on. Up to 5.13,
# allow_is_causal_skip=False meant no more than a static cache.
_MODELS_MAY_ASK = "allow_is_causal_skip" in inspect.signature(create_causal_mask).parameters
# In inference with at most this many queries, as in decoding, the kernel skips hidden keys. Otherwise keys are sorted.
FEW_QUERIES = 8


def key_ranges(
    batch_size: int,
    kv_length: int,
    q_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    config: Any = None,
    local_size: int | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """Make one mask of a forward, for `attention_forward`. The arguments are those of Transformers.

    mask_function(b, h, i, j) says whether query i sees key j, attention_mask (B, keys) whether a key is a token. Masks
    of both directions pass allow_is_bidirectional_skip, causal masks do not.

    Returns:
        The int32 result of `pack` or `pack_window`, or an ordinary mask, (B, 1, Sq, Sk) bool; of floats in models of
        COMPUTED_MASKS.
    """
    kind = getattr(config, "model_type", None)
    stock_call: dict[str, Any] = {
        "batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset, "mask_function": mask_function,
        "attention_mask": attention_mask,
    }  # fmt: skip
    if cache_position is None:
        stock_call |= {"q_length": q_length, "q_offset": q_offset, "device": device, "use_vmap": use_vmap}
    else:  # Transformers before 5.4
        stock_call |= {"cache_position": cache_position}
        device, q_length = cache_position.device, cache_position.shape[0]
        # As many keys as queries make a prefill, whose offset is 0. Otherwise the offset is in device memory.
        q_offset = 0 if q_length == kv_length and kv_offset == 0 else cache_position[0]
    if kind in COMPUTED_MASKS:
        return eager_mask(**stock_call, allow_is_bidirectional_skip=False, **others)
    if kind in _POOLING_HEADS and q_length == 1 < kv_length:
        return sdpa_mask(**stock_call, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    causal = allow_is_bidirectional_skip is None and mask_function is not FULL_MASK
    documents = noted_document_starts(config, q_length) if causal and attention_mask is None else None
    if documents is not None and _has_values(documents) and not documents.any():
        documents = None
    if documents is not None:  # the first document of this call continues one in the cache
        documents = torch.where(documents > 0, documents + q_offset, 0)
    one_document = False
    if attention_mask is not None and _has_values(attention_mask):
        shown = attention_mask[:, : kv_offset + kv_length]
        if shown.shape[1] == kv_offset + kv_length and shown.all():
            attention_mask = None
            one_document = q_length == kv_length  # given a mask, stock code reads no documents in position_ids
    window = window_of(mask_function)
    skip = allow_is_causal_skip if window is None or window.right == 0 else allow_is_bidirectional_skip is not False
    # If Transformers may not omit the mask, the model's code combines it with another one. The exception is a decoding
    # step with a static cache.
    static_step = q_length == 1 and (window is None or window.left >= 0 or not aligned)
    combined = window is not None and not skip and not static_step and _MODELS_MAY_ASK
    unmasked = attention_mask is None and documents is None and not combined
    if window is not None and unmasked and (aligned or window == WindowSize(-1, -1)):
        return pack_window(window, device, one_document)

    own = torch.arange(q_length, device=device) + q_offset
    rows = Rows(own, own[None], kv_offset + kv_length, None if attention_mask is None else attention_mask.bool())
    if combined or kind in _SCATTERED_BLOCKS:
        interval = None
    elif torch.compiler.is_compiling():
        interval = traced_interval(mask_function, rows, batch_size, use_vmap, local_size)
    else:
        interval = interval_of(mask_function, rows, use_vmap)
    if interval is None:
        ordinary = sdpa_mask(**stock_call, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        if documents is not None:
            keys = torch.arange(kv_offset, kv_offset + kv_length, device=device)
            ordinary = ordinary & (keys >= documents[:, None, :, None])
            if q_length == kv_length:  # every key is one of the queries; tokens may see later ones
                ordinary = ordinary & (documents[:, None, None, :] <= own[:, None])
        return ordinary
    start = torch.zeros_like(own)[None] if interval.start is None else interval.start
    end = torch.full_like(own, rows.keys)[None] if interval.end is None else interval.end
    if documents is not None:
        start = torch.maximum(start, documents)
    # From here on, positions are relative to the first key of this layer's cache.
    start, end = (bound.clamp(kv_offset, kv_offset + kv_length) - kv_offset for bound in (start, end))
    if attention_mask is not None:
        missing = max(kv_offset + kv_length - attention_mask.shape[-1], 0)  # the empty part of a static cache
        attention_mask = F.pad(attention_mask.bool(), (0, missing))[:, kv_offset : kv_offset + kv_length]
    elif interval.sound is not None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    start, end = (bound.expand(batch_size, -1) for bound in (start, end))
    return pack(_ranges_of_tokens(start, end, attention_mask, interval.sound))


def _ranges_of_tokens(
    start: torch.Tensor, end: torch.Tensor, attention_mask: torch.Tensor | None, sound: torch.Tensor | None
) -> KeyRanges:
    """The keys from start to end - 1, (B, Sq) each, without those that attention_mask (B, Sk) hides.

    sound: as in `Interval`.
    """
    if attention_mask is None:
        return KeyRanges(start.int(), end.int())
    if sound is None and (tokens := _range_of_tokens(attention_mask)) is not None:
        start, end = torch.maximum(start, tokens[0]), torch.minimum(end, tokens[1])
        return KeyRanges(start.int(), end.int())
    Sq = start.shape[1]
    few = not isinstance(Sq, torch.SymInt) and Sq <= FEW_QUERIES  # torch.export allows no guard
    if few and not torch.is_grad_enabled() and sound is None:
        return KeyRanges(start.int(), end.int(), valid=attention_mask.int())
    return without_hidden_keys(start, end, attention_mask, sound)


def _has_values(x: torch.Tensor) -> bool:
    """Whether the host may read the values of a mask or of positions: they are on the CPU, and no graph is traced.

    A traced graph may get others. A TorchDispatchMode may be tracing one.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or functorch_is_active() or _count_modes():
        return False
    return x.device.type == "cpu" and not is_fake(x)


def _range_of_tokens(attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The first key that attention_mask (B, Sk) shows and the end of these keys, (B, 1) each, where they are one range.

    None if a sequence has padding between its tokens, or if the values may not be read (`_has_values`). Also None if
    the mask has one key, since attention may apply such a mask to all keys.
    """
    if not _has_values(attention_mask) or attention_mask.shape[1] == 1:
        return None
    first = attention_mask.int().argmax(1, keepdim=True)
    end = first + attention_mask.sum(1, keepdim=True)
    keys = torch.arange(attention_mask.shape[1])
    return (first, end) if torch.equal(attention_mask, (keys >= first) & (keys < end)) else None
