"""Pretraining: a Llama learns source code byte by byte, documents packed without padding, on one process or many.

    python -m examples.pretrain
    torchrun --nproc-per-node 2 -m examples.pretrain --parallel fsdp2

Each row of a batch holds several documents; positions begin anew with each, and none sees another. The batch of a step
depends on the seed and the step alone: any number of processes computes the same losses, and so does a resumed run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

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
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from examples import training
from examples.training import Batch, Run

IGNORED = -100  # cross_entropy's: the first token of a document, which nothing foretells


# --- data ------------------------------------------------------------------------------------------------------------


def definitions() -> list[str]:
    """The top-level classes and functions of the standard library's plain modules."""
    sources = (source for _, source in training.standard_library())
    return [text for source in sources for text in re.split(r"\n(?=@|def |async def |class )", source) if text.strip()]


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> Batch:
    """Documents one after the other, cut into rows: input_ids, position_ids, labels (rows, length)."""
    ids, positions = [], []
    for document in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        document.append(tokenizer.eos_token_id)
        ids += document
        positions += range(len(document))
    rows = len(ids) // length
    if rows < 2:
        raise SystemExit(f"{len(ids)} tokens do not fill two rows of {length}: more --data, or a smaller --max-length")
    input_ids, position_ids = (torch.tensor(x[: rows * length]).view(rows, length) for x in (ids, positions))
    # A document cut in two goes on at the head of the next row, where its positions begin anew as well.
    position_ids -= torch.where(position_ids < torch.arange(length), 0, position_ids[:, :1])
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": input_ids.masked_fill(position_ids == 0, IGNORED),
    }


def byte_loss(train_rows: Batch, test_rows: Batch) -> float:
    """The loss of a model that knows how frequent each token is, and nothing else."""
    counts = torch.bincount(train_rows["input_ids"].flatten(), minlength=int(test_rows["input_ids"].max()) + 1)
    labels = test_rows["labels"][test_rows["labels"] != IGNORED]
    return -((counts + 1) / (counts + 1).sum()).log()[labels].mean().item()


# --- many processes --------------------------------------------------------------------------------------------------


class World:
    """This process among those that torchrun started, or alone."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if "RANK" in os.environ:
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        training.console.quiet = self.rank > 0

    def mine(self, rows: Batch) -> Batch:
        """This process's share of a batch."""
        return {name: x.chunk(self.size)[self.rank] for name, x in rows.items()}

    def sum(self, x: torch.Tensor) -> float:
        if dist.is_initialized():
            dist.all_reduce(x)
        return x.item()


def spread(model: PreTrainedModel, args: argparse.Namespace, world: World) -> torch.nn.Module:
    """A replica in each process, or each layer's weights in shards among them."""
    if not dist.is_initialized():
        return model
    if args.parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(args.device, (world.size,))
    low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if args.dtype == "bfloat16" else {}
    for module in (*model.base_model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**low))
    return model


def save_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, rank: int) -> None:
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        inner.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


