"""Transformers' attention masks as ranges of keys, without an (S, S) matrix and without waiting for the GPU.

`key_ranges` is registered with Transformers' AttentionMaskInterface. A forward calls it once for each kind of mask and
passes the result to every attention layer. Transformers composes masks from functions of its own: causal, sliding
window, packed documents and so on. intervals.py computes each query's interval of visible keys from the composition.
A composition with any other function becomes an ordinary mask, with an element for every query and key.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import is_fake
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from llama_kernels.core.autograd import functorch_is_active
from llama_kernels.integrations.transformers.intervals import (
    MaskFunction,
    Rows,
    Window,
    interval_of,
    traced_interval,
    window_of,
)

_count_modes = torch._C._len_torch_dispatch_stack
# Models whose blocks of mutually visible tokens need not be contiguous: all images of a sequence are one block.
_SCATTERED_BLOCKS = ("molmo2", "molmo2_text")
# Models with attention beside AttentionInterface that adds the mask of the same config to its scores.
ADDED_MASKS = ("bigbird_pegasus", "informer")
# Models whose pooling head, of one query, makes a mask from the same config, and gives it to nn.MultiheadAttention.
_POOLING_HEADS = ("siglip2_vision_model",)
# In inference with at most this many queries, as in decoding, the kernel skips hidden keys. Otherwise keys are sorted.
FEW_QUERIES = 8
# Fields of a mask with a prefix, which may reach a model that is not patched. Its eager attention adds the mask to the
# scores (B, H, Sq, Sk). That raises where H is another number than this, and no model of Transformers has 23 heads.
_FIELDS_OF_PREFIX = 23


class KeyRanges(NamedTuple):
    """A mask as every layer gets it: visible to query i are the keys start[i] to end[i] - 1.

    With `order`, start and end are positions in k[order]. There all tokens come before all padding, so the visible keys
    are one interval wherever the padding was. Tokens keep their order among themselves, and so does padding. With
    `valid`, keys keep their positions, and a key is hidden where `valid` is 0.
    """

    start: torch.Tensor  # (B, Sq) int32
    end: torch.Tensor  # (B, Sq) int32
    order: torch.Tensor | None = None  # (B, Sk) int32, the key at each new position; -1 - key for a hidden key
    inverse: torch.Tensor | None = None  # (B, Sk) int32, the new position of each key; -1 - position for a hidden key
    valid: torch.Tensor | None = None  # (B, Sk) int32
    sound: torch.Tensor | None = None  # (B, Sk) int32, 0 in sequences whose mask is not ranges: their result is NaN
    prefix: torch.Tensor | None = None  # (B, Sq) int32: how many first keys are also visible; then there are no others


# --- a mask as one 4-D tensor, which Transformers passes on unchanged ------------------------------------------------
#
# Model code may slice a 4-D mask to the last queries, [:, :, -n:], or to the first keys, [..., :Sk]. That leaves a
# packed mask as it is: its dimension of queries has size 1 or 0, and its rows of queries are aligned at the right.


def pack(ranges: KeyRanges) -> torch.Tensor:
    """The fields that are not None, each padded to one length: (B, fields, 1, max(Sq, Sk)) int32.

    `unpack` tells by their number which fields they are. The prefix is repeated until there are _FIELDS_OF_PREFIX.
    """
    queries: list[torch.Tensor] = [ranges.start, ranges.end]
    if ranges.prefix is not None:
        queries += [ranges.prefix] * (_FIELDS_OF_PREFIX - len(queries))
    keys = [line for line in ranges[2:6] if line is not None]
    length = max(line.shape[-1] for line in (*queries, *keys))
    lines = [F.pad(line, (length - line.shape[-1], 0)) for line in queries]
    return torch.stack([*lines, *(F.pad(line, (0, length - line.shape[-1])) for line in keys)], 1)[:, :, None]


def pack_window(window: Window, device: torch.device | None) -> torch.Tensor:
    """An int32 tensor without elements. Its sizes encode the window, so reading it needs no device memory."""
    return torch.empty(window.right + 2, window.left + 2, 0, 0, dtype=torch.int32, device=device)


def pack_documents(starts: torch.Tensor) -> torch.Tensor:
    """Causal attention inside documents that begin at the global positions `starts` (B, S), for tokens that are divided
    among processes: (B, 1, 1, S) int32. `documents_of` is the inverse."""
    return starts.int()[:, None, None]


def documents_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The argument of `pack_documents`, or None where `mask` is not a result of it."""
    return mask[:, 0, 0] if mask is not None and mask.dtype == torch.int32 and mask.shape[1:3] == (1, 1) else None


