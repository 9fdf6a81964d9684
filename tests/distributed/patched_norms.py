"""Norms of Transformers that `patch` changed, on DTensors: what the processes of test_patched_norms.py run."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_kernels.integrations.transformers import modules, patch
from tests.distributed.processes import here, mesh_of

B, S, N = 2, 5, 16  # two processes have 3 and 2 of the tokens
NORMS = {"Llama": LlamaRMSNorm, "Gemma 3": Gemma3RMSNorm}  # Gemma's weight is an offset from 1
WHOLE = Replicate()
# Placements of the input and of the weight; whether the op computes the norm.
PLACEMENTS: dict[str, tuple[Placement, Placement, bool]] = {
    "a part of the batch": (Shard(0), WHOLE, True),
    "a part of the tokens": (Shard(1), WHOLE, True),
    "all rows": (WHOLE, WHOLE, True),
    "a part of each row": (Shard(2), WHOLE, False),
    "a part of the weight": (Shard(1), Shard(0), False),
    "a sum": (Partial(), WHOLE, False),
}


def _results(norm: torch.nn.Module, x: torch.Tensor, placements: tuple[Placement, Placement]) -> list[torch.Tensor]:
    """The result, and the gradients of the input and of the weight; each whole."""
    mesh = mesh_of()
    norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [placements[1]]))
    if isinstance(placements[0], Partial):
        x = DTensor.from_local(x / dist.get_world_size(), mesh, [placements[0]]).requires_grad_()
    else:
        x = distribute_tensor(x, mesh, [placements[0]]).requires_grad_()
    y = norm(x)
    results = [y, *torch.autograd.grad((y * y).sum(), (x, norm.weight))]
    return [result.full_tensor() for result in results]


def compared_with_stock(name: str, placement: str) -> dict[str, Any]:
    """The largest difference of the results, as a part of the largest number; calls of the op; what was logged."""
    *placements, _ = PLACEMENTS[placement]
    generator = torch.Generator().manual_seed(0)
    x, weight = (here(torch.randn(shape, generator=generator)) for shape in ((B, S, N), (N,)))
    norms = [NORMS[name](N).to(x) for _ in range(2)]
    for norm in norms:
        norm.weight.data.copy_(weight)
    model = torch.nn.Sequential(norms[1])
    patch(model)
    modules._warn_of_placements.cache_clear()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    modules.logger.addHandler(handler)
    expected = _results(norms[0], x, tuple(placements))
    with mock.patch.object(modules, "rms_norm", wraps=modules.rms_norm) as rms_norm:
        found = _results(model[0], x, tuple(placements))
    modules.logger.removeHandler(handler)
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
    return {"error": max(errors), "ours": rms_norm.call_count, "log": [record.getMessage() for record in records]}
