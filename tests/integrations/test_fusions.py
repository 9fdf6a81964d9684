"""Forwards with the lines of a fusion compute what they did before, and others are left as they are."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers.models.qwen3 import modeling_qwen3

from llama_kernels.integrations.transformers import classes, fusions, patch, report, source
from tests.integrations.comparison import compare_with_stock, logits_and_gradients
from tests.integrations.small import Calls, not_interpreted, small, tokens
from tests.integrations.user_classes import class_in, with_class

pytestmark = not_interpreted

NONE = classes.Found(None, "no such lines")

LAYER = """def forward(self, hidden_states, **kwargs):
    residual = hidden_states
    hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
{lines}
    hidden_states = self.mlp(hidden_states)
    return residual + hidden_states"""
ADD_AND_NORM = """    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)"""

ATTENTION = """def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query_states = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
{before_k}
    key_states = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(shape).transpose(1, 2)
{before_rope}
    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return self.o_proj(function(self, query_states, key_states, value_states, attention_mask)[0].flatten(2)), None"""


def fused(kind: str, text: str) -> str | None:
    """The rewritten text of a forward. None if there is none."""
    fusion = fusions.fusion_of(kind, source.normalised(text))
    return None if fusion is None else fusion.text


def with_forward(model: Any, name: str, text: str, folder: Path) -> Any:
    """The model, whose module `name` has a class of the user's with this forward, in a file of its own."""
    base = type(model.get_submodule(name))
    file = folder / "own.py"
    file.write_text(
        f"from {base.__module__} import *\nfrom {base.__module__} import ACT2FN, ALL_ATTENTION_FUNCTIONS, "
        f"{base.__name__}, apply_rotary_pos_emb\n\nclass Own({base.__name__}):\n{textwrap.indent(text, '    ')}\n"
    )
    return with_class(model, name, class_in(file, "Own"))


# --- in Transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "gemma2", "mixtral", "gpt_oss", "glm4"])
def test_decoder_layers_of_transformers_have_the_lines_of_add_and_norm(family):
    """Otherwise a release of Transformers would end the fusion, and only the report would say so."""
    assert fusions.ADD_NORM in fused_kinds(family)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gemma3", "apertus", "qwen3_next"])
def test_layers_of_transformers_with_norms_of_heads_have_the_lines_of_both_fusions(family):
    assert fused_kinds(family) == {fusions.ADD_NORM, fusions.QK_NORM_ROPE}


