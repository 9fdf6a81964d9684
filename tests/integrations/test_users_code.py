"""Code that users change: `patch` replaces an operation only where it is still the code that it knows."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from llama_kernels.integrations.transformers import patch, report
from tests.integrations.comparison import compare_with_stock, logits_and_gradients, padding_mask
from tests.integrations.small import not_interpreted, patched, small, stock_rows, tokens
from tests.integrations.user_classes import OwnAttention, OwnLayer, OwnMask, OwnRMSNorm, Renamed, with_class

pytestmark = not_interpreted


@pytest.mark.parametrize(
    ("name", "cls", "stays_stock"),
    [
        ("model.layers.1.self_attn", OwnAttention, True),
        ("model.layers.1.self_attn", OwnMask, True),
        ("model.layers.1.input_layernorm", OwnRMSNorm, True),
        ("model.layers.1.post_attention_layernorm", OwnRMSNorm, True),
        ("model.norm", OwnRMSNorm, True),
        ("model.layers.0", OwnLayer, False),
        ("model.layers.0.self_attn", Renamed, False),
    ],
)
def test_a_subclass_of_a_module_runs_its_own_forward(name, cls, stays_stock):
    stock = with_class(small(), name, cls)
    ours = patched(stock)
    assert isinstance(ours.get_submodule(name), cls)
    assert any(row_cls == cls.__name__ for _, row_cls in stock_rows(ours)) == stays_stock
    run = logits_and_gradients(tokens())
    compare_with_stock(ours, stock, run)
    plain = run(small())["logits"]
    assert cls is Renamed or (run(ours)["logits"] - plain).abs().max() > 1e-2


def norm_without_mean(self, hidden_states):
    return self.weight * nn.functional.normalize(hidden_states, dim=-1)


def attention_that_returns_zeros(self, hidden_states, *args, **kwargs):
    return torch.zeros_like(hidden_states), None


def no_rotation(q, k, cos, sin, *args, unsqueeze_dim=1, **kwargs):
    return q, k


def interleaved_rotate_half(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


EDITS = {
    "the norm's forward": (modeling_llama.LlamaRMSNorm, "forward", norm_without_mean, "rms_norm"),
    "the attention's forward": (modeling_llama.LlamaAttention, "forward", attention_that_returns_zeros, "attention"),
    "apply_rotary_pos_emb": (modeling_llama, "apply_rotary_pos_emb", no_rotation, "rope"),
    "rotate_half": (modeling_llama, "rotate_half", interleaved_rotate_half, "rope"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_function_edited_after_another_model_was_patched_stays_stock(edit, monkeypatch):
    run = logits_and_gradients(tokens())
    plain = run(patch(small()))["logits"]
    where, name, function, kind = EDITS[edit]
    with monkeypatch.context() as edited:
        edited.setattr(where, name, function)
        stock = small()
        ours = patched(stock)
        assert kind not in {row.kind for row in report(ours).rows if row.ours}
        compare_with_stock(ours, stock, run)
        assert (run(ours)["logits"] - plain).abs().max() > 1e-2
    assert not stock_rows(patch(small()))


def halved_norm(self, hidden_states):
    return 0.5 * type(self).forward(self, hidden_states)


def halved_attention(self, hidden_states, **kwargs):
    out, weights = type(self).forward(self, hidden_states, **kwargs)
    return out * 0.5, weights


def test_a_forward_set_on_an_instance_runs():
    stock = small()
    norm, attention = stock.model.layers[1].input_layernorm, stock.model.layers[0].self_attn
    norm.forward = types.MethodType(halved_norm, norm)
    attention.forward = types.MethodType(halved_attention, attention)
    ours = patched(stock)
    why = stock_rows(ours)
    assert "set on the instance" in why["rms_norm", "LlamaRMSNorm"]
    assert "set on the instance" in why["rope", "LlamaAttention"]
    run = logits_and_gradients(tokens())
    compare_with_stock(ours, stock, run)
    assert (run(ours)["logits"] - run(small())["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("heads", [2, 3, 4, 5])
@pytest.mark.parametrize("side", ["none", "left", "holes"])
def test_a_layer_of_a_stock_model_in_a_patched_one_raises(heads, side):
    """It has eager attention, which added a mask of ranges to its scores where it has as many heads as ranges."""
    sizes = {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": 1}
    ours, other = patch(small(**sizes)), small(**sizes)
    ours.model.layers[1] = other.model.layers[1]
    assert stock_rows(ours)["attention", "LlamaAttention"] == "patch has not replaced it"
    mask = padding_mask(tokens(), "none" if side == "none" else "left")
    if side == "holes":
        mask[0, 10:12] = 0
    for training in (True, False):
        with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match="must match"):
            ours(tokens(), attention_mask=mask, use_cache=False)


def test_a_class_that_a_patched_norm_gets_afterwards_runs_its_own_forward():
    stock = small()
    ours = patched(stock)
    norms = [model.model.layers[0].post_attention_layernorm for model in (stock, ours)]
    for norm in norms:
        norm.__class__ = type("Own", (type(norm),), {"forward": lambda self, x: x * 0.5})
    compare_with_stock(ours, stock, logits_and_gradients(tokens()))


def test_a_norm_whose_forward_is_wrapped_stays_stock(monkeypatch):
    def doubled(forward):
        @functools.wraps(forward)
        def wrapper(self, hidden_states):
            return 2 * forward(self, hidden_states)

        return wrapper

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", doubled(modeling_llama.LlamaRMSNorm.forward))
    stock = small()
    ours = patched(stock)
    assert stock_rows(ours)["rms_norm", "LlamaRMSNorm"] == "its forward is not known code"
    compare_with_stock(ours, stock, logits_and_gradients(tokens()))


# --- attention that uses its mask ------------------------------------------------------------------------------------


def projected(self, hidden_states, mask=None):
    """q, k and v without RoPE."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
    return q, k, v


