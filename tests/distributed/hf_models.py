"""Patched Hugging Face models under context_parallel: what the processes of test_models.py run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from llama_kernels.distributed import Layout, balanced_layout, context_parallel
from llama_kernels.integrations.transformers import patch
from tests.distributed.comparison import Found, errors, found
from tests.distributed.processes import here, mesh_of
from tests.integrations.families import stock

TOKENS = 32
DOCUMENTS = ((0, 9, 10, 21), (0, 14))  # where those of the two sequences begin


def batch(packed: bool) -> dict[str, torch.Tensor]:
    ids = here(torch.randint(3, 90, (2, TOKENS), generator=torch.Generator().manual_seed(2)))
    if not packed:
        return {"input_ids": ids, "labels": ids}
    positions = here(torch.arange(TOKENS).repeat(2, 1))
    for row, starts in zip(positions, DOCUMENTS, strict=True):
        for start in starts:
            row[start:] = torch.arange(TOKENS - start)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def loss_and_gradients(model: torch.nn.Module, packed: bool) -> Found:
    loss = model(**batch(packed), use_cache=False).loss
    loss.backward()
    return found(model, loss)


def layout_for(packed: bool, ranks: int) -> Layout:
    if not packed:
        return Layout(TOKENS, ranks)
    doc_start = torch.arange(TOKENS) - batch(packed)["position_ids"].cpu()
    return balanced_layout(doc_start.int(), ranks, chunk=4)


def errors_and_tokens(family: str, method: str, packed: bool, checkpointing: bool) -> dict[str, Any]:
    """The errors of the loss and of the gradients, and the number of tokens of the logits."""
    truth = loss_and_gradients(stock(family).double(), packed)
    alone = loss_and_gradients(stock(family), packed)
    model = patch(stock(family))
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    mesh = mesh_of()
    with context_parallel(model, mesh, layout=layout_for(packed, mesh.size()), method=method):
        with torch.no_grad():
            tokens = model(**batch(packed)).logits.shape[1]
        results = loss_and_gradients(model, packed)
    for gradient in results.gradients.values():
        dist.all_reduce(gradient)
    return {**errors(results, alone, truth), "tokens": tokens}
