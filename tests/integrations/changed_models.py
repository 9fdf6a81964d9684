"""Models that another library changes before or after `patch`, and their comparison with the stock model."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn

from llama_kernels.integrations.transformers import patch, report
from tests.integrations.checks import CHECKS
from tests.integrations.families import batch
from tests.integrations.tensor_parallel import check_results, whole
from tests.support.environment import DEVICE, INTERPRETED

on_cpu = [
    pytest.mark.skipif(INTERPRETED, reason="runs on the reference path; compiled kernels have other tests"),
    pytest.mark.skipif(DEVICE == "cuda", reason="processes meet over gloo, and weights move between CPU and disk"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]
# With two norms in a layer; with norms of heads; with four norms in a layer and weights 1 + w; with sinks in attention.
families = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
orders = pytest.mark.parametrize("order", ["patch first", "patch last"])


def changed(change, model: nn.Module, order: str) -> nn.Module:
    """`model` after `patch` and `change`, in one order or the other."""
    return change(patch(model)) if order == "patch first" else patch(change(model))


def replaced(model: nn.Module) -> set[str]:
    """The kinds of operations that are replaced in at least one module."""
    return {row.kind for row in report(model).rows if row.ours}


def compare_with_stock(family: str, model: nn.Module, check: str = "left") -> None:
    """Run one of CHECKS: by default, compare logits and gradients for a batch with padding on the left."""
    results = whole(CHECKS[check](model, batch(family)))
    check_results(family, {name.removeprefix("module."): x for name, x in results.items()}, check)
