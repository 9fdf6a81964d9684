"""Training with Lightning: the model is patched in configure_model, before Lightning moves or shards it.

python examples/lightning_fit.py --compare
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/lightning_fit.py`

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from examples import common, report, training
from examples.packing import corpus, select, unigram_loss
from llama_kernels.integrations.transformers import patch


class LanguageModel(lightning.LightningModule):
    """The loss of a causal language model on packed rows."""

    def __init__(self, model: Any, lr: float, patched: bool) -> None:
        super().__init__()
        self.model, self.lr, self.patched = model, lr, patched

    def configure_model(self) -> None:  # called again before validation: patching a patched model has no effect
        if self.patched:
            patch(self.model)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch, use_cache=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("validation loss", self.model(**batch, use_cache=False).loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)


class Record(lightning.Callback):
    """Records losses and times in `run`."""

    def __init__(self, run: report.Run, device: str) -> None:
        self.run, self.device = run, device

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = training.clock(self.device)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: dict[str, torch.Tensor], *_: Any) -> None:
        self.run.losses.append(outputs["loss"].item())
        self.run.seconds.append(training.clock(self.device) - self.started)


def main() -> int:
    args = common.parse(common.arguments(__doc__, '{"text": ...}', steps=60, batch=8, max_length=128, lr=3e-3))
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    tokenizer, rows, test = corpus(args)
    runs = []
    for name in common.run_names(args):
        run = report.Run(name)
        module = LanguageModel(
            common.load_model(AutoModelForCausalLM, args, tokenizer), args.lr, patched=name == "patched"
        )
        generator = torch.Generator().manual_seed(args.seed)
        train_set, test_set = ([select(part, i) for i in range(len(part["labels"]))] for part in (rows, test))
        trainer = lightning.Trainer(
            max_steps=args.steps, accelerator="cpu" if args.device == "cpu" else "gpu", devices=1,
            precision="bf16-mixed" if args.dtype == "bfloat16" else "32-true", gradient_clip_val=1.0,
            callbacks=[Record(run, args.device)], default_root_dir=args.out, logger=False,
            enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        with training.peak_memory(run, args.device):
            trainer.fit(module, DataLoader(train_set, args.batch, shuffle=True, generator=generator))
        (scores,) = trainer.validate(module, DataLoader(test_set, args.batch), verbose=False)
        run.metrics = {"validation loss": scores["validation loss"]}
        runs.append(run)
    if args.save:
        common.save(module.model, tokenizer, args.save)
    baseline = {"validation loss": unigram_loss(rows, test)}
    return report.write(args, "lightning_fit", runs, baseline, lambda axes: report.final_scores(axes, runs, baseline))


if __name__ == "__main__":
    sys.exit(main())
