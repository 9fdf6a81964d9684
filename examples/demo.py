"""`make demo`: train a small Llama on the source of the standard library, with stock torch ops and with ours.

Both runs have the same weights at the start and the same batches. A third run, with stock torch, starts from weights
that are one float32 rounding larger. It shows by how much two correct runs differ, since training amplifies the last
bit. Without a GPU, our model trains on the reference path, and a few steps are repeated with the kernels in Triton's
interpreter.

The demo passes if three conditions hold. In each of these steps, the error of the kernels' gradients against float64 is
at most twice that of stock torch. The losses of our run differ from those of the stock run by at most ten times as much
as the losses of the third run do. Each op passes the check of `python -m llama_kernels --check`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/demo.py`

import torch
from rich.progress import MofNCompleteColumn, Progress

import llama_kernels as lk
from examples.demo_results import NEXT, console, finding, plot, show_verified
from examples.model import Config, Llama, Ops, ours, stock
from llama_kernels.core.language import why_not_interpreted

# --- data ------------------------------------------------------------------------------------------------------------


def standard_library() -> torch.Tensor:
    """The source of Python's standard library, as bytes: a few megabytes of text that every machine has."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def windows(text: torch.Tensor, batch: int, seq: int, seed: int) -> torch.Tensor:
    """Random windows of seq + 1 bytes, the same for the same seed: (batch, seq + 1)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - seq - 1, (batch, 1), generator=generator)
    return text[starts + torch.arange(seq + 1)].long()


# --- training --------------------------------------------------------------------------------------------------------


class Run:
    """A model in training, its losses, and the time and memory of its steps."""

    def __init__(self, name: str, ops: Ops, config: Config, steps: int, device: str) -> None:
        self.name, self.device = name, device
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak_bytes = 0
        torch.manual_seed(0)
        self.model = Llama(config, ops).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
        warmup = max(steps // 20, 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: min((i + 1) / warmup, max(1 - (i - warmup) / max(steps - warmup, 1), 0.02))
        )

    def step(self, tokens: torch.Tensor) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = self._clock()
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.model.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(self._clock() - started)
        if self.device == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated()

    def _clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def nudge(self) -> None:
        """Replace every weight by the next larger float32."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))

    @torch.no_grad()
    def validate(self, batches: Sequence[torch.Tensor]) -> float:
        return sum(self.model.loss(tokens).item() for tokens in batches) / len(batches)

    @torch.no_grad()
    def write(self, start: bytes, length: int) -> str:
        """Text after `start`, at temperature 0.7."""
        tokens = torch.tensor([list(start)], device=self.device)
        for _ in range(length):
            logits = self.model(tokens[:, -self.model.config.positions :])[:, -1].float()
            tokens = torch.cat((tokens, torch.multinomial(torch.softmax(logits / 0.7, -1), 1)), 1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


def train(runs: list[Run], text: torch.Tensor, args: argparse.Namespace, points: list[int], folder: str) -> None:
    """Train all runs on the same batches. In the steps `points`, save our model and two sequences of the batch."""
    ours = runs[1].model
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.steps)
        for i in range(args.steps):
            tokens = windows(text, args.batch, args.seq, args.seed * 1_000_003 + i)
            if i in points:
                weights = {name: x.detach().cpu().clone() for name, x in ours.state_dict().items()}
                snapshot = {"config": dataclasses.asdict(ours.config), "weights": weights, "batch": tokens[:2]}
                torch.save({**snapshot, "step": i}, Path(folder, f"{i}.pt"))
            for run in runs:
                run.step(tokens.to(args.device))
            losses = ", ".join(f"{run.name} {run.losses[-1]:.4f}" for run in runs[:2])
            progress.update(task, advance=1, description=f"loss: {losses}")


# --- verification ----------------------------------------------------------------------------------------------------