class Checkpoints:
    """Weights, moments and losses, in shards; what two processes wrote can be read by one, and so on."""

    def __init__(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> None:
        self._folder, self._model, self._optimizer, self._run = folder, model, optimizer, run

    def _state(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self._model, self._optimizer)
        lists = {name: getattr(self._run, name) for name in ("losses", "seconds", "validation")}
        return {"model": weights, "optimizer": moments, **lists}

    def save(self) -> None:
        dcp.save(self._state(), checkpoint_id=self._folder / f"step-{len(self._run.losses):08}")

    def load_newest(self) -> None:
        finished = sorted(path.parent for path in self._folder.glob("step-*/.metadata"))
        if not finished:
            raise SystemExit(f"--resume: no checkpoint in {self._folder}")
        state = self._state()
        dcp.load(state, checkpoint_id=finished[-1])
        set_state_dict(self._model, self._optimizer, model_state_dict=state.pop("model"),
                       optim_state_dict=state.pop("optimizer"))  # fmt: skip
        for name, values in state.items():
            setattr(self._run, name, values)


# --- training --------------------------------------------------------------------------------------------------------


def loss_sum(model: torch.nn.Module, batch: Batch, args: argparse.Namespace, divisor: float) -> torch.Tensor:
    """The loss summed over the tokens, by `divisor`. FSDP2 rounds to bfloat16 by itself."""
    batch = {name: x.to(args.device) for name, x in batch.items()}
    with training.autocast(args, enabled=not (args.parallel == "fsdp2" and dist.is_initialized())):
        return model(**batch, num_items_in_batch=divisor).loss


def count(batch: Batch) -> int:
    """Tokens with a loss: those after the first of a row, less the first of each document."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


@torch.no_grad()
def validate(model: torch.nn.Module, rows: Batch, args: argparse.Namespace, world: World) -> float:
    """Mean loss over the tokens of `rows`; every process takes the same number of batches, as FSDP2 must."""
    model.eval()
    total = torch.zeros((), device=args.device)
    for i in range(0, len(rows["labels"]), args.batch):
        total += loss_sum(model, world.mine({name: x[i : i + args.batch] for name, x in rows.items()}), args, 1.0)
    model.train()
    return world.sum(total) / count(rows)


def pretrain(
    run: Run, args: argparse.Namespace, world: World, tokenizer: PreTrainedTokenizerFast, rows: Batch, test_rows: Batch
) -> None:
    model = training.load_model(args, AutoModelForCausalLM, tokenizer, layers=4)
    model = spread(training.prepare(model, run.name, args), args, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    checkpoints = Checkpoints(args.out / f"pretrain-{run.name}", model, optimizer, run)
    if args.resume:
        checkpoints.load_newest()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = len(run.losses)
    if begin >= args.steps:
        raise SystemExit(f"--resume: {begin} steps are done already; give more --steps")
    order = training.batches(list(range(len(rows["labels"]))), args.batch, args.seed)
    model.train()
    with training.bar() as progress:
        task = progress.add_task(run.name, total=args.steps, completed=begin)
        for i, chosen in enumerate(itertools.islice(order, begin, args.steps), begin):
            training.set_rate(optimizer, i, args)
            batch = {name: x[torch.tensor(chosen)] for name, x in rows.items()}
            started = training.clock(args.device)
            # Gradients are averaged over the processes: the sum over all tokens by their number, times the processes.
            loss = loss_sum(model, world.mine(batch), args, count(batch) / world.size)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.losses.append(world.sum(loss.detach() / world.size))
            run.seconds.append(training.clock(args.device) - started)
            if i + 1 == args.steps or (i + 1) % args.validate_every == 0:
                run.validation.append((i + 1, validate(model, test_rows, args, world)))
            if args.checkpoint_every and (i + 1) % args.checkpoint_every == 0:
                checkpoints.save()
            progress.update(task, advance=1, description=f"{run.name}: loss {run.losses[-1]:.4f}")
    run.metrics = {
        "validation loss": run.validation[-1][1],
        "tokens/s": rows["labels"].shape[1] * args.batch / run.step_ms * 1e3,
        "validation": run.validation,
    }
    if args.device == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated()
    if args.save:
        save_model(model, tokenizer, args.save, world.rank)


# --- the whole -------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = training.arguments(__doc__, "pretrain", '{"text": ...}', steps=100, batch=12, max_length=256, lr=3e-3)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp", help="under torchrun")
    parser.add_argument("--validate-every", type=training.positive, default=20, metavar="STEPS")
    parser.add_argument("--checkpoint-every", type=training.positive, metavar="STEPS", help="into --out")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint in --out")
    args = parser.parse_args()
    if args.batch % int(os.environ.get("WORLD_SIZE", 1)):
        parser.error(f"--batch {args.batch} does not divide among {os.environ['WORLD_SIZE']} processes")
    return args


def main() -> int:
    args = parse()
    for known in ("torch.distributed is disabled", "Detected an existing checkpoint"):  # one process; a second run
        warnings.filterwarnings("ignore", known)
    world = World(args)
    tokenizer = training.load_tokenizer(args, size=0)
    texts = [e["text"] for e in training.read_jsonl(args.data, text=str)] if args.data else definitions()
    shuffled = [texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed))]
    rows = pack(tokenizer, shuffled, args.max_length)
    held_out = args.batch * max(1, min(len(rows["labels"]) // 20, 64) // args.batch)  # whatever the number of processes
    if held_out >= len(rows["labels"]):
        raise SystemExit(f"{len(rows['labels'])} rows are less than two batches: more --data, or a smaller --batch")
    rows, test_rows = ({name: x[part] for name, x in rows.items()}
                       for part in (slice(held_out, None), slice(0, held_out)))  # fmt: skip
    training.console.print(f"{rows['labels'].numel():,} tokens in rows of {args.max_length}, {world.size} process(es)")

    runs = [Run(name) for name in training.names(args)]
    for run in runs:
        pretrain(run, args, world, tokenizer, rows, test_rows)

    def draw(axes: Any, runs: list[Run]) -> None:
        level = baseline["validation loss"]
        axes.axhline(level, color="#b0b0b0", lw=1, ls="--")
        axes.text(0.99, level, "how frequent each token is", color="#808080", ha="right", va="bottom",
                  transform=axes.get_yaxis_transform())  # fmt: skip
        for run, width in zip(runs, (5, 1.4) if len(runs) == 2 else (1.4,), strict=True):
            axes.plot(*zip(*run.validation, strict=True), marker="o", ms=2 * width, lw=width,
                      color=training.COLORS[run.name if len(runs) == 2 else "ours"],
                      label=f"{run.name}, {run.metrics['tokens/s']:,.0f} tokens/s")  # fmt: skip
        axes.set(xlabel="step", ylabel="validation loss", ylim=(0, 1.1 * level))
        axes.legend(frameon=False)

    baseline = {"validation loss": byte_loss(rows, test_rows)}
    status = training.finish(args, "pretrain", runs, baseline, draw) if world.rank == 0 else 0
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
