"""Pretrain a patched Llama on source code in plain PyTorch, with packed documents, in one process or many.

    python -m examples.pretrain
    torchrun --nproc-per-node 2 -m examples.pretrain --parallel fsdp2
    torchrun --nproc-per-node 2 -m examples.pretrain --parallel cp

With ddp and fsdp2 each process has some rows of a batch, with cp (context parallelism) some tokens of every row.

A row of a batch has several documents. Each starts at position 0, and none sees another. The batch of a step depends on
the seed and the step only, so the losses do not depend on the number of processes or on whether a run was resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from examples import common, report, training
from examples.packing import Rows, count, definitions, draw_batch, pack, select, unigram_loss
from llama_kernels.distributed import Layout, context_parallel

# --- many processes --------------------------------------------------------------------------------------------------


class World:
    """The number of processes that torchrun started, and the rank of this one. Without torchrun there is one."""

    def __init__(self, device: str) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if "RANK" in os.environ:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        report.console.quiet = self.rank > 0

    def share(self, rows: Rows, parallel: str) -> Rows:
        """The rows of a batch for this process. With cp all have all: context_parallel divides the tokens."""
        return rows if parallel == "cp" else {name: x.chunk(self.size)[self.rank] for name, x in rows.items()}

    def sum(self, x: torch.Tensor) -> float:
        if dist.is_initialized():
            dist.all_reduce(x)
        return x.item()


def distribute(model: Any, args: argparse.Namespace, world: World) -> torch.nn.Module:
    """DDP keeps a replica in each process. FSDP2 shards the weights of each layer over the processes."""
    if not dist.is_initialized() or args.parallel == "cp":
        return model
    if args.parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(args.device, (world.size,))
    policy = MixedPrecisionPolicy()
    if args.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.base_model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def divided_tokens(model: Any, args: argparse.Namespace, world: World) -> contextlib.AbstractContextManager[None]:
    """With cp, the context in which each process computes some tokens of every row."""
    if not dist.is_initialized() or args.parallel != "cp":
        return contextlib.nullcontext()
    mesh = init_device_mesh(args.device, (world.size,))
    return context_parallel(model, mesh, layout=Layout(args.max_length, world.size))


def sum_gradients(model: torch.nn.Module) -> None:
    """With cp, a process has the gradients of its tokens."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


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
    """The sum of the tokens' losses, divided by `divisor`: of this process's rows, or with cp of the whole batch."""
    autocast = args.dtype == "bfloat16" and not (args.parallel == "fsdp2" and dist.is_initialized())  # FSDP2 casts
    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=autocast):
        return model(**{name: x.to(args.device) for name, x in rows.items()}, num_items_in_batch=divisor).loss


@torch.no_grad()
def validate(model: torch.nn.Module, rows: Rows, args: argparse.Namespace, world: World) -> float:
    """The mean loss of the tokens of `rows`. Each process has the same number of batches, as FSDP2 requires."""
    model.eval()
    total = torch.zeros((), device=args.device)
    for i in range(0, len(rows["labels"]), args.batch):
        total += loss_sum(model, world.share(select(rows, slice(i, i + args.batch)), args.parallel), args, 1.0)
    model.train()
    return world.sum(total) / count(rows) / (world.size if args.parallel == "cp" else 1)


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
        # DDP and FSDP2 average gradients over the processes, so each divides its sum by the mean number of tokens of a
        # process. With cp each has the loss of the whole batch.
        divisor = count(batch) / (1 if args.parallel == "cp" else world.size)
        loss = loss_sum(model, world.share(batch, args.parallel), args, divisor)
        loss.backward()
        if args.parallel == "cp" and dist.is_initialized():
            sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.losses.append(world.sum(loss.detach() / world.size))
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
    parser.add_argument("--parallel", choices=("ddp", "fsdp2", "cp"), default="ddp", help="under torchrun")
    parser.add_argument("--validate-every", type=common.positive, default=20, metavar="STEPS")
    parser.add_argument("--checkpoint-every", type=common.positive, metavar="STEPS", help="into --out")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint in --out")
    args = common.parse(parser)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.parallel == "cp":
        if args.max_length % (2 * processes):
            parser.error(
                f"--max-length {args.max_length} does not divide into 2 x {processes} chunks for --parallel cp"
            )
        if args.stock or args.compare:
            parser.error("--parallel cp is of patched models: leave out --stock and --compare")
    elif args.batch % processes:
        parser.error(f"--batch {args.batch} does not divide among {processes} processes")
    return args


def main() -> int:
    args = parse()
    for known in ("torch.distributed is disabled", "Detected an existing checkpoint"):  # one process; a second run
        warnings.filterwarnings("ignore", known)
    world = World(args.device)
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
        with divided_tokens(model, args, world):
            pretrain(run, distribute(model, args, world), args, world, tokenizer, rows, test)

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
