"""Runs of the Hugging Face Trainer: what the processes of test_trainer.py run."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from examples.training import ContextParallelTrainer
from llama_kernels.integrations.transformers import patch
from llama_kernels.integrations.transformers.documents import IGNORED
from tests.distributed.processes import mesh_of
from tests.integrations.families import stock

STEPS, ROWS, TOKENS, LABELLED = 4, 4, 32, 20


def _train(kind: Any, model: torch.nn.Module, **options: Any) -> list[tuple[float, float]]:
    """(loss, norm of the gradients) of each step. Rows have other numbers of labels, so that means of means differ."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (STEPS * ROWS, TOKENS), generator=generator)
    labels = [row.where(torch.arange(TOKENS) >= i % LABELLED, IGNORED) for i, row in enumerate(ids)]
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    settings = TrainingArguments(
        tempfile.mkdtemp(), max_steps=STEPS, per_device_train_batch_size=ROWS, use_cpu=True, logging_steps=1,
        learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True, seed=7,
    )  # fmt: skip
    trainer = kind(model, settings, train_dataset=data, **options)
    trainer.train()
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


class _SameOrder(transformers.Trainer):
    """With the batches of ContextParallelTrainer."""

    get_train_dataloader = ContextParallelTrainer.get_train_dataloader


def alone() -> list[tuple[float, float]]:
    return _train(_SameOrder, stock("llama"))


def context_parallel(method: str) -> list[tuple[float, float]]:
    return _train(ContextParallelTrainer, patch(stock("llama")), mesh=mesh_of(), method=method)
