"""QLoRA: adapters on Linear layers that bitsandbytes has quantized to 4 bits. A patched model gives stock's results."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
pytest.importorskip("peft", reason="needs peft")

import bitsandbytes
import peft
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llama_kernels.integrations.transformers import patch, report
from tests.integrations.comparison import DoubleSoftmax, compare, logits_and_gradients, padding_mask
from tests.integrations.small import not_interpreted, small, tokens
from tests.support.environment import DEVICE

pytestmark = not_interpreted


def four_bit(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": DEVICE}, attn_implementation="eager", dtype=torch.float32
    )


def with_adapters(model: nn.Module) -> Any:
    """In training mode: otherwise bitsandbytes may multiply in bfloat16."""
    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False)).train()


def in_float64(model: nn.Module) -> Any:
    """A copy of `model` with the values of its 4-bit weights in ordinary layers."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            layer = nn.Linear(module.in_features, module.out_features, bias=False, device=DEVICE)
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            model.set_submodule(name, layer.requires_grad_(False))
    return model.double()


@pytest.mark.parametrize("order", ["patch first", "adapters first"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_of_a_4_bit_model_have_the_gradients_of_stock(family, order, tmp_path):
    small(family).save_pretrained(tmp_path)
    stock, ours = with_adapters(four_bit(tmp_path)), four_bit(tmp_path)
    ours = with_adapters(patch(ours)) if order == "patch first" else patch(with_adapters(ours))
    quantized = [m for m in ours.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 2 * 7
    assert all(row.ours for row in report(ours).rows)
    run = logits_and_gradients(tokens(), padding_mask(tokens(), "left"))
    results, theirs = run(ours), run(stock)
    adapters = {name for name in results if "lora_" in name}
    assert len(adapters) == 2 * 2 * 5 and {*results} == {*adapters, "logits"}
    with DoubleSoftmax():
        truth = run(in_float64(stock))
    compare(results, theirs, truth)