def fused_kinds(family: str) -> set[str]:
    """The fusions that are found in the classes of a family."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    own = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
    found = [classes.found_in(cls) for cls in own if issubclass(cls, nn.Module)]
    return {kind for kind in (fusions.ADD_NORM, fusions.QK_NORM_ROPE) if any(x.get(kind, NONE).value for x in found)}


# --- residual add + norm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        ADD_AND_NORM.replace("residual = hidden_states\n", "residual = hidden_states * 1\n"),
        ADD_AND_NORM.replace("residual = hidden_states\n", "residual = hidden_states.clone()\n"),
        ADD_AND_NORM.replace("residual + hidden", "residual - hidden"),
        ADD_AND_NORM.replace("residual + hidden_states", "residual + 0.5 * hidden_states"),
        ADD_AND_NORM.replace("norm(hidden_states)", "norm(residual)"),
        ADD_AND_NORM.replace("norm(hidden_states)", "norm(hidden_states).float()"),
        ADD_AND_NORM.replace("residual = hidden_states\n", "residual = hidden_states\n    hidden_states = residual\n"),
        ADD_AND_NORM.replace("hidden_states", "residual"),
    ],
)  # fmt: skip
def test_lines_that_compute_anything_else_are_not_fused(lines):
    assert fused(fusions.ADD_NORM, LAYER.format(lines=ADD_AND_NORM))
    assert fused(fusions.ADD_NORM, LAYER.format(lines=lines)) is None


def test_the_layer_of_a_user_is_fused_and_computes_the_same(tmp_path):
    text = LAYER.format(lines=ADD_AND_NORM).replace("= residual\n", "= 0.5 * residual\n")
    stock = with_forward(small(), "model.layers.1", text, tmp_path)
    ours = patch(with_forward(small(), "model.layers.1", text, tmp_path))
    assert {row.cls: row.ours for row in report(ours).rows if row.kind == "add_rms_norm"} == {
        "LlamaDecoderLayer": True, "Own": True
    }  # fmt: skip
    compare_with_stock(ours, stock, logits_and_gradients(tokens()))


def test_a_layer_without_the_norm_of_a_branch_that_it_does_not_take(tmp_path):
    """The norm of the other branch is no attribute of it."""
    other = ADD_AND_NORM.replace("post_attention_layernorm", "another_norm").replace("    ", "        ")
    text = LAYER.format(lines=f"    if self.training is None:\n{other}\n{ADD_AND_NORM}")
    stock = with_forward(small(), "model.layers.1", text, tmp_path)
    compare_with_stock(patch(with_forward(small(), "model.layers.1", text, tmp_path)), stock,
                       logits_and_gradients(tokens()))  # fmt: skip


def test_a_forward_that_calls_super_is_not_fused(tmp_path):
    text = LAYER.format(lines=ADD_AND_NORM).replace("return", "super().train(self.training)\n    return")
    stock = with_forward(small(), "model.layers.1", text, tmp_path)
    ours = patch(with_forward(small(), "model.layers.1", text, tmp_path))
    (why,) = (row.why for row in report(ours).rows if row.kind == "add_rms_norm" and row.cls == "Own")
    assert "super()" in why
    compare_with_stock(ours, stock, logits_and_gradients(tokens()))


def test_a_default_that_names_a_global_of_the_file_is_kept(tmp_path):
    text = LAYER.format(lines=ADD_AND_NORM).replace("**kwargs):", "offset=len(ACT2FN) * 0, **kwargs):", 1)
    text = text.replace("return residual", "return offset + residual")
    stock = with_forward(small(), "model.layers.1", text, tmp_path)
    ours = patch(with_forward(small(), "model.layers.1", text, tmp_path))
    with Calls() as calls:
        compare_with_stock(ours, stock, logits_and_gradients(tokens()))
    assert calls.of("rms_norm_forward")


# --- norms of q and k + RoPE -----------------------------------------------------------------------------------------

NOTHING = "    pass_on = attention_mask"


def attention(before_k: str = NOTHING, before_rope: str = NOTHING) -> str:
    return ATTENTION.format(before_k=before_k, before_rope=before_rope)


@pytest.mark.parametrize(
    "lines",
    [
        "gate = self.g_proj(hidden_states).view(*shape[:-1], -1)",
        "query, gate = torch.chunk(self.q_proj(hidden_states).view(*shape[:-1], self.head_dim * 2), 2, dim=-1)",
        "value_states = self.v_proj(hidden_states).view(shape).transpose(1, 2)[:, :-1]",
    ],
)
def test_the_norms_move_past_projections_and_views(lines):
    for place in ("before_k", "before_rope"):
        text = fused(fusions.QK_NORM_ROPE, attention(**{place: f"    {lines}"}))
        assert text and text.index(lines.partition(" = ")[0]) < text.index("self.q_norm")


@pytest.mark.parametrize(
    "lines",
    [
        "value_states = query_states",
        "query_states = query_states * 2",
        "query_states, other = (other, query_states)",
        "query_states[:, :1] = 0",
        "query_states += 1",
        "query_states.mul_(2)",
        "projected = self.rotate(hidden_states)",
        "projected = hidden_states.mul_(2)",
        "projected = [x.mul_(2) for x in kwargs.values()]",
        "projected = (lambda: query_states)()",
        "self.last = hidden_states",
        "if attention_mask is None:\n        return query_states, None",
        "del hidden_states",
    ],
)
def test_the_norms_do_not_move_past_other_statements(lines):
    for place in ("before_k", "before_rope"):
        assert fused(fusions.QK_NORM_ROPE, attention(**{place: f"    {lines}"})) is None
    assert fused(fusions.QK_NORM_ROPE, attention(before_rope="    value_states = key_states")) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("transpose(1, 2)\n    pass", "transpose(2, 1)\n    pass"),
        ("view(shape)).transpose", "view(shape)).view(shape).transpose"),
        ("self.k_norm(", "self.q_norm("),
        ("self.q_norm(self", "self.q_norm(*self"),
        ("key_states, cos, sin)\n    function", "key_states, cos, sin, unsqueeze_dim=2)\n    function"),
        ("key_states, cos, sin)\n    function", "key_states, sin, cos)\n    function"),
        ("    query_states, key_states = apply", "    if True:\n        query_states, key_states = apply"),
    ],
)
def test_other_norms_and_rotations_are_not_fused(old, new):
    assert fused(fusions.QK_NORM_ROPE, attention())
    changed = attention().replace(old, new)
    assert changed != attention() and fused(fusions.QK_NORM_ROPE, changed) is None


def test_norms_after_rope_are_not_fused():
    """As in NanoChat, whose norms have no weight, so that the results would differ by rounding only."""
    lines = attention().splitlines()
    rope = next(i for i, line in enumerate(lines) if "apply_rotary_pos_emb" in line)
    norms = [f"    {name}_states = self.{name[0]}_norm({name}_states)" for name in ("query", "key")]
    bare = [line.replace("self.q_norm(", "(").replace("self.k_norm(", "(") for line in lines]
    assert fused(fusions.QK_NORM_ROPE, "\n".join((*bare[:rope], *norms, *bare[rope:])))
    assert fused(fusions.QK_NORM_ROPE, "\n".join((*bare[: rope + 1], *norms, *bare[rope + 1 :]))) is None
    between = (*bare[:rope], norms[0], bare[rope], norms[1], *bare[rope + 1 :])
    assert fused(fusions.QK_NORM_ROPE, "\n".join(between)) is None


@pytest.mark.parametrize("gated", [False, True])
def test_the_attention_of_a_user_is_fused_and_computes_the_same(gated, tmp_path):
    text = attention()
    if gated:
        text = attention(before_rope="    gate = self.v_proj(hidden_states).flatten(1)").replace(
            "return self.o_proj(", "return gate.mean() * self.o_proj("
        )
    name = "model.layers.0.self_attn"
    stock = with_forward(small("qwen3"), name, text, tmp_path)
    ours = patch(with_forward(small("qwen3"), name, text, tmp_path), attention=False)
    with Calls() as calls:
        compare_with_stock(ours, stock, logits_and_gradients(tokens()))
    assert calls.of("qk_norm_rope")
    assert report(ours).rows and modeling_qwen3.Qwen3Attention in type(ours.get_submodule(name)).__mro__
