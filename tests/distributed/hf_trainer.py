"""Runs of the Hugging Face Trainer: what the processes of test_trainer.py run."""

from __future__ import annotations

import os
import tempfile
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import RandomSampler
from transformers import TrainingArguments

from examples.training import ContextParallelTrainer
from llama_kernels.integrations.trainer import LlamaKernelsCallback
from llama_kernels.integrations.transformers import patch, report
from llama_kernels.integrations.transformers.documents import IGNORED
from tests.distributed.processes import device, mesh_of
from tests.integrations.families import stock

STEPS, ROWS, TOKENS, LABELLED = 4, 4, 32, 20


def _trainer(kind: Any, settings: dict[str, Any], **options: Any) -> Any:
    """A trainer of this kind. Rows have other numbers of labels, so that means of means differ."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (STEPS * ROWS, TOKENS), generator=generator)
    labels = [row.where(torch.arange(TOKENS) >= i % LABELLED, IGNORED) for i, row in enumerate(ids)]
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=STEPS, use_cpu=device().type == "cpu", logging_steps=1, learning_rate=1e-3,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=7,
        **{"per_device_train_batch_size": ROWS, **settings},
    )  # fmt: skip
    return kind(args=arguments, train_dataset=data, **options)


def _train(trainer: Any) -> list[tuple[float, float]]:
    """(loss, norm of the gradients) of each step."""
    trainer.train()
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


class _SameOrder(transformers.Trainer):
    """With the batches of ContextParallelTrainer."""

    get_train_dataloader = ContextParallelTrainer.get_train_dataloader


def alone(dtype: torch.dtype) -> list[tuple[float, float]]:
    return _train(_trainer(_SameOrder, {}, model=stock("llama").to(dtype)))


def context_parallel(method: str) -> list[tuple[float, float]]:
    return _train(_trainer(ContextParallelTrainer, {}, model=patch(stock("llama")), mesh=mesh_of(), method=method))


# --- data parallel ---------------------------------------------------------------------------------------------------


class _SameBatches(transformers.Trainer):
    """With the batches of ContextParallelTrainer, whose rows are divided among the processes."""

    def _get_train_sampler(self, *_: Any) -> list[int]:
        return list(RandomSampler(self.train_dataset, generator=torch.Generator().manual_seed(self.args.seed)))


class _FSDPOnTheCpu(AcceleratorState):  # type: ignore[misc]  # accelerate counts as Any
    """Without accelerate's rule that processes on the CPU run DDP, whatever is asked for."""

    def __init__(self, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **options)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def data_parallel(kind: str, given: str) -> list[tuple[float, float]]:
    """The callback patches what the Trainer was given, a "model" or a "model_init", under "DDP" or "FSDP2"."""
    model = {"model": stock("llama")} if given == "model" else {"model_init": lambda: stock("llama")}
    settings: dict[str, Any] = {"per_device_train_batch_size": ROWS // dist.get_world_size()}
    state = AcceleratorState
    if kind == "FSDP2":
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        settings |= {"fsdp": True, "fsdp_config": config}
        state = _FSDPOnTheCpu
    AcceleratorState._reset_state()  # accelerate keeps that of the first Accelerator
    with mock.patch.dict(os.environ), mock.patch("accelerate.accelerator.AcceleratorState", state):
        trainer = _trainer(_SameBatches, settings, callbacks=[LlamaKernelsCallback()], **model)
        found = _train(trainer)
    AcceleratorState._reset_state()
    wrapper = {"DDP": DistributedDataParallel, "FSDP2": FSDPModule}[kind]
    assert isinstance(trainer.model_wrapped, wrapper), f"a {type(trainer.model_wrapped).__name__}"
    assert {row.ours for row in report(trainer.model).rows} == {True}, report(trainer.model)
    return found
