"""Transformers' mask functions as intervals of visible keys, without an (S, S) matrix.

Transformers composes a mask from closures of its own functions with `and_masks` and `or_masks`. Each function makes one
interval of keys visible to a query, and so does the composition. A few operations on (B, Sq) compute the bounds. A
composition with any other function is unknown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import masking_utils
from transformers.masking_utils import and_masks, causal_mask_function

from llama_kernels.integrations.transformers.documents import document_starts, first_of_run

MaskFunction = Callable[..., torch.Tensor]

FULL_MASK = getattr(masking_utils, "bidirectional_mask_function", None)  # Transformers 4 has none
_AND = and_masks(causal_mask_function).__code__


class Interval(NamedTuple):
    """The keys start to end - 1 are visible to each query. Bounds are (1 or B, Sq); None: no bound on that side."""

    start: torch.Tensor | None = None
    end: torch.Tensor | None = None
    has_own: bool = True  # the key at the query's own position is visible
    sound: torch.Tensor | None = None  # (1 or B, 1) bool: False for a sequence whose mask is not intervals after all


class WindowSize(NamedTuple):
    """As the window_size of `attention`: visible to query i are the keys i + Sk - Sq - left to i + Sk - Sq + right.

    -1: no limit on that side.
    """

    left: int
    right: int


def starts_in_window(position_ids: torch.Tensor | None, window: WindowSize, Sq: int, Sk: int) -> torch.Tensor | None:
    """`document_starts` where a causal window alone says which of Sk keys each query sees; None where it does not."""
    return document_starts(position_ids, Sq) if window.right == 0 and Sq == Sk else None


class Rows(NamedTuple):
    """The positions of the queries of a mask. Positions count keys."""

    own: torch.Tensor  # (Sq,) int64
    at: torch.Tensor  # (1 or B, Sq): the positions given to the mask function; in packed documents they differ from own
    keys: int  # one past the position of the last key
    shown: torch.Tensor | None = None  # (B, keys) bool: the keys that are tokens, not padding


def window_of(mask_function: MaskFunction) -> WindowSize | None:
    """The window of a mask that depends on relative positions only, otherwise None. Reads no device memory."""
    if mask_function is FULL_MASK:
        return WindowSize(-1, -1)
    if mask_function is causal_mask_function:
        return WindowSize(-1, 0)
    if torch.compiler.is_compiling():
        return None  # a traced closure cannot be read
    name, parts = _parts_of(mask_function)
    if name == "sliding_window_overlay":
        return WindowSize(parts["sliding_window"] - 1, -1)
    if name == "sliding_window_bidirectional_overlay":
        return WindowSize(parts["sliding_window"], parts["sliding_window"])
    if name != "and_masks":
        return None
    windows = [window_of(part) for part in parts["mask_functions"]]
    if any(window is None for window in windows):
        return None
    left, right = ([side for side in sides if side >= 0] for sides in zip(*windows, strict=True))
    return WindowSize(min(left, default=-1), min(right, default=-1))


def interval_of(mask_function: MaskFunction, rows: Rows, made_by_caller: bool) -> Interval | None:
    """The interval of every query, or None if the composition is unknown.

    made_by_caller: the model or its user added functions to the composition.
    """
    name, parts = _parts_of(mask_function)
    at = rows.at
    if mask_function is causal_mask_function:
        return Interval(end=at + 1)
    if mask_function is FULL_MASK:
        return Interval()
    if name == "sliding_window_overlay":
        return Interval(start=at - parts["sliding_window"] + 1)
    if name == "sliding_window_bidirectional_overlay":
        return Interval(at - parts["sliding_window"], at + parts["sliding_window"] + 1)
    if name == "chunked_overlay":
        padding, size = parts["left_padding"][:, None], parts["chunk_size"]
        start = padding + (at - padding) // size * size
        return Interval(start, start + size)
    if name == "packed_sequence_mask_function" and not made_by_caller:  # then document numbers never decrease
        first, end = _runs(parts["packed_sequence_mask"])
        return Interval(first, end)
    if name == "remap_positions_for_packed_sequence":
        # Inside a document positions increase by one, so a distance in positions is a distance in keys.
        positions = parts["position_ids"]
        inner = interval_of(parts["mask_function"], rows._replace(at=positions), made_by_caller)
        if inner is None:
            return None
        moved = [None if b is None else rows.own + (b - positions) for b in (inner.start, inner.end)]
        whole = [b.ceil() if b is not None and b.is_floating_point() else b for b in moved]
        return inner._replace(start=whole[0], end=whole[1])
    if name == "blockwise_overlay":
        return _block_of(parts["block_sequence_ids"], rows)
    if name in ("and_masks", "or_masks"):
        return _combined(name, [interval_of(part, rows, made_by_caller) for part in parts["mask_functions"]])
    return None


def traced_interval(
    mask_function: MaskFunction, rows: Rows, batch_size: int, made_by_caller: bool, local_size: int | None
) -> Interval | None:
    """`interval_of` under torch.compile, where closures cannot be read: the mask function is called instead.

    local_size: the width of the window or chunk, as Transformers passes it. Without one, and if every key has a query,
    an interval ends where a token does not see the next one. Otherwise bisection finds both ends, starting from the
    query's own key, which is visible.
    """
    if mask_function is causal_mask_function:
        return Interval(end=rows.at + 1)
    if mask_function is FULL_MASK:
        return Interval()
    if made_by_caller or getattr(mask_function, "__code__", None) is not _AND:
        return None  # a union may have blocks, and calls do not show whether these are contiguous
    batch = torch.arange(batch_size, device=rows.own.device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=rows.own.device)
    if local_size is None and rows.keys == rows.own.shape[0]:
        own, end = rows.own[None], rows.keys - 1
        back = (own > 0) & mask_function(batch, head, own, (own - 1).clamp(min=0))
        ahead = (own < end) & mask_function(batch, head, own, (own + 1).clamp(max=end))
        first = first_of_run(~back, own)
        last = torch.where(ahead, end, own).flip(1).cummin(1).values.flip(1)
        return Interval(first, last + 1)
    own = rows.own[None].expand(batch_size, -1)
    unseen, first = torch.full_like(own, -1), own
    hidden, last = torch.full_like(own, rows.keys), own
    for _ in range(_steps(rows.keys)):
        middle = (unseen + first + 1) // 2
        seen = mask_function(batch, head, own, middle)
        first, unseen = torch.where(seen, middle, first), torch.where(seen, unseen, middle)
        middle = (hidden + last) // 2
        seen = mask_function(batch, head, own, middle)
        last, hidden = torch.where(seen, middle, last), torch.where(seen, hidden, middle)
    return Interval(first, last + 1)


def _steps(keys: int) -> int:
    """The bit length of `keys`: the steps of a bisection. Guards on a traced length depend on this number only."""
    if isinstance(keys, torch.SymInt):
        return 31  # torch.export allows no guard
    steps = 1
    while 2**steps <= keys:
        steps += 1
    return steps


def _parts_of(mask_function: MaskFunction) -> tuple[str, dict[str, Any]]:
    """The name of the function of masking_utils that made this closure, and its arguments; otherwise "" and {}."""
    name, _, inner = getattr(mask_function, "__qualname__", "").partition(".<locals>.")
    if getattr(mask_function, "__module__", None) != masking_utils.__name__ or not inner:
        return "", {}
    cells = mask_function.__closure__ or ()
    return name, dict(zip(mask_function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _combined(name: str, parts: list[Interval | None]) -> Interval | None:
    """The intersection of intervals, or the union of intervals that all contain the query's own key."""
    known = [part for part in parts if part is not None]
    union = name == "or_masks"
    if len(known) < len(parts) or (union and not all(part.has_own for part in known)):
        return None

    def bound(given: list[torch.Tensor | None], inner: Callable[..., Any], outer: Callable[..., Any]) -> Any:
        """The inner bound of an intersection, the outer bound of a union. None is the outermost."""
        there = [x for x in given if x is not None]
        if not there or (union and len(there) < len(given)):
            return None
        return functools.reduce(outer if union else inner, there)

    start = bound([part.start for part in known], torch.maximum, torch.minimum)
    end = bound([part.end for part in known], torch.minimum, torch.maximum)
    sound = [part.sound for part in known if part.sound is not None]
    return Interval(start, end, all(part.has_own for part in known), torch.stack(sound).all(0) if sound else None)