def unpack(mask: torch.Tensor, Sq: int, Sk: int) -> KeyRanges | Window:
    """The argument of `pack` or `pack_window`, for the last Sq of its queries and the first Sk of its keys."""
    if mask.shape[2] == 0:
        return Window(mask.shape[1] - 2, mask.shape[0] - 2)
    lines = mask[:, :, 0].unbind(1)
    of_queries = [line[:, line.shape[1] - Sq :] for line in lines[:3]]
    start, end = of_queries[:2]
    if has_prefix(mask):
        return KeyRanges(start, end, prefix=of_queries[2])
    names = {2: (), 3: ("valid",), 4: ("order", "inverse"), 5: ("order", "inverse", "sound")}[len(lines)]
    return KeyRanges(start, end, **{name: line[:, :Sk] for name, line in zip(names, lines[2:], strict=True)})


def has_prefix(mask: torch.Tensor | None) -> bool:
    """Whether `mask` is that of completions which share a prompt."""
    return mask is not None and mask.dtype == torch.int32 and mask.shape[1] == _FIELDS_OF_PREFIX and mask.shape[2] == 1


def written_out(mask: torch.Tensor, Sq: int, Sk: int) -> torch.Tensor:
    """A packed mask as an ordinary one, (1 or B, 1, Sq, Sk) bool."""
    ranges = unpack(mask, Sq, Sk)
    keys = torch.arange(Sk, device=mask.device)
    if isinstance(ranges, Window):
        own = torch.arange(Sq, device=mask.device)[:, None] + (Sk - Sq)
        see = torch.ones(Sq, Sk, dtype=torch.bool, device=mask.device)
        if ranges.left >= 0:
            see &= keys >= own - ranges.left
        if ranges.right >= 0:
            see &= keys <= own + ranges.right
        return see[None, None]
    place = keys[None] if ranges.inverse is None else ranges.inverse  # negative for a hidden key
    see = (place[:, None] >= ranges.start[..., None]) & (place[:, None] < ranges.end[..., None])
    if ranges.valid is not None:
        see &= ranges.valid.bool()[:, None]
    if ranges.prefix is not None:
        see |= place[:, None] < ranges.prefix[..., None]
    return see[:, None]


# --- documents in position_ids ---------------------------------------------------------------------------------------


class _Call(threading.local):
    """The position_ids of the current call of a patched model, and the config of its masks."""

    config: Any = None
    position_ids: torch.Tensor | None = None


_call = _Call()


