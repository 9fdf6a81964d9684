"""Training a patched model: adapters, gradient checkpointing, dropout and loss curves are those of the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llama_kernels.integrations.transformers import patch, report, unpatch
from tests.integrations.comparison import (
    DropoutInFloat32,
    Results,
    compare_with_stock,
    logits_and_gradients,
    logits_of,
    padding_mask,
)
from tests.integrations.small import families, not_interpreted, patched, small, tokens
from tests.support.environment import DEVICE

pytestmark = not_interpreted

# --- PEFT ------------------------------------------------------------------------------------------------------------

when_patched = pytest.mark.parametrize("when", ["before", "after"])


def with_adapter(config: Any, when: str | None) -> nn.Module:
    """A small Llama with an adapter of PEFT, patched before or after PEFT changes it, or not at all."""
    import peft

    model = small()
    model = patch(model) if when == "before" else model
    torch.manual_seed(2)
    model = peft.get_peft_model(model, config).to(DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return patch(model) if when == "after" else model


@when_patched
def test_lora_trains_and_merges(when):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, init_lora_weights=False)
    run = logits_and_gradients(tokens(), padding_mask(tokens(), "right"))
    stock, ours = with_adapter(config, None), with_adapter(config, when)
    assert any("lora" in name for name in run(ours))
    compare_with_stock(ours, stock, run)
    merged = ours.merge_and_unload()
    assert {row.ours for row in report(merged).rows} == {True}
    compare_with_stock(merged, stock, logits_of(tokens()))
    compare_with_stock(unpatch(merged), stock, logits_of(tokens()))


@when_patched
def test_norms_wrapped_by_layer_norm_tuning_train(when):
    peft = pytest.importorskip("peft")
    norms = ["input_layernorm", "post_attention_layernorm", "norm"]
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=norms)
    run = logits_and_gradients(tokens(), padding_mask(tokens(), "left"))
    stock, ours = with_adapter(config, None), with_adapter(config, when)
    assert sum("norm" in name for name in run(ours)) == 5
    compare_with_stock(ours, stock, run)


@when_patched
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "AdaptionPromptConfig"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_virtual_tokens_train(kind, side, when):
    """With padding on the left, the mask has a hole between the virtual tokens and the sequence."""
    peft = pytest.importorskip("peft")
    sizes = {"adapter_len": 4, "adapter_layers": 2} if kind == "AdaptionPromptConfig" else {"num_virtual_tokens": 5}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **sizes)
    run = logits_and_gradients(tokens(), padding_mask(tokens(), side), use_cache=kind == "PrefixTuningConfig")
    ours, stock = with_adapter(config, when), with_adapter(config, None)
    for name, parameter in (*ours.named_parameters(), *stock.named_parameters()):
        # With gates near 0 their gradients, two numbers, are nearly all of the norm of all gradients. The error of two
        # numbers is a matter of chance.
        if name.endswith("adaption_gate"):
            torch.nn.init.constant_(parameter, 2.0)
    compare_with_stock(ours, stock, run)


# --- training --------------------------------------------------------------------------------------------------------


def test_a_layer_norm_in_the_place_of_an_rms_norm_trains():
    def with_layer_norm(model: nn.Module) -> nn.Module:
        for layer in model.model.layers:
            layer.post_attention_layernorm = nn.LayerNorm(64, device=DEVICE)
        return model

    run = logits_and_gradients(tokens())
    compare_with_stock(patch(with_layer_norm(small())), with_layer_norm(small()), run)
    compare_with_stock(with_layer_norm(patch(small())), with_layer_norm(small()), run)


@pytest.mark.parametrize("use_reentrant", [False, True])
@families
def test_gradient_checkpointing_changes_no_bit(family, use_reentrant):
    model = patch(small(family)).train()
    run = logits_and_gradients(tokens(), padding_mask(tokens(), "left"))
    expected = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    results = run(model)
    assert all(torch.equal(results[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("starcoder2", {"residual_dropout": 0.5, "embedding_dropout": 0.5, "norm_epsilon": 1e-2}),
        ("seed_oss", {"residual_dropout": 0.5, "head_dim": 16}),
        ("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    ],
)
def test_dropout_of_hidden_states_drops_the_same_elements_as_stock(family, config):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {family}")
    stock = small(family, attention_dropout=0.0, **config).train()
    ours = patched(stock)
    step = logits_and_gradients(tokens())

    def run(model: nn.Module) -> Results:
        torch.manual_seed(3)
        with DropoutInFloat32():
            return step(model)

    compare_with_stock(ours, stock, run)
    assert (run(ours)["logits"] - step(ours.eval())["logits"]).abs().max() > 1e-1


def test_losses_in_training_are_those_of_stock():
    losses = []
    batches = [torch.randint(3, 20, (4, 24), device=DEVICE) for _ in range(12)]
    for change in (lambda model: model, patch):
        model = change(small()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append([])
        for ids in batches:
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    decrease = losses[0][0] - losses[0][-1]
    assert decrease > 0.5
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.01 * decrease
