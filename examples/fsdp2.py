"""FSDP2 through Accelerate, in a training loop of your own: patch first, then prepare shards the model.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --compare
    python examples/fsdp2.py                                    # one process

Accelerate shards models on GPUs only: on a CPU the processes run DDP. --batch is of all processes together.
`pretrain.py` has FSDP2 without Accelerate, context parallelism and checkpoints.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/fsdp2.py`

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM

from examples import common, report, training
from examples.packing import Rows, corpus, count, draw_batch, unigram_loss
from llama_kernels.integrations.transformers import patch


def accelerator_of(args: argparse.Namespace) -> Accelerator:
    if "RANK" not in os.environ:  # not under torchrun
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        os.environ.update(alone)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", activation_checkpointing=args.checkpointing
    )
    precision = "bf16" if args.dtype == "bfloat16" else "no"
    return Accelerator(cpu=args.device == "cpu", fsdp_plugin=plugin, mixed_precision=precision)


def train(
    run: report.Run, args: argparse.Namespace, accelerator: Accelerator, tokenizer: Any, rows: Rows, test: Rows
) -> Any:
    model: Any = common.load_model(AutoModelForCausalLM, args, tokenizer)
    if run.name == "patched":
        patch(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank, processes = accelerator.process_index, accelerator.num_processes

    def share(batch: Rows) -> torch.Tensor:
        """This process's part of the loss of the batch. Their mean is the loss, since FSDP2 averages gradients."""
        tokens = count(batch) / processes
        batch = {name: x.chunk(processes)[rank].to(args.device) for name, x in batch.items()}
        return model(**batch, use_cache=False, num_items_in_batch=tokens).loss

    def step(i: int) -> torch.Tensor:
        loss = share(draw_batch(rows, args.batch, args.seed, i))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return accelerator.reduce(loss.detach(), "mean")

    training.loop(run, args, step)
    with torch.no_grad():
        run.metrics = {"validation loss": accelerator.reduce(share(test), "mean").item()}
    return model


def main() -> int:
    args = common.parse(common.arguments(__doc__, '{"text": ...}', steps=60, batch=8, max_length=128, lr=3e-3))
    accelerator = accelerator_of(args)
    first = accelerator.is_main_process
    report.console.quiet = not first
    if args.batch % accelerator.num_processes:
        raise SystemExit(f"--batch {args.batch} does not divide among {accelerator.num_processes} processes")
    tokenizer, rows, test = corpus(args)
    runs = [report.Run(name) for name in common.run_names(args)]
    for run in runs:
        model = train(run, args, accelerator, tokenizer, rows, test)
    if args.save:
        weights = accelerator.get_state_dict(model)  # gathered
        plain: Any = accelerator.unwrap_model(model)
        plain.save_pretrained(args.save, state_dict=weights, is_main_process=first)
        if first:
            tokenizer.save_pretrained(args.save)
    baseline = {"validation loss": unigram_loss(rows, test)}
    status = 0
    if first:
        status = report.write(args, "fsdp2", runs, baseline, lambda axes: report.final_scores(axes, runs, baseline))
    accelerator.end_training()
    return status


if __name__ == "__main__":
    sys.exit(main())
