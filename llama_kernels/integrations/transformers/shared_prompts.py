"""Batches in which several completions share one prompt, without repeating it: for GRPO, DPO and best-of-n scoring.

A row is the prompt without its last token, then a segment for each completion: the prompt's last token, and the
completion. Each token sees the tokens before it in its own segment, and the prompt. So a segment's first logits, those
of the prompt's last token, predict the first token of the completion, and the usual loss, which shifts labels by one,
is that of the batch with repeated prompts. Only the last token of each prompt is repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from llama_kernels.core.checks import message
from llama_kernels.integrations.transformers.documents import IGNORED
from llama_kernels.integrations.transformers.packed_masks import KeyRanges, pack

__all__ = ["SharedPromptCollator", "SharedPrompts", "share_prompts"]

Tokens = Sequence[int]


class SharedPrompts(NamedTuple):
    """A batch of `share_prompts`, of B prompts in rows of S tokens."""

    inputs: dict[str, torch.Tensor]  # of the model: input_ids, position_ids, attention_mask, labels
    completion: torch.Tensor  # (B, S) int64: the completion that each label belongs to, or -1


class _Row(NamedTuple):
    """One prompt and its completions. Each list has an entry for each token."""

    ids: list[int]
    positions: list[int]
    labels: list[int]
    completion: list[int]
    start: list[int]  # the first token of the segment
    prefix: list[int]  # how many first tokens are visible besides

    def padded(self, length: int, pad_token_id: int) -> _Row:
        """Padding sees itself alone, and no other token sees it."""
        here = len(self.ids)
        more = length - here
        fill: tuple[list[int], ...] = (
            [pad_token_id] * more, [0] * more, [IGNORED] * more, [-1] * more, list(range(here, length)), [0] * more
        )  # fmt: skip
        return _Row(*(line + rest for line, rest in zip(self, fill, strict=True)))


def share_prompts(
    prompts: Sequence[Tokens],
    completions: Sequence[Sequence[Tokens]],
    *,
    pad_token_id: int = 0,
    device: torch.device | str | None = None,
) -> SharedPrompts:
    """One row for each prompt, with all its completions.

    `model(**batch.inputs)`, with a model that `patch` changed, gives the logits of each completion after its own
    prompt, and the mean loss over the tokens of all completions. The layers of the model must attend to all earlier
    tokens: a sliding window, attention in chunks and recurrent layers raise. Stock attention raises too, since it
    cannot read this attention_mask.

    Args:
        prompts: the token ids of B prompts, of at least one token each.
        completions: of each prompt, the token ids of its completions, which may differ in number and in length.
        pad_token_id: fills the rows up to the longest.
        device: of the tensors.

    Returns:
        The model's inputs, each (B, S) but for attention_mask, and the completion of each label. The log-probability of
        completion g of row b is the sum, over the tokens t with completion[b, t] == g, of that of input_ids[b, t] by
        the logits of token t - 1.

    Raises:
        ValueError: there is no prompt, a prompt is empty or has no completion, or there is not one list of completions
            for each prompt.
    """
    op = "share_prompts"
    if not len(prompts):
        raise ValueError(message(op, "prompts", "empty", "at least one prompt"))
    if len(prompts) != len(completions):
        wanted = f"{len(prompts)} lists, one for each prompt"
        raise ValueError(message(op, "completions", f"{len(completions)} lists", wanted))
    for b, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt):
            raise ValueError(message(op, f"prompts[{b}]", "no token", "at least one token"))
        if not len(group):
            raise ValueError(message(op, f"completions[{b}]", "no completion", "at least one completion"))
    rows = [_row(list(prompt), group) for prompt, group in zip(prompts, completions, strict=True)]
    length = max(len(row.ids) for row in rows)
    padded = zip(*(row.padded(length, pad_token_id) for row in rows), strict=True)
    ids, positions, labels, completion, start, prefix = (torch.tensor(lines, device=device) for lines in padded)
    end = torch.arange(1, length + 1, device=device).expand_as(ids)
    mask = pack(KeyRanges(start.int(), end.int(), prefix=prefix.int()))
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": labels}
    return SharedPrompts(inputs, completion)


def _row(prompt: list[int], completions: Iterable[Tokens]) -> _Row:
    shared = len(prompt) - 1
    row = _Row(prompt[:-1], list(range(shared)), [IGNORED] * shared, [-1] * shared, [0] * shared, [0] * shared)
    for g, tokens in enumerate(completions):
        first, count = len(row.ids), len(tokens) + 1
        segment: tuple[list[int], ...] = (
            [prompt[-1], *tokens], list(range(shared, shared + count)), [IGNORED, *tokens], [-1] + [g] * len(tokens),
            [first] * count, [shared] * count,
        )  # fmt: skip
        for line, more in zip(row, segment, strict=True):
            line += more
    return row


class SharedPromptCollator:
    """A data_collator for Hugging Face's Trainer: examples with `prompt` and `completions` become shared rows.

    Use TrainingArguments(remove_unused_columns=False), so that the Trainer keeps these columns.

    Args:
        pad_token_id: as in `share_prompts`.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """examples: `prompt` is a list of token ids, `completions` a list of such lists. Returns the model's inputs.

        Raises:
            KeyError: an example has no `prompt` or no `completions`.
            ValueError: as `share_prompts`.
        """
        prompts, completions = ([example[name] for example in examples] for name in ("prompt", "completions"))
        return share_prompts(prompts, completions, pad_token_id=self.pad_token_id).inputs
