"""Patched Hugging Face models under context_parallel: what the processes of test_models.py run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from llama_kernels.distributed import Layout, context_parallel
from llama_kernels.integrations.transformers import patch
from tests.integrations.families import stock

TOKENS = 32
DOCUMENTS = ((0, 9, 10, 21), (0, 14))  # where those of the two sequences begin


def batch(packed: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    if not packed:
        return {"input_ids": ids, "labels": ids}
    positions = torch.arange(TOKENS).repeat(2, 1)
    for row, starts in zip(positions, DOCUMENTS, strict=True):
        for start in starts:
            row[start:] = torch.arange(TOKENS - start)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def loss_and_gradients(model: torch.nn.Module, packed: bool) -> dict[str, torch.Tensor]:
    loss = model(**batch(packed), use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def errors(family: str, method: str, packed: bool, checkpointing: bool) -> dict[str, Any]:
    """Relative errors of the loss and of all gradients together, against the stock model in float64; those of the
    stock model in float32; and the number of tokens of the logits."""
    truth = loss_and_gradients(stock(family).double(), packed)
    alone = loss_and_gradients(stock(family), packed)
    model = patch(stock(family))
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with context_parallel(model, mesh, layout=Layout(TOKENS, mesh.size()), method=method):
        with torch.no_grad():
            tokens = model(**batch(packed)).logits.shape[1]
        found = loss_and_gradients(model, packed)
    for name, gradient in found.items():
        if name != "loss":
            dist.all_reduce(gradient)

    def error(results: dict[str, torch.Tensor]) -> tuple[float, float]:
        assert results.keys() == truth.keys()
        names = [name for name in truth if name != "loss"]
        off, size = (
            torch.stack([x.double().norm() for x in tensors]).norm()
            for tensors in ([results[n] - truth[n] for n in names], [truth[n] for n in names])
        )
        return abs(results["loss"] / truth["loss"] - 1).item(), (off / size).item()

    return {"found": error(found), "stock": error(alone), "tokens": tokens}
