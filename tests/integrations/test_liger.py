"""Liger-Kernel's loss in a model whose attention, norms and RoPE are ours: losses and gradients as in the stock model.

On a CPU both packages' kernels run in Triton's interpreter, which cannot run Liger's SwiGLU.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("liger_kernel", reason="needs liger-kernel")

from liger_kernel.transformers import _apply_liger_kernel_to_instance

from llama_kernels.integrations.transformers import patch, report, unpatch
from tests.integrations.checks import close
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


def loss_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = batch("llama").ids
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("order", [(apply_liger, patch), (patch, apply_liger)], ids=["Liger first", "Liger last"])
def test_ligers_loss_and_a_patch_work_in_either_order(order):
    theirs, truth = stock("llama"), stock("llama").double()
    model = stock("llama")
    for step in order:
        model = step(model)
    assert all(row.ours for row in report(model).rows)
    assert model.forward.__module__.startswith("liger_kernel")
    loss, gradients = loss_and_gradients(model)
    stock_loss, stock_gradients = loss_and_gradients(theirs)
    torch.testing.assert_close(loss, stock_loss)
    close(gradients, stock_gradients, loss_and_gradients(truth)[1])


def test_unpatch_keeps_ligers_loss():
    model = unpatch(patch(apply_liger(stock("llama"))))
    assert model.forward.__module__.startswith("liger_kernel")
    loss, gradients = loss_and_gradients(model)
    expected, stock_gradients = loss_and_gradients(stock("llama"))
    torch.testing.assert_close(loss, expected)
    close(gradients, stock_gradients, loss_and_gradients(stock("llama").double())[1])
