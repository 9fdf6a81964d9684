"""LlamaKernelsCallback: the Hugging Face Trainer trains a patched model, with the losses of the stock model."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

from transformers import Trainer, TrainingArguments

from llama_kernels.integrations.trainer import LlamaKernelsCallback
from llama_kernels.integrations.transformers import report
from tests.integrations.small import VERSION, not_interpreted, small, tokens
from tests.support.environment import DEVICE

pytestmark = not_interpreted


@pytest.fixture
def trainer(tmp_path):
    """trainer(model=...): a Trainer of 3 steps in float32."""

    def make(callbacks: Any = (), liger: dict[str, bool] | None = None, **model: Any) -> Trainer:
        settings = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
            use_cpu=DEVICE == "cpu", report_to="none", save_strategy="no", disable_tqdm=True,
            use_liger_kernel=liger is not None, liger_kernel_config=liger,
        )  # fmt: skip
        settings._n_gpu = min(settings.n_gpu, 1)
        data = [{"input_ids": ids, "labels": ids} for ids in tokens(B=8)]
        return Trainer(args=settings, train_dataset=data, callbacks=list(callbacks), **model)

    return make


def losses(trainer: Trainer) -> torch.Tensor:
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("given", ["model", "model_init"])
def test_the_callback_patches_the_model_and_losses_are_those_of_stock(trainer, given):
    ours, stock = (
        trainer(callbacks, **{given: small() if given == "model" else lambda: small()})
        for callbacks in ([LlamaKernelsCallback()], [])
    )
    torch.testing.assert_close(losses(ours), losses(stock))
    assert ours.state.global_step == 3
    assert not any(row.ours for row in report(stock.model).rows)
    assert {row.ours for row in report(ours.model).rows} == {True}


def test_the_model_is_patched_before_training(trainer):
    """Trainers of TRL compute log-probabilities of a reference between their construction and training."""
    assert all(row.ours for row in report(trainer([LlamaKernelsCallback()], model=small()).model).rows)


def test_the_callback_takes_the_options_of_patch(trainer):
    rows = report(trainer([LlamaKernelsCallback(rms_norm=False)], model=small()).model).rows
    assert {row.kind: row.ours for row in rows} == {
        "attention": True, "rms_norm": False, "rope": True, "add_rms_norm": False
    }  # fmt: skip
    with pytest.raises(ValueError, match="of which this stays stock"):
        trainer([LlamaKernelsCallback(strict=True)], model=small("doge"))


@pytest.mark.skipif(VERSION < (5, 0), reason="this release of Liger-Kernel takes Transformers 5")
@pytest.mark.parametrize("kept", [True, False], ids=["ours are kept", "Liger's replace ours"])
def test_a_warning_names_norms_that_liger_replaced(trainer, kept, caplog, monkeypatch):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    import transformers.models.llama.modeling_llama as modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm"):  # Liger replaces these for all models: restored afterwards
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(Trainer, "_inner_training_loop", _begin_only)
    config = {"rope": not kept, "rms_norm": not kept, "swiglu": False, "fused_linear_cross_entropy": False}
    made = trainer([LlamaKernelsCallback()], liger=config, model=small())
    with caplog.at_level(logging.WARNING, "llama_kernels"):
        made.train()
    # Up to Transformers 5.2, the Trainer lets Liger-Kernel replace them before our patch, whose warning says so.
    warned = "Liger-Kernel's forwards run in LlamaRMSNorm" in caplog.text or "LigerRMSNorm.forward" in caplog.text
    assert warned is not kept


def _begin_only(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """The beginning of training: without a step, since Liger's kernels need a GPU."""
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
