"""A mask as ranges of keys, and as the one 4-D int32 tensor in which Transformers passes it on to every layer.

What a packed mask is, its shape tells:

    (right + 2, left + 2, 0, 0)       a `WindowSize`
    (B, fields, 1, max(Sq, Sk))       `KeyRanges`; _FORMATS says which fields
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
# The fields of `KeyRanges` in a packed mask, in their order. There is one format for each number of fields.
#
# A mask with a prefix may reach a model that is not patched. Its eager attention adds the mask to the scores
# (B, H, Sq, Sk), which raises where H is another number than that of the fields. No model of Transformers has 23 heads.
_PREFIX = ("start", "end", *["prefix"] * 21)
_FORMATS = (
    ("start", "end"),
    ("start", "end", "valid"),
    ("start", "end", "order", "inverse"),
    ("start", "end", "order", "inverse", "sound"),
    _PREFIX,
)
_BY_NUMBER = {len(fields): fields for fields in _FORMATS}


def pack(ranges: KeyRanges) -> torch.Tensor:
    """The fields that are not None, each padded to one length: (B, fields, 1, max(Sq, Sk)) int32."""
    given = {name: field for name, field in ranges._asdict().items() if field is not None}
    length = max(field.shape[-1] for field in given.values())

    def padded(name: str) -> torch.Tensor:
        missing = length - given[name].shape[-1]
        return F.pad(given[name], (missing, 0) if name in _OF_QUERIES else (0, missing))

    fields = _PREFIX if ranges.prefix is not None else tuple(given)
    return torch.stack([padded(name) for name in fields], 1)[:, :, None]


def pack_window(window: WindowSize, device: torch.device | None) -> torch.Tensor:
    """An int32 tensor without elements. Its sizes encode the window, so reading it needs no device memory."""
    return torch.empty(window.right + 2, window.left + 2, 0, 0, dtype=torch.int32, device=device)


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
    return mask is not None and mask.dtype == torch.int32 and mask.shape[1] == len(_PREFIX) and mask.shape[2] == 1


def unpack(mask: torch.Tensor, Sq: int, Sk: int) -> KeyRanges | WindowSize:
    """The argument of `pack` or `pack_window`, for the last Sq of its queries and the first Sk of its keys."""
    if mask.shape[2] == 0:
        return WindowSize(mask.shape[1] - 2, mask.shape[0] - 2)
    fields = mask[:, :, 0].unbind(1)
    given = dict(zip(_BY_NUMBER[len(fields)], fields, strict=True))
    return KeyRanges(
        **{name: x[:, x.shape[1] - Sq :] if name in _OF_QUERIES else x[:, :Sk] for name, x in given.items()}
    )


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
