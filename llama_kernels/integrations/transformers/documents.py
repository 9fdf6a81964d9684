"""Documents packed into rows of tokens: where each of them begins, by the position_ids of its tokens.

A single process and context parallelism have a rule each, `document_starts` and `strict_document_starts`.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch

FOLLOWS_MASK = "_llama_kernels_follows_mask"  # marks modules whose masks already separate packed documents
IGNORED = -100  # the label of a token without a loss, as in Transformers and F.cross_entropy

# --- where documents begin -------------------------------------------------------------------------------------------


def first_of_run(begins: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """For each token of each row, the place of the last token up to it that begins a run, or 0.

    begins: (B, S) bool. places: of the tokens, (S,) or (B, S), increasing; None: 0 to S - 1.
    """
    if places is None:
        places = torch.arange(begins.shape[1], device=begins.device)
    return torch.where(begins, places, 0).cummax(1).values


def document_starts(position_ids: torch.Tensor | None, Sq: int) -> torch.Tensor | None:
    """The first query of each query's document, (1 or B, Sq). A document begins where positions decrease.

    None: position_ids are not those of Sq > 1 queries. Positions that jump ahead, as behind padding, begin no document.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != Sq or Sq == 1:
        return None
    return first_of_run(position_ids < position_ids.roll(1, 1))  # column 0 has no effect: index 0 starts a document


def strict_document_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """The first token of each token's document, (1 or B, S). A document begins where positions do not grow by 1.

    For `llama_kernels.distributed.context_parallel`, which takes no padding.
    """
    return first_of_run(position_ids.diff(dim=1, prepend=position_ids[:, :1] - 2) != 1)


# --- the caller's position_ids ---------------------------------------------------------------------------------------


class _Call(threading.local):
    """The position_ids of the calls of patched models that are under way, each with the config of its masks.

    The innermost is the last. A model calls its submodels, and a hook may call another model.
    """

    def __init__(self) -> None:  # in each thread: torch.compile guards against an attribute that a call adds
        self.under_way: tuple[tuple[Any, torch.Tensor | None], ...] = ()


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
    _call.under_way = (*_call.under_way, (module.config, _of_text(given, module.config)))


def _of_text(position_ids: torch.Tensor | None, config: Any) -> torch.Tensor | None:
    """The first row of position_ids (rows, B, S) that has one row more than M-RoPE reads: it is for the mask."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    sections = rope.get("mrope_section")
    if position_ids is None or not sections or position_ids.ndim != 3 or position_ids.shape[0] != len(sections) + 1:
        return position_ids
    return position_ids[0]


def forget_position_ids(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook of patched models, which removes what `note_position_ids` stored for this call."""
    _call.under_way = _call.under_way[:-1]


def noted_document_starts(config: Any, Sq: int) -> torch.Tensor | None:
    """`document_starts` of the caller's position_ids, for a mask of `config` in the forward under way."""
    own, position_ids = _call.under_way[-1] if _call.under_way else (None, None)
    return document_starts(position_ids, Sq) if own is config else None
