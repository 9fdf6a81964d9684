"""`python -m examples.verify SNAPSHOT...`: compare steps of a training run, and single ops, with float64.

A snapshot is the configuration of a model, its weights and one batch. With `--device cpu`, the default without a GPU,
the kernels run in Triton's interpreter if TRITON_INTERPRET=1 is set, as the demo does. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/verify.py`

import torch

from examples.model import Config, Llama, Ops, ours, stock
from llama_kernels.diagnose import check

OPS = ["rope", "rms_norm", "add_rms_norm", "attention"]  # those of the model


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """The Frobenius norm of the error over that of the truth."""
    return ((x.double() - truth).norm() / truth.norm()).item()


def step(snapshot: dict[str, Any], ops: Ops, dtype: torch.dtype, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradient of every parameter."""
    model = Llama(Config(**snapshot["config"]), ops)
    model.load_state_dict(snapshot["weights"])
    model.to(device, dtype)
    loss = model.loss(snapshot["batch"].to(device))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def verify_step(path: str, device: str) -> dict[str, float]:
    """For stock torch and for our ops, in float32: the loss, and the largest relative error of a gradient."""
    snapshot = torch.load(path, weights_only=True)
    truth, true_grads = step(snapshot, stock, torch.float64, device)
    result: dict[str, float] = {"step": snapshot["step"], "loss_float64": truth}
    for name, ops in (("stock", stock), ("ours", ours)):
        loss, grads = step(snapshot, ops, torch.float32, device)
        result[f"loss_{name}"] = loss
        result[f"grad_error_{name}"] = max(relative_error(grads[p], true_grads[p]) for p in true_grads)
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("snapshots", nargs="*", metavar="SNAPSHOT", help="files that examples.demo wrote")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where everything runs (default here: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    rows = check.run(torch.device(args.device), OPS)  # as `python -m llama_kernels --check` does
    return {
        "steps": [verify_step(path, args.device) for path in args.snapshots],
        "ops": [{**row._asdict(), "passed": row.passed} for row in rows],
    }


if __name__ == "__main__":
    print(json.dumps(main()))