def note_position_ids(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of patched models, which stores the caller's position_ids for the masks of this forward.

    Only positions from the caller can start documents. The mask function cannot tell them from positions that the model
    makes itself; this hook can.
    """
    given = kwargs.get("position_ids")
    if len(args) > 2 and given is None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)).get("position_ids")
    _call.config, _call.position_ids = module.config, given


def forget_position_ids(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook of patched models, which clears what `note_position_ids` stored."""
    _call.config = _call.position_ids = None


def document_starts(position_ids: torch.Tensor | None, Sq: int) -> torch.Tensor | None:
    """The first query of each query's document, (1 or B, Sq). A document begins where positions decrease."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != Sq or Sq == 1:
        return None
    decreases = position_ids < position_ids.roll(1, 1)  # the first column has no effect: index 0 starts a document
    return torch.where(decreases, torch.arange(Sq, device=position_ids.device), 0).cummax(1).values


# --- the mask function of Transformers' AttentionMaskInterface -------------------------------------------------------


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
    allow_is_bidirectional_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | None = None,
    config: Any = None,
    local_size: int | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """Make one mask of a forward, for `attention_forward`. The arguments are those of Transformers.

    mask_function(b, h, i, j) says whether query i sees key j, attention_mask (B, keys) whether a key is a token.

    Returns:
        The int32 result of `pack` or `pack_window`, or an ordinary mask, (B, 1, Sq, Sk) bool; of floats in models of
        ADDED_MASKS.
    """
    kind = getattr(config, "model_type", None)
    stock_call: dict[str, Any] = {
        "batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset, "mask_function": mask_function,
        "attention_mask": attention_mask,
    }  # fmt: skip
    if cache_position is not None:
        stock_call |= {"cache_position": cache_position}
    else:
        stock_call |= {"q_length": q_length, "q_offset": q_offset, "device": device, "use_vmap": use_vmap}
    if kind in ADDED_MASKS:
        return eager_mask(**stock_call, allow_is_bidirectional_skip=False, **others)
    if kind in _POOLING_HEADS and q_length == 1 < kv_length:
        return sdpa_mask(**stock_call, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    if cache_position is not None:  # Transformers 4
        device, q_length = cache_position.device, cache_position.shape[0]
        # As many keys as queries make a prefill, whose offset is 0. Otherwise the offset is in device memory.
        q_offset = 0 if q_length == kv_length and kv_offset == 0 else cache_position[0]
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    documents = None
    if attention_mask is None and _call.config is config and config is not None:
        documents = document_starts(_call.position_ids, q_length)
    if attention_mask is not None and _has_values(attention_mask) and q_length < kv_length:
        shown = attention_mask[:, : kv_offset + kv_length]
        if shown.shape[1] == kv_offset + kv_length and shown.all():
            attention_mask = None
    window = window_of(mask_function)
    skip = allow_is_causal_skip if window is None or window.right == 0 else allow_is_bidirectional_skip
    # If Transformers may not omit the mask, the model's code combines it with another one. The exception is a decoding
    # step with a static cache. Transformers 4 never omits a mask with a static cache.
    static_step = q_length == 1 and (window is None or window.left >= 0 or not aligned)
    combined = window is not None and not skip and not static_step and cache_position is None
    unmasked = attention_mask is None and documents is None and not combined
    if window is not None and unmasked and (aligned or window == Window(-1, -1)):
        return pack_window(window, device)

    own = torch.arange(q_length, device=device) + q_offset
    rows = Rows(own, own[None], kv_offset + kv_length, None if attention_mask is None else attention_mask.bool())
    interval = None
    if not combined and kind not in _SCATTERED_BLOCKS:
        if torch.compiler.is_compiling():
            interval = traced_interval(mask_function, rows, batch_size, use_vmap, local_size)
        else:
            interval = interval_of(mask_function, rows, use_vmap)
    if interval is None:
        return sdpa_mask(**stock_call, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    start = torch.zeros_like(own)[None] if interval.start is None else interval.start
    end = torch.full_like(own, rows.keys)[None] if interval.end is None else interval.end
    if documents is not None:  # the first document of this call continues one in the cache
        start = torch.maximum(start, torch.where(documents > 0, documents + q_offset, 0))
    # From here on, positions are relative to the first key of this layer's cache.
    start, end = (bound.clamp(kv_offset, kv_offset + kv_length) - kv_offset for bound in (start, end))
    if attention_mask is not None:
        missing = max(kv_offset + kv_length - attention_mask.shape[-1], 0)  # the empty part of a static cache
        attention_mask = F.pad(attention_mask.bool(), (0, missing))[:, kv_offset : kv_offset + kv_length]
    elif interval.sound is not None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    start, end = (bound.expand(batch_size, -1) for bound in (start, end))
    if attention_mask is None:
        return pack(KeyRanges(start.int(), end.int()))
    if interval.sound is None and (tokens := _range_of_tokens(attention_mask)) is not None:
        start, end = torch.maximum(start, tokens[0]), torch.minimum(end, tokens[1])
        return pack(KeyRanges(start.int(), end.int()))
    few = not isinstance(q_length, torch.SymInt) and q_length <= FEW_QUERIES  # torch.export allows no guard
    if few and not torch.is_grad_enabled() and interval.sound is None:
        return pack(KeyRanges(start.int(), end.int(), valid=attention_mask.int()))
    return pack(without_hidden_keys(start, end, attention_mask, interval.sound))


def _has_values(attention_mask: torch.Tensor) -> bool:
    """Whether the values of `attention_mask` may decide what runs: it is on the CPU, and no graph is traced, to which
    other masks will be passed. A TorchDispatchMode may be tracing one."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or functorch_is_active() or _count_modes():
        return False
    return attention_mask.device.type == "cpu" and not is_fake(attention_mask)


def _range_of_tokens(attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The first key that attention_mask (B, Sk) shows and the end of these keys, (B, 1) each, where they are one range.

    None where a sequence has padding between its tokens, or nobody looks; also for one key, whose mask attention may
    apply to all keys.
    """
    if not _has_values(attention_mask) or attention_mask.shape[1] == 1:
        return None
    first = attention_mask.int().argmax(1, keepdim=True)
    end = first + attention_mask.sum(1, keepdim=True)
    keys = torch.arange(attention_mask.shape[1])
    return (first, end) if torch.equal(attention_mask, (keys >= first) & (keys < end)) else None


def without_hidden_keys(
    start: torch.Tensor, end: torch.Tensor, attention_mask: torch.Tensor, sound: torch.Tensor | None
) -> KeyRanges:
    """Move the keys that attention_mask (B, Sk) hides behind all others: the new order, and the intervals in it."""
    B, Sk = attention_mask.shape
    shown = attention_mask.long().cumsum(1)  # (B, Sk)
    before = F.pad(shown, (1, 0))  # (B, Sk + 1): the number of keys shown before each key
    keys = torch.arange(Sk, device=attention_mask.device).expand(B, -1)
    place = torch.where(attention_mask, shown - 1, shown[:, -1:] + keys - shown)
    order = torch.empty_like(place).scatter_(1, place, torch.where(attention_mask, keys, -1 - keys))
    inverse = torch.where(attention_mask, place, -1 - place)
    flag = None if sound is None else sound.expand(B, Sk).int()
    return KeyRanges(before.gather(1, start).int(), before.gather(1, end).int(), order.int(), inverse.int(), sound=flag)
