"""Training with the Hugging Face Trainer: its settings, and a record of the loss and time of each step."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from examples.report import Run


def clock(device: str) -> float:
    """The time in seconds, after all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Record(ProgressCallback):
    """The Trainer's progress bar with the loss. Records the loss and seconds of each step in `run`."""

    def __init__(self, run: Run, device: str) -> None:
        super().__init__()
        self._run, self._device, self._started = run, device, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = clock(self._device)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.seconds.append(clock(self._device) - self._started)
        super().on_step_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self._run.losses.append(logs["loss"])
            self.training_bar.set_postfix_str(f"{self._run.name}: loss {logs['loss']:.4f}")


def train(
    run: Run, model: Any, train_set: Any, args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerFast, **options: Any,
) -> Trainer:  # fmt: skip
    """Train for --steps steps of AdamW with warm-up and linear decay. `options` are further arguments of Trainer."""
    settings = TrainingArguments(
        output_dir=str(args.out), max_steps=args.steps, seed=args.seed, use_cpu=args.device == "cpu",
        per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch,
        learning_rate=args.lr, warmup_steps=args.steps // 10, adam_beta2=0.95, weight_decay=0.01,
        bf16=args.dtype == "bfloat16", dataloader_pin_memory=args.device == "cuda",
        label_names=["labels"] if "labels" in train_set[0] else ["start_positions", "end_positions"],
        remove_unused_columns=False, logging_steps=1, logging_nan_inf_filter=False, disable_tqdm=True,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    settings._n_gpu = min(settings.n_gpu, 1)  # one process, one GPU: not torch's DataParallel
    trainer = Trainer(model, settings, train_dataset=train_set, processing_class=tokenizer,
                      callbacks=[_Record(run, args.device)], **options)  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    if args.device == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated()
    return trainer
