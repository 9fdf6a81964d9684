"""A mask as ranges of keys, and as the one 4-D int32 tensor in which Transformers passes it on to every layer.

What a packed mask is, its shape tells:

    (right + 2, left + 2, 0, 0)       a `WindowSize`; 2^30 is added to the first size where position_ids do not count
    (B, planes, 1, max(Sq, Sk))       `KeyRanges`; _FORMATS says which fields
    (B, 1, 1, S)                      documents of tokens that are divided among processes

Model code may slice a 4-D mask to the last queries, [:, :, -n:], or to the first keys, [..., :Sk]. That leaves a packed
mask as it is: its dimension of queries has size 1 or 0, and its rows of queries are aligned at the right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from llama_kernels.integrations.transformers.intervals import WindowSize

# --- ranges ----------------------------------------------------------------------------------------------------------


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


# --- packing ---------------------------------------------------------------------------------------------------------

_OF_QUERIES = ("start", "end", "prefix")  # fields with an element for each query; the others have one for each key
# The fields of `KeyRanges` in a packed mask, in their order, by its number of planes. Planes beyond the fields repeat
# the first one.
#
# A packed mask may reach an attention module that is not ours: one that was put into a patched model, or a model that
# got the inputs of `share_prompts`. Eager attention adds its mask to the scores (B, H, Sq, Sk), which raises where H is
# another number than that of the planes. No model of Transformers has so many heads; many have 2, 3, 4 or 5.
_FORMATS = {
    11: ("start", "end"),
    13: ("start", "end", "valid"),
    17: ("start", "end", "order", "inverse"),
    19: ("start", "end", "order", "inverse", "sound"),
    23: ("start", "end", "prefix"),
}
_PLANES = {fields: planes for planes, fields in _FORMATS.items()}
_ONE_DOCUMENT = 2**30  # more than the width of a window


def pack(ranges: KeyRanges) -> torch.Tensor:
    """The fields that are not None, each padded to one length: (B, planes, 1, max(Sq, Sk)) int32.

    The bounds of one query are repeated, not padded. Stock code broadcasts the mask of one query to all queries of a
    layer, and some models make such masks.
    """
    given = {name: field for name, field in ranges._asdict().items() if field is not None}
    length = max(field.shape[-1] for field in given.values())

    def padded(name: str) -> torch.Tensor:
        size = given[name].shape[-1]
        if name not in _OF_QUERIES:
            return F.pad(given[name], (0, length - size))
        if isinstance(size, int) and size == 1:
            return given[name].expand(-1, length)
        return F.pad(given[name], (length - size, 0))

    planes = [padded(name) for name in given]
    planes += planes[:1] * (_PLANES[tuple(given)] - len(planes))
    return torch.stack(planes, 1)[:, :, None]


def pack_window(window: WindowSize, device: torch.device | None, one_document: bool = False) -> torch.Tensor:
    """An int32 tensor without elements. Its sizes encode the window, so reading it needs no device memory.

    one_document: whether all keys are of one document, whatever position_ids say.
    """
    right = window.right + (_ONE_DOCUMENT if one_document else 0)
    return torch.empty(right + 2, window.left + 2, 0, 0, dtype=torch.int32, device=device)


def pack_documents(starts: torch.Tensor) -> torch.Tensor:
    """Causal attention inside documents that begin at the global positions `starts` (B, S), for tokens that are divided
    among processes: (B, 1, 1, S) int32. `documents_of` is the inverse."""
    return starts.int()[:, None, None]


# --- unpacking -------------------------------------------------------------------------------------------------------


def documents_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The argument of `pack_documents`, or None where `mask` is not a result of it."""
    return mask[:, 0, 0] if mask is not None and mask.dtype == torch.int32 and mask.shape[1:3] == (1, 1) else None


def has_prefix(mask: torch.Tensor | None) -> bool:
    """Whether `mask` is that of completions which share a prompt."""
    return mask is not None and mask.dtype == torch.int32 and mask.shape[2] == 1 and "prefix" in _names_of(mask)


def is_packed(mask: torch.Tensor) -> bool:
    """Whether `mask` has the shape of a result of this file."""
    if mask.dtype != torch.int32 or mask.ndim != 4:
        return False
    return mask.shape[2] == 0 or (mask.shape[2] == 1 and (mask.shape[1] == 1 or bool(_names_of(mask))))


def is_one_document(mask: torch.Tensor) -> bool:
    """Whether `mask` is that of `pack_window` with one_document."""
    return mask.dtype == torch.int32 and mask.ndim == 4 and mask.shape[2] == 0 and mask.shape[0] > _ONE_DOCUMENT


def _names_of(mask: torch.Tensor) -> tuple[str, ...]:
    return _FORMATS.get(int(mask.shape[1]), ())  # in torch.jit.trace, a size is a tensor


def unpack(mask: torch.Tensor, Sq: int, Sk: int) -> KeyRanges | WindowSize:
    """The argument of `pack` or `pack_window`, for the last Sq of its queries and the first Sk of its keys."""
    if mask.shape[2] == 0:
        right = mask.shape[0] - 2 - (_ONE_DOCUMENT if is_one_document(mask) else 0)
        return WindowSize(mask.shape[1] - 2, right)
    names, length = _names_of(mask), mask.shape[3]
    given = dict(zip(names, mask[:, : len(names), 0].unbind(1), strict=True))
    for name, x in given.items():
        if name not in _OF_QUERIES:
            given[name] = x[:, :Sk]
        else:
            given[name] = x.expand(-1, Sq) if length == 1 else x[:, length - Sq :]
    return KeyRanges(**given)


def written_out(mask: torch.Tensor, Sq: int, Sk: int) -> torch.Tensor:
    """A packed mask as an ordinary one, (1 or B, 1, Sq, Sk) bool."""
    ranges = unpack(mask, Sq, Sk)
    keys = torch.arange(Sk, device=mask.device)
    if isinstance(ranges, WindowSize):
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
