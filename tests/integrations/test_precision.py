"""Precisions of a patched model: half precision, norms in float32, and quantized weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llama_kernels.integrations.transformers import patch, unpatch
from tests.integrations.comparison import (
    DoubleSoftmax,
    compare_with_stock,
    logits_and_gradients,
    logits_of,
    padding_mask,
)
from tests.integrations.small import Calls, families, not_interpreted, patched, small, tokens
from tests.support.environment import DEVICE
from tests.support.judge import relative_error

pytestmark = not_interpreted


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@families
def test_the_error_in_half_precision_is_at_most_that_of_stock(family, precision):
    ids = tokens(2, 40)
    run = logits_and_gradients(ids, padding_mask(ids, "left"))
    model = small(family)
    if precision == "bfloat16":
        model.bfloat16()
    with DoubleSoftmax():
        exact = run(copy.deepcopy(model).double())["logits"]
    errors = []
    for changed in (model, patched(model)):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast"):
            results = run(changed)
        assert all(x.isfinite().all() for x in results.values())
        errors.append(relative_error(results["logits"], exact))
    assert errors[1] <= 1.1 * errors[0]


def with_float32_norms(model: nn.Module) -> nn.Module:
    model.bfloat16()
    for name, module in model.named_modules():
        if name.rpartition(".")[2].endswith("norm"):
            module.float()
    return model


def test_float32_norms_of_a_bfloat16_llama_return_float32_as_in_stock():
    """The next projection then raises, in both models."""
    for model in (with_float32_norms(small()), patch(with_float32_norms(small()))):
        with pytest.raises(RuntimeError, match="dtype"):
            model(tokens())


def test_float32_norms_of_a_bfloat16_gemma_are_replaced():
    """They cast their result to the dtype of the activations."""
    stock = with_float32_norms(small("gemma2"))
    ours = patched(stock)
    with Calls() as calls, torch.no_grad():
        logits = ours(tokens(), use_cache=False).logits
    assert "rms_norm_forward" in calls.ours()
    with DoubleSoftmax():
        exact = copy.deepcopy(stock).double()(tokens(), use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, exact) <= 1.1 * relative_error(stock(tokens(), use_cache=False).logits, exact)


def test_linear_layers_quantized_by_torch_work():
    ids, model = tokens().cpu(), patch(small()).cpu()
    with pytest.warns(DeprecationWarning):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    stock = unpatch(copy.deepcopy(quantized))
    with torch.no_grad():
        a, b = (m(ids).logits for m in (quantized, stock))
    plain = small().cpu()(ids).logits
    # Rounding to int8 turns some differences of float32's last bit into larger ones.
    assert relative_error(a, b) <= 0.1 * relative_error(b, plain)


def test_linear_layers_quantized_by_torchao_work():
    quantization = pytest.importorskip("torchao.quantization")
    stock = small()
    quantization.quantize_(stock, quantization.Int8WeightOnlyConfig())
    compare_with_stock(patched(stock), stock, logits_of(tokens()))
