"""`patch`, `unpatch` and `report`: what they change, what they leave, and what they say."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import sys
import time
import types
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="4.57")

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from llama_kernels.integrations.transformers import patch, report, unpatch
from llama_kernels.integrations.transformers.modules import Patched
from tests.integrations.small import (
    FAMILIES,
    Calls,
    as_stock,
    logits_and_gradients,
    logits_of,
    not_interpreted,
    small,
    tokens,
)
from tests.support.environment import DEVICE

pytestmark = not_interpreted

families = pytest.mark.parametrize("family", FAMILIES)
KINDS = ("attention", "rms_norm", "rope", "add_rms_norm", "qk_norm_rope")


def stock_rows(model: nn.Module) -> dict[tuple[str, str], str]:
    return {(row.kind, row.cls): row.why for row in report(model).rows if not row.ours}


def ops_of(model: nn.Module) -> set[str]:
    """The operators of ours that a forward calls."""
    with Calls() as calls, torch.no_grad():
        model(tokens(), use_cache=False)
    return {name.removeprefix("llama_kernels::") for name, _ in calls.made if name.startswith("llama_kernels::")}


# --- no trace --------------------------------------------------------------------------------------------------------


def state_of(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def trace_of(model: nn.Module, home: Any) -> tuple[Any, ...]:
    modules = {
        name: (type(m), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()})
        for name, m in model.named_modules()
    }
    return modules, state_of(home), list(model.state_dict()), model.config.to_dict()


@families
def test_unpatch_leaves_no_trace(family):
    model, other = small(family), small(family)
    other.config = model.config  # two models may share one
    home = sys.modules[type(model).__module__]
    ids, before = tokens(), trace_of(model, home)
    logits, seed = model(ids).logits, torch.random.get_rng_state()
    assert patch(model) is model
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert list(model.state_dict()) == before[2] and state_of(home) == before[1]
    assert not any(isinstance(module, Patched) for module in other.modules())
    assert other.config._attn_implementation == "eager" != model.config._attn_implementation
    assert torch.equal(other(ids).logits, logits)
    assert "attention_forward" in ops_of(model)
    assert unpatch(model) is model
    assert trace_of(model, home) == before
    assert torch.equal(model(ids).logits, logits)


def test_unpatch_of_a_model_that_is_not_patched_changes_nothing():
    model = small()
    before = trace_of(model, modeling_llama)
    assert unpatch(model) is model
    assert trace_of(model, modeling_llama) == before


def test_patching_twice_is_patching_once():
    model = patch(small())
    before = trace_of(model, modeling_llama)
    assert patch(model) is model and patch(model, fuse=False) is model
    assert trace_of(model, modeling_llama) == before
    unpatch(model)
    assert not any(isinstance(module, Patched) for module in model.modules())


def test_parameters_and_hooks_are_the_same_objects():
    model = small()
    seen: list[Any] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    parameters = dict(model.named_parameters())
    patch(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model(tokens())
    assert seen == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_and_can_be_unpatched(copied):
    stock = small("qwen3")
    model, ids = patch(copy.deepcopy(stock)), tokens()
    expected = model(ids).logits
    other = copied(model)
    assert torch.equal(other(ids).logits, expected)
    assert report(other) == report(model)
    unpatch(other)
    assert torch.equal(other(ids).logits, stock(ids).logits)
    assert {type(m) for m in other.modules()} == {type(m) for m in stock.modules()}
    assert torch.equal(model(ids).logits, expected)


def test_saved_and_loaded(tmp_path):
    stock = small()
    model, run = patch(copy.deepcopy(stock)), logits_of(tokens())
    model.save_pretrained(tmp_path)
    assert "llama_kernels" not in (tmp_path / "config.json").read_text()
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="llama_kernels").to(DEVICE).eval()
    as_stock(by_name, stock, run)
    as_stock(patch(by_name), stock, run)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE).eval()
    assert ops_of(loaded) == set()
    loaded.set_attn_implementation("llama_kernels")
    assert ops_of(loaded) == {"attention_forward"}
    as_stock(loaded, stock, run)


# --- report ----------------------------------------------------------------------------------------------------------


def test_a_report_has_a_row_for_each_kind_of_module():
    rows = report(patch(small("qwen3"))).rows
    assert [(row.kind, row.cls, row.count) for row in rows] == [
        ("attention", "Qwen3Attention", 2), ("rms_norm", "Qwen3RMSNorm", 9), ("rope", "Qwen3Attention", 2),
        ("add_rms_norm", "Qwen3DecoderLayer", 2), ("qk_norm_rope", "Qwen3Attention", 2),
    ]  # fmt: skip
    assert all(row.ours for row in rows)


def test_a_report_of_a_stock_model_says_what_could_be_ours():
    rows = report(small()).rows
    assert {row.kind for row in rows} == {"attention", "rms_norm", "rope", "add_rms_norm"}
    assert not any(row.ours for row in rows)
    assert {row.why for row in rows} == {"patch has not put it in"}


def test_a_report_of_a_model_with_the_attention_by_name():
    model = small()
    model.set_attn_implementation("llama_kernels")
    assert {row.kind for row in report(model).rows if row.ours} == {"attention"}


def test_a_printed_report_is_a_table():
    lines = str(report(patch(small()))).splitlines()
    assert lines[0].split() == ["operation", "module", "count", "runs", "why"]
    assert lines[1].split()[:4] == ["attention", "LlamaAttention", "2", "ours"]
    assert len({line.index(word) for line, word in zip(lines[1:], ("through", "known", "known"), strict=False)}) == 1
    assert len(lines) == 5


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("options", "ops"),
    [
        ({}, {"attention_forward", "rms_norm", "add_rms_norm", "rope", "qk_norm_rope"}),
        ({"attention": False}, {"rms_norm", "add_rms_norm", "rope", "qk_norm_rope"}),
        ({"rms_norm": False}, {"attention_forward", "rope"}),
        ({"rope": False}, {"attention_forward", "rms_norm", "add_rms_norm"}),
        ({"fuse": False}, {"attention_forward", "rms_norm", "rope"}),
        ({"attention": False, "rms_norm": False}, {"rope"}),
    ],
)
def test_what_is_asked_for_is_ours(family, options, ops):
    stock = small(family)
    model = patch(copy.deepcopy(stock), **options)
    other = {"llama": "qk_norm_rope", "qwen3": "rope" if "qk_norm_rope" in ops else ""}[family]
    # The operators of rms_norm and add_rms_norm are one.
    found, wanted = ops_of(model), {name for name in ops if name != other}
    assert {row.kind for row in report(model).rows if row.ours} == kinds_of(wanted, family)
    assert ("attention_forward" in found) == ("attention_forward" in wanted)
    assert any(name.startswith("rms_norm") for name in found) == ("rms_norm" in wanted)
    assert any(name.startswith(("rope", "qk_norm_rope")) for name in found) == bool(wanted & {"rope", "qk_norm_rope"})
    as_stock(model, stock, logits_and_gradients(tokens()))


def kinds_of(ops: set[str], family: str) -> set[str]:
    kinds = {"attention" if name == "attention_forward" else name for name in ops}
    return kinds | {"rope"} if family == "qwen3" and "qk_norm_rope" in kinds else kinds


def test_strict_raises_where_something_stays_stock():
    assert patch(small(), strict=True)
    model = with_class(small(), "model.layers.1.self_attn", own_attention())
    before = trace_of(model, modeling_llama)
    with pytest.raises(ValueError, match=r"strict=False") as error:
        patch(model, strict=True)
    assert "OwnAttention" in str(error.value)
    assert trace_of(model, modeling_llama) == before
    patch(model, rope=False, attention=False, fuse=False, strict=True)


def test_layers_whose_norms_are_layer_norms_have_nothing_to_fuse():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("persimmon", vocab_size=99, **sizes))
    patch(model, strict=True)
    assert {row.kind for row in report(model).rows} == {"attention", "rope"}


def test_strict_is_about_what_was_asked_for():
    model = with_class(small(), "model.norm", own_norm())
    assert patch(model, rms_norm=False, fuse=False, strict=True)


def test_bad_calls_name_what_is_wrong():
    for function in (patch, unpatch, report):
        with pytest.raises(TypeError, match=rf"{function.__name__}: model is a str"):
            function("llama")
    with pytest.raises(ValueError, match=r"patch: model is a Linear, in which nothing can be replaced"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"patch: model is a LlamaForCausalLM, in which nothing can be replaced"):
        patch(small(), attention=False, rms_norm=False, rope=False)


def test_every_model_in_a_module_is_patched():
    stock = nn.ModuleList([small(), small("gemma2")])
    both = patch(copy.deepcopy(stock))
    for ours, theirs in zip(both, stock, strict=True):
        assert not stock_rows(ours)
        as_stock(ours, theirs, logits_of(tokens()))
    unpatch(both)
    assert not any(isinstance(module, Patched) for module in both.modules())


# --- what is said ----------------------------------------------------------------------------------------------------


def warnings_of(caplog: Any) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if r.name.startswith("llama_kernels") and r.levelno >= logging.WARNING
    ]


def test_one_warning_names_what_stays_stock(caplog):
    model = with_class(with_class(small(), "model.norm", own_norm()), "model.layers.1.self_attn", own_attention())
    with caplog.at_level(logging.INFO):
        patch(model)
    (said,) = warnings_of(caplog)
    assert "OwnRMSNorm" in said and "OwnAttention" in said and "LlamaRMSNorm" not in said


@pytest.mark.parametrize("options", [{}, {"fuse": False}, {"rms_norm": False}, {"rope": False}])
def test_no_warning_where_all_that_was_asked_for_is_ours(options, caplog):
    with caplog.at_level(logging.WARNING):
        patch(small("qwen3"), **options)
    assert warnings_of(caplog) == []


# --- how fast --------------------------------------------------------------------------------------------------------


def test_a_model_of_70_billion_is_patched_at_once(monkeypatch):
    """On the meta device. No module is built: a patched module is the same object."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    modules = list(model.modules())

    def built(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"patch builds a {type(self).__name__}")

    monkeypatch.setattr(nn.Module, "__init__", built)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        patch(model)
        seconds.append(time.perf_counter() - begin)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert {(row.kind, row.count, row.ours) for row in report(model).rows} == {
            ("attention", 80, True), ("rms_norm", 161, True), ("rope", 80, True), ("add_rms_norm", 80, True)
        }  # fmt: skip
        unpatch(model)
    assert min(seconds) < 0.2, seconds


