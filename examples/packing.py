"""Documents packed into rows of tokens without padding, for examples.pretrain and examples.generate."""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from examples import common

Rows = dict[str, torch.Tensor]  # input_ids, position_ids, labels (rows, length)


def definitions(seed: int = 0, most: int = 600) -> list[str]:
    """Top-level classes and functions of the modules of the standard library: at most `most`, shuffled."""
    sources = (source for _, source in common.standard_library("*.py"))
    texts = [text for source in sources for text in re.split(r"\n(?=@|def |async def |class )", source) if text.strip()]
    return common.shuffled(texts, seed)[:most]


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> Rows:
    """Join the documents and cut them into rows of `length` tokens."""
    ids: list[int] = []
    positions: list[int] = []
    for document in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [*document, tokenizer.eos_token_id]
        positions += range(len(document) + 1)
    rows = len(ids) // length
    if rows < 2:
        raise SystemExit(f"{len(ids)} tokens do not fill two rows of {length}: more --data, or a smaller --max-length")
    input_ids, position_ids = (torch.tensor(x[: rows * length]).view(rows, length) for x in (ids, positions))
    # A document that is cut continues in the next row with positions from 0.
    position_ids -= torch.where(position_ids < torch.arange(length), 0, position_ids[:, :1])
    labels = input_ids.masked_fill(position_ids == 0, common.IGNORED)  # no token predicts the first of a document
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def corpus(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Rows, Rows]:
    """The tokenizer, rows to train on, and a batch to test on: from --data, or from the standard library."""
    texts = common.read_texts(args.data, args.seed) or definitions(args.seed)
    tokenizer = common.load_tokenizer(args.model, texts, size=1024)
    rows = pack(tokenizer, texts, args.max_length)
    if (number := len(rows["labels"])) <= args.batch:
        raise SystemExit(f"{number} rows are less than two batches: more --data, or a smaller --batch")
    return tokenizer, select(rows, slice(args.batch, None)), select(rows, slice(args.batch))


def select(rows: Rows, index: Any) -> Rows:
    return {name: x[index] for name, x in rows.items()}


def draw_batch(rows: Rows, size: int, seed: int, step: int) -> Rows:
    """Random rows that depend on seed and step only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return select(rows, torch.randint(len(rows["labels"]), (size,), generator=generator))


def count(rows: Rows) -> int:
    """The number of tokens with a loss: all but the first of each row and of each document."""
    return int((rows["labels"][:, 1:] != common.IGNORED).sum())


def unigram_loss(train_rows: Rows, test_rows: Rows) -> float:
    """The loss of a model that predicts each token with its frequency."""
    counts = torch.bincount(train_rows["input_ids"].flatten(), minlength=int(test_rows["input_ids"].max()) + 1)
    labels = test_rows["labels"][test_rows["labels"] != common.IGNORED]
    return -((counts + 1) / (counts + 1).sum()).log()[labels].mean().item()