def verify(paths: list[Path], device: str) -> dict[str, Any]:
    """Run examples/verify.py in a new process, since Triton chooses the interpreter at its import."""
    env = {**os.environ, "TRITON_INTERPRET": "0" if device == "cuda" else "1"}
    command = [sys.executable, str(Path(__file__).with_name("verify.py")), "--device", device, *map(str, paths)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def claims(apart: dict[str, float], verified: dict[str, Any]) -> list[tuple[bool, str]]:
    """What the run has to show, and whether it does. apart: of each run, the largest distance to the stock losses."""
    found = [(apart["ours"] <= 10 * apart["nudged"], "our losses differ from stock's by what a rounding can cause")]
    if verified["steps"]:
        gradients_hold = all(s["grad_error_ours"] <= 2 * s["grad_error_stock"] for s in verified["steps"])
        found.append((gradients_hold, "the error of the kernels' gradients is at most twice that of stock torch"))
        found.append((all(o["passed"] for o in verified["ops"]), "each op passes the parity check"))
    return found


# --- the command -----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--steps", type=int, default=300, help="of training, of each side (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="sequences per step (default: 12; on a GPU 16)")
    parser.add_argument("--seq", type=int, help="bytes per sequence (default: 128; on a GPU 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the batches (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    args.batch = args.batch or (16 if args.device == "cuda" else 12)
    args.seq = args.seq or (1024 if args.device == "cuda" else 128)
    if min(args.steps, args.batch, args.seq) < 1:
        parser.error("--steps, --batch and --seq must be at least 1")
    return args


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    large = {"layers": 12, "width": 1024, "heads": 16, "kv_heads": 4, "hidden": 2816} if args.device == "cuda" else {}
    config = Config(positions=args.seq, **large)
    text = standard_library()
    held_out = len(text) // 20
    validation_set = windows(text[-held_out:], 8 * args.batch, args.seq, args.seed).to(args.device).split(args.batch)

    runs = [Run(name, ops, config, args.steps, args.device)
            for name, ops in (("stock", stock), ("ours", ours), ("nudged", stock))]  # fmt: skip
    stock_run, our_run, nudged = runs
    nudged.nudge()
    parameters = sum(p.numel() for p in our_run.model.parameters())
    console.print(f"{parameters / 1e6:.1f}M parameters, {config.heads} query and {config.kv_heads} key heads, "
                  f"{len(text) / 1e6:.1f} MB of Python, {args.steps} steps of {args.batch} x {args.seq} bytes "
                  f"on {args.device}")  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        points = sorted({round(share * (args.steps - 1)) for share in (0, 1 / 3, 2 / 3, 1)})

        train(runs, text[:-held_out], args, points, folder)
        where = "compiled" if args.device == "cuda" else "in Triton's interpreter"
        why_not = None if args.device == "cuda" else why_not_interpreted()
        verified: dict[str, Any] = {"steps": [], "ops": []}
        if not why_not:
            with console.status(f"repeating steps {', '.join(map(str, points))} with the kernels, {where}"):
                verified = verify([Path(folder, f"{i}.pt") for i in points], args.device)
            show_verified(verified, where)

    apart = {run.name: max(abs(a - b) for a, b in zip(run.losses, stock_run.losses, strict=True))
             for run in (our_run, nudged)}  # fmt: skip
    losses = {run.name: run.validate(validation_set) for run in runs}
    console.print("validation loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    console.print(f"largest distance to the stock curve: ours {apart['ours']:.1e}, nudged {apart['nudged']:.1e}")
    if args.device == "cuda":
        for run in (stock_run, our_run):
            median = sorted(run.seconds)[len(run.seconds) // 2]
            console.print(f"{run.name}: {median * 1e3:.1f} ms per step, peak memory {run.peak_bytes / 2**30:.2f} GiB")
    console.print("\ntext generated by our model:\n", style="bold")
    console.print(our_run.write(b"def ", 160), markup=False, highlight=False)

    plot(runs, verified, args.out / "demo.png")
    numbers = {
        "torch": torch.__version__, "llama_kernels": lk.__version__, "device": args.device, "parameters": parameters,
        "losses": {run.name: run.losses for run in runs}, "validation": losses, "apart": apart, **verified,
    }  # fmt: skip
    (args.out / "demo.json").write_text(json.dumps(numbers, indent=1) + "\n")

    if why_not:
        console.print(f"not checked: the kernels' gradients. There is no GPU, and {why_not}", markup=False)
    outcome = claims(apart, verified)
    for held, claim in outcome:
        console.print(f"{'holds' if held else 'FAILS'}: {claim}", style="green" if held else "red")
    console.print(finding(runs, verified), markup=False, highlight=False)
    console.print(f"{args.out / 'demo.png'}, {args.out / 'demo.json'}")
    console.print(NEXT, markup=False, highlight=False)
    return 0 if all(held for held, _ in outcome) else 1


if __name__ == "__main__":
    sys.exit(main())