# --- code of the user's ----------------------------------------------------------------------------------------------


def with_class(model: nn.Module, name: str, cls: type[nn.Module]) -> nn.Module:
    model.get_submodule(name).__class__ = cls
    return model


def own_attention() -> type[nn.Module]:
    class OwnAttention(modeling_llama.LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            out, weights = super().forward(hidden_states, **kwargs)
            return out.clamp(-0.2, 0.2), weights

    return OwnAttention


def own_norm() -> type[nn.Module]:
    class OwnRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states).clamp(-1, 1)

    return OwnRMSNorm


def own_layer() -> type[nn.Module]:
    class OwnLayer(modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            h = hidden_states + 0.5 * self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
            return h + 2.0 * self.mlp(self.post_attention_layernorm(h))

    return OwnLayer


def no_forward_of_its_own() -> type[nn.Module]:
    class Renamed(modeling_llama.LlamaAttention):
        def helper(self):
            return None

    return Renamed


@pytest.mark.parametrize(
    ("name", "make", "stays"),
    [
        ("model.layers.1.self_attn", own_attention, True),
        ("model.layers.1.input_layernorm", own_norm, True),
        ("model.layers.1.post_attention_layernorm", own_norm, True),
        ("model.norm", own_norm, True),
        ("model.layers.0", own_layer, False),
        ("model.layers.0.self_attn", no_forward_of_its_own, False),
    ],
)
def test_a_subclass_of_the_users_does_what_it_did(name, make, stays):
    cls = make()
    stock = with_class(small(), name, cls)
    ours = patch(copy.deepcopy(stock))
    assert isinstance(ours.get_submodule(name), cls)
    assert any(row_cls == cls.__name__ for _, row_cls in stock_rows(ours)) == stays
    run = logits_and_gradients(tokens())
    as_stock(ours, stock, run)
    plain = run(small())["logits"]
    assert make is no_forward_of_its_own or (run(ours)["logits"] - plain).abs().max() > 1e-2


def slower_norm(self, hidden_states):
    return self.weight * nn.functional.normalize(hidden_states, dim=-1)


def attention_of_nothing(self, hidden_states, *args, **kwargs):
    return torch.zeros_like(hidden_states), None


def no_rotation(q, k, cos, sin, *args, unsqueeze_dim=1, **kwargs):
    return q, k


def interleaved_rotate_half(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


EDITS = {
    "the norm's forward": (modeling_llama.LlamaRMSNorm, "forward", slower_norm, "rms_norm"),
    "the attention's forward": (modeling_llama.LlamaAttention, "forward", attention_of_nothing, "attention"),
    "apply_rotary_pos_emb": (modeling_llama, "apply_rotary_pos_emb", no_rotation, "rope"),
    "rotate_half": (modeling_llama, "rotate_half", interleaved_rotate_half, "rope"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_code_that_changes_after_another_model_was_patched(edit, monkeypatch):
    run = logits_and_gradients(tokens())
    plain = run(patch(small()))["logits"]
    where, name, function, kind = EDITS[edit]
    with monkeypatch.context() as edited:
        edited.setattr(where, name, function)
        stock = small()
        ours = patch(copy.deepcopy(stock))
        assert kind not in {row.kind for row in report(ours).rows if row.ours}
        as_stock(ours, stock, run)
        assert (run(ours)["logits"] - plain).abs().max() > 1e-2
    assert not stock_rows(patch(small()))


def half_of_the_norm(self, hidden_states):
    return 0.5 * type(self).forward(self, hidden_states)


def half_of_attention(self, hidden_states, **kwargs):
    out, weights = type(self).forward(self, hidden_states, **kwargs)
    return out * 0.5, weights


def test_a_forward_on_the_instance_runs():
    stock = small()
    norm, attention = stock.model.layers[1].input_layernorm, stock.model.layers[0].self_attn
    norm.forward = types.MethodType(half_of_the_norm, norm)
    attention.forward = types.MethodType(half_of_attention, attention)
    ours = patch(copy.deepcopy(stock))
    why = stock_rows(ours)
    assert "set on the instance" in why["rms_norm", "LlamaRMSNorm"]
    assert "set on the instance" in why["rope", "LlamaAttention"]
    run = logits_and_gradients(tokens())
    as_stock(ours, stock, run)
    assert (run(ours)["logits"] - run(small())["logits"]).abs().max() > 1e-2


def test_a_wrapper_around_a_forward_is_not_known(monkeypatch):
    def doubled(forward):
        @functools.wraps(forward)
        def wrapper(self, hidden_states):
            return 2 * forward(self, hidden_states)

        return wrapper

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", doubled(modeling_llama.LlamaRMSNorm.forward))
    stock = small()
    ours = patch(copy.deepcopy(stock))
    assert stock_rows(ours)["rms_norm", "LlamaRMSNorm"] == "its forward is not known code"
    as_stock(ours, stock, logits_and_gradients(tokens()))
