"""Liger-Kernel's fused loss in a patched model: losses and gradients are those of the stock model.

On a CPU both packages' kernels run in Triton's interpreter, which cannot run Liger's SwiGLU.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("liger_kernel", reason="needs liger-kernel")

from liger_kernel.transformers import _apply_liger_kernel_to_instance

from llama_kernels.integrations.transformers import patch, report, unpatch
from tests.integrations.comparison import Results, compare, gradients
from tests.integrations.families import batch, stock
from tests.support.environment import DEVICE, INTERPRETED

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Liger's kernels need a GPU, or Triton's interpreter"
)


def apply_liger(model: torch.nn.Module) -> torch.nn.Module:
    """Liger's fused projection and loss; the operations that `patch` replaces stay as they are."""
    _apply_liger_kernel_to_instance(
        model=model, rope=False, rms_norm=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=True
    )
    return model


def loss_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, Results]:
    ids = batch("llama").ids
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def compare_with_stock(model: torch.nn.Module) -> None:
    loss, results = loss_and_gradients(model)
    stock_loss, stock_results = loss_and_gradients(stock("llama"))
    torch.testing.assert_close(loss, stock_loss)
    compare(results, stock_results, loss_and_gradients(stock("llama").double())[1])


@pytest.mark.parametrize("order", [(apply_liger, patch), (patch, apply_liger)], ids=["Liger first", "Liger last"])
def test_a_model_can_be_patched_before_or_after_ligers_loss(order):
    model = stock("llama")
    for step in order:
        model = step(model)
    assert all(row.ours for row in report(model).rows)
    assert model.forward.__module__.startswith("liger_kernel")
    compare_with_stock(model)


def test_unpatch_keeps_ligers_loss():
    model = unpatch(patch(apply_liger(stock("llama"))))
    assert model.forward.__module__.startswith("liger_kernel")
    compare_with_stock(model)
