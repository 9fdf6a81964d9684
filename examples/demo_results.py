"""The results of `make demo`: tables, a picture, and what the picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

console = Console()


def show_verified(verified: dict[str, Any], where: str) -> None:
    steps = Table("step", "stock loss", "kernels' loss", "stock", "kernels")
    steps.title = f"steps in float32, kernels {where}: loss, and the worst gradient's relative error"
    for s in verified["steps"]:
        steps.add_row(str(s["step"]), *(f"{s[name]:.6f}" for name in ("loss_stock", "loss_ours")),
                      *(f"{s[name]:.2e}" for name in ("grad_error_stock", "grad_error_ours")))  # fmt: skip
    ops = Table("op", "dtype", "result or gradient", "plain torch", "kernel")
    ops.title = f"op by op, kernels {where}: relative error against float64"
    for o in verified["ops"]:
        errors = ("" if error is None else f"{error:.2e}" for error in (o["eager"], o["error"]))
        ops.add_row(o["call"], o["dtype"], o["nearest"], *errors, style=None if o["passed"] else "red")
    console.print(steps, ops)


def plot(runs: list[Any], verified: dict[str, Any], path: Path) -> None:
    stock_run, our_run, nudged = runs
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.plot(stock_run.losses, color="#9ec5e8", lw=5, solid_capstyle="round", label="stock torch")
    top.plot(our_run.losses, color="#1b3a5c", lw=1.1, label="llama_kernels")
    top.set(ylabel="training loss (nats a byte)", title="A Llama learns Python from the standard library")
    top.legend(frameon=False)
    floor = 1e-8  # where two losses are the same float32
    for run, color, label in ((nudged, "#b8b8b8", "stock torch, weights one rounding away"),
                              (our_run, "#1b3a5c", "llama_kernels")):  # fmt: skip
        apart = [max(abs(a - b), floor) for a, b in zip(run.losses, stock_run.losses, strict=True)]
        below.semilogy(apart, color=color, lw=1.1, label=label)
    steps = [s["step"] for s in verified["steps"]]
    kernels = [abs(s["loss_ours"] - s["loss_stock"]) for s in verified["steps"]]
    below.semilogy(steps, [max(d, floor) for d in kernels], "o", ms=7, mfc="none", color="#c8452d", clip_on=False,
                   label="the kernels themselves, on two sequences of the step")  # fmt: skip
    below.set(xlabel="step", ylabel="distance to stock torch", ylim=(floor / 2, 1e-2))
    below.legend(frameon=False, loc="upper left")
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def finding(runs: list[Any], verified: dict[str, Any]) -> str:
    """What the picture shows, in words."""
    stock_run, our_run, _ = runs
    first, last = our_run.losses[0], our_run.losses[-1]
    apart = max(abs(a - b) for a, b in zip(our_run.losses, stock_run.losses, strict=True))
    text = (
        f"\nThe picture: both losses fall from {first:.2f} to {last:.2f} in {len(our_run.losses)} steps, and are never "
        f"more than {apart:.0e} apart."
    )
    if verified["steps"]:
        kernels = max(abs(step["loss_ours"] - step["loss_stock"]) for step in verified["steps"])
        text += (
            f" In the steps that the kernels repeated, their loss is at most {kernels:.0e} from that of stock torch."
        )
    return text


NEXT = """
Next:
  python -m llama_kernels                       what runs on this machine, and why
  python examples/finetune.py --help            fine-tune a Hugging Face model; examples/README.md has TRL and others
  patch(model)                                  of llama_kernels.integrations.transformers, in your own script"""
