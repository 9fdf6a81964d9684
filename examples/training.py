"""Training with the Hugging Face Trainer, with TRL, or in a loop: settings, progress bar, and what a run records."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from examples import report
from examples.packing import Rows, draw_batch
from examples.report import Run
from llama_kernels.distributed import Layout, context_parallel


def clock(device: str) -> float:
    """The time in seconds, after all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def peak_memory(run: Run, device: str) -> Iterator[None]:
    """Record the largest allocation on the GPU inside the context in `run`."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    if device == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated()


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


def configure(config: Any, args: argparse.Namespace, **options: Any) -> Any:
    """TrainingArguments, or a config of TRL, of --steps steps of AdamW with warm-up and linear decay, and `options`."""
    configured = config(
        output_dir=str(args.out), max_steps=args.steps, seed=args.seed, use_cpu=args.device == "cpu",
        per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch,
        learning_rate=args.lr, warmup_steps=args.steps // 10, adam_beta2=0.95, weight_decay=0.01,
        bf16=args.dtype == "bfloat16", dataloader_pin_memory=args.device == "cuda",
        logging_steps=1, logging_nan_inf_filter=False, disable_tqdm=True,
        save_strategy="no", report_to="none", **options,
    )  # fmt: skip
    configured._n_gpu = min(configured.n_gpu, 1)  # one process, one GPU: not torch's DataParallel
    return configured


def fit(run: Run, trainer: Trainer, args: argparse.Namespace) -> None:
    """Train with a progress bar, and record losses, times and memory in `run`."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Record(run, args.device))
    with peak_memory(run, args.device):
        trainer.train()


def train(
    run: Run, model: Any, train_set: Any, args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerFast, **options: Any,
) -> Trainer:  # fmt: skip
    """Train with the Trainer. `options` are further arguments of it."""
    labels = ["labels"] if "labels" in train_set[0] else ["start_positions", "end_positions"]
    arguments = configure(TrainingArguments, args, label_names=labels, remove_unused_columns=False)
    trainer = Trainer(model, arguments, train_dataset=train_set, processing_class=tokenizer, **options)
    fit(run, trainer, args)
    return trainer


class ContextParallelTrainer(Trainer):
    """A Trainer of a patched model in which all processes share the tokens of every batch.

    Args:
        mesh: of all processes, of one dimension.
        method: as in `context_parallel`.
        options: as in Trainer. Batches have no padding and no attention_mask, and their length divides into as many
            parts as a Layout makes. average_tokens_across_devices is on, as by default.
    """

    def __init__(self, *args: Any, mesh: DeviceMesh, method: str = "ring", **options: Any) -> None:
        super().__init__(*args, **options)
        self._mesh, self._method = mesh, method

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The same batches in every process, where Trainer would give each process batches of its own."""
        data: Any = self.train_dataset
        order = RandomSampler(data, generator=torch.Generator().manual_seed(self.args.seed))
        return DataLoader(data, self.args.per_device_train_batch_size, sampler=order, collate_fn=self.data_collator)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Trainer counts the tokens of a batch once for each process, and multiplies the loss by their number, as DDP
        and FSDP2 average gradients."""
        ranks = self._mesh.size()
        layout = Layout(inputs["input_ids"].shape[1], ranks)
        with context_parallel(self.accelerator.unwrap_model(model), self._mesh, layout=layout, method=self._method):
            return super().training_step(model, inputs, num_items_in_batch / ranks) / ranks


def loop(run: Run, args: argparse.Namespace, step: Callable[[int], torch.Tensor]) -> None:
    """Call step(i), which trains on batch i and returns its loss, --steps times. `run` records losses and times."""
    with peak_memory(run, args.device), tqdm(range(args.steps), disable=report.console.quiet) as progress:
        for i in progress:
            started = clock(args.device)
            run.losses.append(step(i).item())
            run.seconds.append(clock(args.device) - started)
            progress.set_postfix_str(f"{run.name}: loss {run.losses[-1]:.4f}")


def on_rows(run: Run, args: argparse.Namespace, model: Any, rows: Rows, test: Rows, forward: Any = None) -> float:
    """Train `model` on random rows with AdamW, in plain PyTorch. Returns the loss on `test`.

    forward: is called in place of the model, such as its compiled form.
    """
    called = model if forward is None else forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def loss_of(batch: Rows) -> torch.Tensor:
        batch = {name: x.to(args.device) for name, x in batch.items()}
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return called(**batch, use_cache=False).loss

    def step(i: int) -> torch.Tensor:
        loss = loss_of(draw_batch(rows, args.batch, args.seed, i))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    loop(run, args, step)
    with torch.no_grad():
        return loss_of(test).item()
