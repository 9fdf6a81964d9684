"""Pretrain a patched Llama on source code in plain PyTorch, with packed documents, in one process or many.

    python -m examples.pretrain
    torchrun --nproc-per-node 2 -m examples.pretrain --parallel fsdp2
    torchrun --nproc-per-node 4 -m examples.pretrain --cp 2 --tp 2

Each process has some rows of a batch. With --cp (context parallelism) processes have some tokens of the same rows, and
with --tp (tensor parallelism) a part of each layer.

A row of a batch has several documents. Each starts at position 0, and none sees another. The batch of a step depends on
the seed and the step only, so the losses do not depend on the number of processes or on whether a run was resumed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/pretrain.py`

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from examples import common, parallel, report, training
from examples.packing import Rows, count, definitions, draw_batch, pack, select, unigram_loss
from examples.parallel import World

# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, rank: int) -> None:
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
        inner.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: report.Run) -> dict[str, Any]:
    """The contents of a checkpoint: tensors in shards, which any number of processes can load."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "losses": run.losses, "seconds": run.seconds,
            "validation": run.validation}  # fmt: skip


def resume(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: report.Run) -> None:
    finished = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    if not finished:
        raise SystemExit(f"--resume: no checkpoint in {folder}")
    loaded = state(model, optimizer, run)
    dcp.load(loaded, checkpoint_id=finished[-1])
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    run.losses, run.seconds, run.validation = (loaded[name] for name in ("losses", "seconds", "validation"))


# --- training --------------------------------------------------------------------------------------------------------


def set_rate(optimizer: torch.optim.Optimizer, step: int, args: argparse.Namespace) -> None:
    """Warm-up over a tenth of the steps, then linear decay."""
    warmup = max(args.steps // 10, 1)
    share = min((step + 1) / warmup, max(1 - (step - warmup) / max(args.steps - warmup, 1), 0.02))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * share


def loss_sum(model: torch.nn.Module, rows: Rows, args: argparse.Namespace, divisor: float) -> torch.Tensor:
    """The sum of the losses of this process's rows, of all their tokens with --cp too, divided by `divisor`."""
    autocast = args.dtype == "bfloat16" and not (args.parallel == "fsdp2" and dist.is_initialized())  # FSDP2 casts
    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=autocast):
        return model(**{name: x.to(args.device) for name, x in rows.items()}, num_items_in_batch=divisor).loss


@torch.no_grad()
def validate(model: torch.nn.Module, rows: Rows, args: argparse.Namespace, world: World) -> float:
    """The mean loss of the tokens of `rows`. Each process has the same number of batches, as FSDP2 requires."""
    model.eval()
    total = torch.zeros((), device=args.device)
    for i in range(0, len(rows["labels"]), args.batch):
        total += loss_sum(model, world.share(select(rows, slice(i, i + args.batch))), args, 1.0)
    model.train()
    return world.sum(total) / count(rows)


def pretrain(
    run: report.Run, model: Any, args: argparse.Namespace, world: World, tokenizer: PreTrainedTokenizerFast,
    rows: Rows, test: Rows,
) -> None:  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    checkpoints = args.out / f"pretrain-{run.name}"
    if args.resume:
        resume(checkpoints, model, optimizer, run)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = len(run.losses)
    if begin >= args.steps:
        raise SystemExit(f"--resume: {begin} steps are done already; give more --steps")
    model.train()
    progress = tqdm(range(begin, args.steps), initial=begin, total=args.steps, disable=world.rank > 0)
    for i in progress:
        set_rate(optimizer, i, args)
        batch = draw_batch(rows, args.batch, args.seed, i)
        started = training.clock(args.device)
        # DDP and FSDP2 average gradients over the processes that share the work, so each divides its sum of losses by
        # the mean number of tokens of such a process.
        loss = loss_sum(model, world.share(batch), args, count(batch) / world.sharing)
        loss.backward()
        parallel.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.losses.append(world.sum(loss.detach() / world.sharing))
        run.seconds.append(training.clock(args.device) - started)
        if i + 1 == args.steps or (i + 1) % args.validate_every == 0:
            run.validation.append((i + 1, validate(model, test, args, world)))
        if args.checkpoint_every and (i + 1) % args.checkpoint_every == 0:
            dcp.save(state(model, optimizer, run), checkpoint_id=checkpoints / f"step-{i + 1:08}")
        progress.set_postfix_str(f"{run.name}: loss {run.losses[-1]:.4f}")
    tokens = args.batch * rows["labels"].shape[1]
    run.metrics = {"validation loss": run.validation[-1][1], "tokens/s": tokens / run.step_ms * 1e3,
                   "validation": run.validation}  # fmt: skip
    if args.device == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated()
    if args.save:
        save_model(model, tokenizer, args.save, world.rank)


# --- the command -----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = common.arguments(__doc__, '{"text": ...}', steps=100, batch=12, max_length=256, lr=3e-3)
    parser.add_argument("--validate-every", type=common.positive, default=20, metavar="STEPS")
    parser.add_argument("--checkpoint-every", type=common.positive, metavar="STEPS", help="into --out")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint in --out")
    parallel.add_arguments(parser)
    args = common.parse(parser)
    parallel.check(parser, args)
    return args


def main() -> int:
    args = parse()
    for known in ("torch.distributed is disabled", "Detected an existing checkpoint"):  # one process; a second run
        warnings.filterwarnings("ignore", known)
    world = World(args)
    report.console.quiet = world.rank > 0
    tokenizer = common.load_tokenizer(args.model, size=0)
    if args.data:
        texts = common.shuffled([e["text"] for e in common.read_jsonl(args.data, {"text": str})], args.seed)
    else:
        texts = definitions(args.seed)
    rows = pack(tokenizer, texts, args.max_length)
    number = len(rows["labels"])
    held_out = args.batch * max(1, min(number // 20, 64) // args.batch)
    if held_out >= number:
        raise SystemExit(f"{number} rows are less than two batches: more --data, or a smaller --batch")
    rows, test = select(rows, slice(held_out, None)), select(rows, slice(held_out))
    report.console.print(f"{rows['labels'].numel():,} tokens in rows of {args.max_length}, {world.size} process(es)")

    runs = [report.Run(name) for name in common.run_names(args)]
    for run in runs:
        model: Any = common.load_model(AutoModelForCausalLM, args, tokenizer, layers=4)
        common.prepare(model, run.name, args)
        with world.divided_tokens(model):
            pretrain(run, world.distribute(model), args, world, tokenizer, rows, test)

    def draw(axes: Any) -> None:
        axes.axhline(baseline, color="#b0b0b0", lw=1, ls="--", label="baseline: the frequency of each token")
        for run in runs:
            width = 5 if run.name == "stock" and len(runs) == 2 else 1.4
            label = f"{run.name}, {run.metrics['tokens/s']:,.0f} tokens/s"
            axes.plot(*zip(*run.validation, strict=True), marker="o", ms=2 * width, lw=width,
                      color=report.COLORS[run.name], label=label)  # fmt: skip
        axes.set(xlabel="step", ylabel="validation loss", ylim=(0, 1.1 * baseline))
        axes.legend(frameon=False)

    baseline = unigram_loss(rows, test)
    status = report.write(args, "pretrain", runs, {"validation loss": baseline}, draw) if world.rank == 0 else 0
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