def passes_it_by_keyword(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, attention_mask=attention_mask, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def compares_it_with_none(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    is_causal = attention_mask is None
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, attention_mask, scaling=self.scaling, is_causal=is_causal)
    return self.o_proj(out.flatten(2)), weights


def chooses_it_or_none(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    mask = attention_mask if self.layer_idx else None
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, mask, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def gives_none_instead(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    q = nn.functional.layer_norm(q, (self.head_dim,), None, None, 1e-5)
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, None, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def slices_it_to_the_keys(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    mask = attention_mask[:, :, :, : k.shape[-2]]
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, mask, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def slices_it_with_an_offset(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    mask = attention_mask[:, :, :, 1:]
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k[:, :, 1:], v[:, :, 1:], mask, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def takes_a_row_of_it(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    mask = attention_mask[:, :, -1, None]
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, mask, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def slices_two_of_its_dimensions(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    mask = attention_mask[:, :1]
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, mask, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def compares_its_elements(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    v = v * (attention_mask == 0).any(2)[..., None]
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, attention_mask, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def gives_it_to_another_function(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states, attention_mask)
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, attention_mask, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def calls_a_method_of_it(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    mask = attention_mask
    v = v + 0 * mask.sum()
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, mask, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


def makes_another_mask(self, hidden_states, attention_mask, **kwargs):
    q, k, v = projected(self, hidden_states)
    window = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril().triu(-2)[None, None]
    attention_interface = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attention_interface(self, q, k, v, window, scaling=self.scaling)
    return self.o_proj(out.flatten(2)), weights


PASSES_IT_ON = (
    passes_it_by_keyword, compares_it_with_none, chooses_it_or_none, gives_none_instead, slices_it_to_the_keys,
)  # fmt: skip
COMPUTES_WITH_IT = (
    slices_it_with_an_offset, takes_a_row_of_it, slices_two_of_its_dimensions, compares_its_elements,
    gives_it_to_another_function, calls_a_method_of_it, makes_another_mask,
)  # fmt: skip


@pytest.mark.parametrize("forward", [*PASSES_IT_ON, *COMPUTES_WITH_IT], ids=lambda forward: forward.__name__)
def test_attention_is_ours_where_a_forward_only_passes_its_mask_on(forward):
    model = small()
    model.model.layers[0].self_attn.__class__ = type("Own", (modeling_llama.LlamaAttention,), {"forward": forward})
    why = stock_rows(patched(model))
    if forward in PASSES_IT_ON:
        assert ("attention", "Own") not in why
    else:
        assert why["attention", "Own"] == "its forward computes with attention_mask"
        assert why["attention", "LlamaAttention"] == "another attention module of its config stays stock"
