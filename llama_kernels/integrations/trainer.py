"""A callback that patches the model of a Hugging Face Trainer, or of a trainer of TRL, before training."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from llama_kernels.integrations.transformers import patch  # before transformers: it checks that one is installed
from llama_kernels.integrations.transformers.modules import Patched, parts_of

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # isort: skip

logger = logging.getLogger(__name__)


class LlamaKernelsCallback(TrainerCallback):  # type: ignore[misc]  # Transformers counts as Any
    """Patches the model of a trainer: `Trainer(..., callbacks=[LlamaKernelsCallback()])`.

    `patch` runs at the end of the trainer's construction: after adapters are added, and before the model is
    distributed or compiled. A model from `model_init` is made again when training begins, and patched before the first
    step, when FSDP2 may have sharded it already. A model that is patched already stays as it is.

    A reference model, as DPO has one, is not the trainer's model. Patch it before you pass it.

    With `use_liger_kernel=True`, Liger-Kernel replaces RMSNorm after `patch`, unless the trainer's
    `liger_kernel_config` is `{"rope": False, "rms_norm": False}`. A warning says so.

    Args:
        attention, rms_norm, rope, fuse, strict: those of `patch`.

    Raises:
        ValueError: nothing in the model can be replaced, or, with `strict`, not everything.
    """

    def __init__(
        self,
        *,
        attention: bool = True,
        rms_norm: bool = True,
        rope: bool = True,
        fuse: bool = True,
        strict: bool = False,
    ) -> None:
        self._options = {"attention": attention, "rms_norm": rms_norm, "rope": rope, "fuse": fuse, "strict": strict}
        self._model: nn.Module | None = None  # the one that was patched

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        self._patch(trainer["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        model = trainer["model"]
        if model is not self._model:
            self._patch(model)
        if names := _replaced_by_liger(model):
            logger.warning(
                "llama_kernels: Liger-Kernel's forwards run in %s instead of ours. To keep ours, pass "
                'liger_kernel_config={"rope": False, "rms_norm": False} beside use_liger_kernel=True.',
                ", ".join(names),
            )

    def _patch(self, model: nn.Module) -> None:
        patch(model, **self._options)
        self._model = model


def _replaced_by_liger(model: nn.Module) -> list[str]:
    """The stock classes of patched modules whose forward Liger-Kernel set on the instance afterwards."""
    return sorted(
        {
            parts_of(module)[1].__name__
            for module in model.modules()
            if isinstance(module, Patched)
            and getattr(vars(module).get("forward"), "__module__", "").startswith("liger_kernel.")
        }
    )
