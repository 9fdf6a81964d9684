"""`python -m examples.verify SNAPSHOT...`: steps of a training run, and each op, compared with float64.

A snapshot is a model's configuration, its weights and one batch. With `--device cpu`, the default without a GPU, the
kernels run in Triton's interpreter if TRITON_INTERPRET=1 is set, as the demo does. Prints one JSON object.
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
from torch.nn import functional as F

import llama_kernels as lk
from examples.model import Config, Llama, Ops, ours, stock


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """The Frobenius norm of the error over that of the truth."""
    return ((x.double() - truth).norm() / truth.norm()).item()


# --- a training step -------------------------------------------------------------------------------------------------


def step(snapshot: dict[str, Any], ops: Ops, dtype: torch.dtype, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and the gradient of every parameter."""
    model = Llama(Config(**snapshot["config"]), ops)
    model.load_state_dict(snapshot["weights"])
    model.to(device, dtype)
    loss = model.loss(snapshot["batch"].to(device))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def verify_step(path: str, device: str) -> dict[str, float]:
    snapshot = torch.load(path, weights_only=True)
    truth, true_grads = step(snapshot, stock, torch.float64, device)
    result: dict[str, float] = {"step": snapshot["step"], "loss_float64": truth}
    for name, ops in (("stock", stock), ("ours", ours)):
        loss, grads = step(snapshot, ops, torch.float32, device)
        result[f"loss_{name}"] = loss
        result[f"grad_error_{name}"] = max(relative_error(grads[p], true_grads[p]) for p in grads)
    return result


# --- op by op --------------------------------------------------------------------------------------------------------


def plain_norm(x, weight):
    """As modelling code has it: float32 inside, rounded before the weight."""
    return weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def plain_attention(q, k, v):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    S = q.shape[2]
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    return F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def ops_to_compare(device: str) -> dict[str, tuple[Any, Any, Any, list[torch.Tensor]]]:
    """name: (ours, plain PyTorch, reference, inputs)."""
    cos, sin = (t.to(device) for t in lk.rope_tables(lk.rope_frequencies(64)[0], 64))
    q, k, v = (torch.randn(1, H, 64, 64, device=device) for H in (4, 2, 2))
    x, residual = (torch.randn(128, 256, device=device) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(256, device=device)

    def plain_rope(q, k):
        return stock.rotate(q, k, cos.to(q.dtype), sin.to(q.dtype))

    def plain_add(x, r, w):
        return plain_norm(x + r, w), x + r

    return {
        "rope": (lambda q, k: lk.rope(q, k, cos, sin), plain_rope,
                 lambda q, k: lk.reference.rope(q, k, cos, sin), [q, k]),
        "rms_norm": (lk.rms_norm, plain_norm, lk.reference.rms_norm, [x, weight]),
        "add_rms_norm": (lk.add_rms_norm, plain_add, lk.reference.add_rms_norm, [x, residual, weight]),
        "attention": (lk.attention, plain_attention, lk.reference.attention, [q, k, v]),
    }  # fmt: skip


def verify_op(ours, plain, reference, inputs: list[torch.Tensor], dtype: torch.dtype) -> dict[str, float]:
    """The worst relative error among the outputs, and among the gradients."""
    inputs = [x.to(dtype) for x in inputs]

    def run(function, dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        outs = function(*leaves)
        outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
        generator = torch.Generator(outs[0].device).manual_seed(1)
        upstream = [
            torch.randn(o.shape, generator=generator, device=o.device).to(inputs[0].dtype).to(dtype) for o in outs
        ]
        return outs, list(torch.autograd.grad(outs, leaves, upstream))

    truth = run(reference, torch.float64)
    result = {}
    for name, function in (("ours", ours), ("plain", plain)):
        for what, values, true in zip(("forward", "backward"), run(function, dtype), truth, strict=True):
            result[f"{what}_{name}"] = max(map(relative_error, values, true))
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("snapshots", nargs="*", metavar="SNAPSHOT", help="files that examples.demo wrote")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where everything runs (default here: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    torch.manual_seed(0)
    compared = ops_to_compare(args.device)
    return {
        "steps": [verify_step(path, args.device) for path in args.snapshots],
        "ops": [
            {"op": name, "dtype": str(dtype)[6:], **verify_op(*compared[name], dtype)}
            for name in compared
            for dtype in (torch.bfloat16, torch.float32)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(main()))
