"""Hooks of a patched model, and calls of its parts: they do what they do in the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llama_kernels.integrations.transformers import patch
from tests.integrations.comparison import Results, compare_with_stock, logits_and_gradients
from tests.integrations.small import Calls, not_interpreted, small, tokens
from tests.support.environment import DEVICE

pytestmark = not_interpreted


def called_hooks(model: nn.Module, name: str) -> list[str]:
    """The hooks of one module that run in a step of training, in order."""
    seen: list[str] = []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_pre_hook(lambda *_: seen.append("before backward"))
    module.register_full_backward_hook(lambda *_: seen.append("after backward"))
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    return seen


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.input_layernorm"),
        ("llama", "model.layers.1.post_attention_layernorm"),
        ("llama", "model.norm"),
        ("llama", "model.layers.0.self_attn"),
        ("llama", "model.layers.0"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm"),
        ("qwen3", "model.layers.0.self_attn.q_norm"),
        ("qwen3", "model.layers.1.self_attn.k_norm"),
    ],
)
def test_hooks_run_as_in_stock(family, name):
    assert called_hooks(patch(small(family)), name) == called_hooks(small(family), name) != []


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers.1.post_attention_layernorm"), ("qwen3", "model.layers.0.self_attn.q_norm")],
)
@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_a_hook_can_change_the_output_of_a_norm(family, name, when):
    def hooked(model: nn.Module) -> nn.Module:
        model.get_submodule(name).register_forward_hook(lambda module, args, y: y * 0.5)
        return model

    stock = hooked(small(family))
    ours = patch(hooked(small(family))) if when == "before patch" else hooked(patch(small(family)))
    run = logits_and_gradients(tokens())
    compare_with_stock(ours, stock, run)
    assert (run(ours)["logits"] - run(small(family))["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_layer_fuses_norm_and_rope_only_while_its_norm_has_no_hook(family):
    model = patch(small(family))
    norm, seen = model.model.layers[0].self_attn.q_norm, []

    def fused() -> int:
        with Calls() as calls, torch.no_grad():
            model(tokens(), use_cache=False)
        return len(calls.of("qk_norm_rope"))

    assert fused() == 2
    hook = norm.register_forward_hook(lambda *_: seen.append(1))
    assert fused() == 1 and seen == [1]
    hook.remove()
    assert fused() == 2 and seen == [1]
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        fused()
    finally:
        hook.remove()
    assert any(module is norm for module in seen)


# --- calls of parts of a model ---------------------------------------------------------------------------------------


def test_the_rotary_embedding_returns_what_stock_returns():
    stock, ours = small(), patch(small())
    x, positions = torch.zeros(1, 4, 64, device=DEVICE), torch.arange(4, device=DEVICE)[None]
    for a, b in zip(ours.model.rotary_emb(x, positions), stock.model.rotary_emb(x, positions), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_a_layer_can_be_called_with_position_embeddings(part):
    x = torch.randn(1, 6, 64, device=DEVICE)

    def run(model: Any) -> Results:
        h = x.to(model.dtype)
        tables = model.model.rotary_emb(h, torch.arange(6, device=DEVICE)[None])
        layer = model.model.layers[0]
        if part == "attention":
            return {"logits": layer.self_attn(h, position_embeddings=tables, attention_mask=None)[0].detach()}
        out = layer(h, position_embeddings=tables)
        return {"logits": (out[0] if isinstance(out, tuple) else out).detach()}

    compare_with_stock(patch(small(attention="sdpa")), small(attention="sdpa"), run)