def _runs(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each element of each row, the first index of its run of equal numbers, and one past the last."""
    S = numbers.shape[1]
    places = torch.arange(S, device=numbers.device)
    first = first_of_run(numbers != numbers.roll(1, 1))
    end = torch.where(numbers != numbers.roll(-1, 1), places + 1, S).flip(1).cummin(1).values.flip(1)
    return first, end


def _block_of(numbers: torch.Tensor, rows: Rows) -> Interval:
    """Each query's block of mutually visible tokens, or its own key if it is in no block (number -1).

    A block must be contiguous: `sound` is False if its number occurs in two runs that both contain tokens, not only
    padding.
    """
    first, end = _runs(numbers)
    inside = numbers >= 0
    places = torch.arange(numbers.shape[1], device=numbers.device)
    begins = inside & (first == places)
    if rows.shown is not None:
        shown = F.pad(rows.shown, (0, max(numbers.shape[1] - rows.shown.shape[1], 0)))[:, : numbers.shape[1]]
        before = F.pad(shown.cumsum(1), (1, 0))
        begins &= before.gather(1, end) > before.gather(1, first)
    count = torch.zeros_like(numbers).scatter_add_(
        1, numbers.clamp(0, numbers.shape[1] - 1), begins.to(numbers.dtype)
    )  # blocks of each number
    at = rows.own.clamp(0, numbers.shape[1] - 1)
    first, end = (torch.where(inside, a, b)[:, at] for a, b in ((first, places), (end, places + 1)))
    return Interval(first, end, sound=(count <= 1).all(1, keepdim=True))
