"""`patch`, `unpatch` and `report`: what they change, what they leave as it is, and what they report."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from llama_kernels.integrations.transformers import patch, report, unpatch
from llama_kernels.integrations.transformers.modules import Patched
from tests.integrations.comparison import compare_with_stock, logits_and_gradients, logits_of
from tests.integrations.families import stock
from tests.integrations.small import VERSION, families, not_interpreted, ops_of, patched, small, stock_rows, tokens
from tests.integrations.user_classes import OwnAttention, OwnRMSNorm, with_class
from tests.support.environment import DEVICE

pytestmark = not_interpreted


# --- patching and undoing it -----------------------------------------------------------------------------------------


def state_of(source: Any) -> dict[str, Any]:
    """The names that a Python module defines."""
    return {name: value for name, value in vars(source).items() if not name.startswith("__")}


def snapshot(model: nn.Module, source: Any) -> tuple[Any, ...]:
    """All that `patch` could change: classes and attributes of modules, the source file, state_dict and config."""
    modules = {
        name: (type(m), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()})
        for name, m in model.named_modules()
    }
    return modules, state_of(source), list(model.state_dict()), model.config.to_dict()


@families
def test_patch_changes_one_model_and_unpatch_restores_it(family):
    model, other = small(family), small(family)
    other.config = model.config  # two models may share a config
    source = sys.modules[type(model).__module__]
    ids, before = tokens(), snapshot(model, source)
    logits, seed = model(ids).logits, torch.random.get_rng_state()
    assert patch(model) is model
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert list(model.state_dict()) == before[2] and state_of(source) == before[1]
    assert not any(isinstance(module, Patched) for module in other.modules())
    assert other.config._attn_implementation == "eager" != model.config._attn_implementation
    assert torch.equal(other(ids).logits, logits)
    assert "attention_forward" in ops_of(model)
    assert unpatch(model) is model
    assert snapshot(model, source) == before
    assert torch.equal(model(ids).logits, logits)


def test_unpatch_of_a_stock_model_changes_nothing():
    model = small()
    before = snapshot(model, modeling_llama)
    assert unpatch(model) is model
    assert snapshot(model, modeling_llama) == before


def test_patching_a_patched_model_changes_nothing():
    model = patch(small())
    before = snapshot(model, modeling_llama)
    assert patch(model) is model and patch(model, fuse=False) is model
    assert snapshot(model, modeling_llama) == before
    unpatch(model)
    assert not any(isinstance(module, Patched) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("first", ["attention", "rms_norm", "rope", "fuse"])
def test_patching_a_part_and_then_all_is_an_error(family, first):
    model = patch(small(family), **{first: False})
    before = snapshot(model, modeling_llama)
    assert patch(model, **{first: False}) is model
    match = r"patch: model is a \w+ that is patched, and of which this is stock:(.|\n)*Call unpatch first\."
    for strict in (False, True):
        with pytest.raises(ValueError, match=match):
            patch(model, strict=strict)
    assert snapshot(model, modeling_llama) == before
    assert patch(unpatch(model), strict=True)


def test_patching_a_module_of_which_a_part_is_patched_is_an_error():
    both = nn.ModuleList([patch(small()), small()])
    with pytest.raises(ValueError, match=r"LlamaRMSNorm +5 +stock(.|\n)*Call unpatch first"):
        patch(both)
    assert not stock_rows(patch(unpatch(both), strict=True))


def test_patching_a_patched_model_whose_attention_was_changed_since_is_an_error():
    model = patch(small())
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"attention +LlamaAttention +2 +stock +patch has not replaced it"):
        patch(model)
    assert patch(model, attention=False) is model


def test_strict_raises_for_a_patched_model_of_which_a_part_stays_stock():
    model = patch(with_class(small(), "model.norm", OwnRMSNorm))
    assert patch(model) is model
    with pytest.raises(ValueError, match="OwnRMSNorm"):
        patch(model, strict=True)


def test_patch_keeps_parameters_and_hooks():
    model = small()
    seen: list[Any] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    parameters = dict(model.named_parameters())
    patch(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model(tokens())
    assert seen == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_patched_model_is_patched_and_can_be_unpatched(copied):
    stock = small("qwen3")
    try:
        copied(stock)
    except AttributeError as error:
        pytest.skip(f"the stock model has what the package kernels defines: {error}")
    model, ids = patched(stock), tokens()
    expected = model(ids).logits
    other = copied(model)
    assert torch.equal(other(ids).logits, expected)
    assert report(other) == report(model)
    unpatch(other)
    assert torch.equal(other(ids).logits, stock(ids).logits)
    assert {type(m) for m in other.modules()} == {type(m) for m in stock.modules()}
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_changes_of_the_config_of_a_patched_model_outlive_unpatch(family, tmp_path):
    """resize_token_embeddings sets vocab_size, by which the loss reshapes logits. Another model has the same config."""
    if family == "gemma3" and VERSION < (5, 0):
        pytest.skip("the table of families is for Transformers 5")
    model = small() if family == "llama" else stock(family)
    own = model.config
    patch(model).resize_token_embeddings(120)
    model.config.get_text_config().use_cache = False
    unpatch(model)
    now, before = model.config.get_text_config(), own.get_text_config()
    assert (now.vocab_size, now.use_cache) == (120, False) and (before.vocab_size, before.use_cache) == (99, True)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}
    ids = tokens()
    loss = model(ids, labels=ids).loss
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").to(DEVICE).eval()
    assert torch.equal(loaded(ids, labels=ids).loss, loss)


def test_unpatch_gives_back_the_config_that_has_not_changed():
    model = small()
    own = model.config
    assert unpatch(patch(model)).config is own


def test_a_patched_model_is_saved_as_stock_and_loads_with_our_attention_by_name(tmp_path):
    stock = small()
    model, run = patched(stock), logits_of(tokens())
    model.save_pretrained(tmp_path)
    assert "llama_kernels" not in (tmp_path / "config.json").read_text()
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="llama_kernels").to(DEVICE).eval()
    compare_with_stock(by_name, stock, run)
    compare_with_stock(patch(by_name), stock, run)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE).eval()
    assert ops_of(loaded) == set()
    loaded.set_attn_implementation("llama_kernels")
    assert ops_of(loaded) == {"attention_forward"}
    compare_with_stock(loaded, stock, run)


# --- report ----------------------------------------------------------------------------------------------------------


def test_a_report_has_a_row_for_each_kind_of_module():
    rows = report(patch(small("qwen3"))).rows
    assert [(row.kind, row.cls, row.count) for row in rows] == [
        ("attention", "Qwen3Attention", 2), ("rms_norm", "Qwen3RMSNorm", 9), ("rope", "Qwen3Attention", 2),
        ("add_rms_norm", "Qwen3DecoderLayer", 2), ("qk_norm_rope", "Qwen3Attention", 2),
    ]  # fmt: skip
    assert all(row.ours for row in rows)


def test_a_report_of_a_stock_model_lists_what_patch_would_replace():
    rows = report(small()).rows
    assert {row.kind for row in rows} == {"attention", "rms_norm", "rope", "add_rms_norm"}
    assert not any(row.ours for row in rows)
    assert {row.why for row in rows} == {"patch has not replaced it"}


def test_a_report_of_a_model_with_our_attention_by_name_has_attention_only():
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
def test_patch_replaces_the_requested_operations_only(family, options, ops):
    stock = small(family)
    model = patched(stock, **options)
    other = {"llama": "qk_norm_rope", "qwen3": "rope" if "qk_norm_rope" in ops else ""}[family]
    # rms_norm and add_rms_norm are one operator.
    found, wanted = ops_of(model), {name for name in ops if name != other}
    assert {row.kind for row in report(model).rows if row.ours} == kinds_of(wanted, family)
    assert ("attention_forward" in found) == ("attention_forward" in wanted)
    assert any(name.startswith("rms_norm") for name in found) == ("rms_norm" in wanted)
    assert any(name.startswith(("rope", "qk_norm_rope")) for name in found) == bool(wanted & {"rope", "qk_norm_rope"})
    compare_with_stock(model, stock, logits_and_gradients(tokens()))


def kinds_of(ops: set[str], family: str) -> set[str]:
    kinds = {"attention" if name == "attention_forward" else name for name in ops}
    return kinds | {"rope"} if family == "qwen3" and "qk_norm_rope" in kinds else kinds


def test_strict_raises_if_a_requested_operation_stays_stock():
    assert patch(small(), strict=True)
    model = with_class(small(), "model.layers.1.self_attn", OwnAttention)
    before = snapshot(model, modeling_llama)
    with pytest.raises(ValueError, match=r"strict=False") as error:
        patch(model, strict=True)
    assert "OwnAttention" in str(error.value)
    assert snapshot(model, modeling_llama) == before
    patch(model, rope=False, attention=False, fuse=False, strict=True)


def test_layers_with_layer_norms_have_no_fusion_in_the_report():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("persimmon", vocab_size=99, **sizes))
    patch(model, strict=True)
    assert {row.kind for row in report(model).rows} == {"attention", "rope"}


def test_strict_allows_stock_operations_that_were_not_requested():
    model = with_class(small(), "model.norm", OwnRMSNorm)
    assert patch(model, rms_norm=False, fuse=False, strict=True)


def test_errors_name_the_function_and_the_argument():
    for function in (patch, unpatch, report):
        with pytest.raises(TypeError, match=rf"{function.__name__}: model is a str"):
            function("llama")
    for name in ("attention", "rms_norm", "rope", "fuse", "strict"):
        with pytest.raises(TypeError, match=rf"patch: {name} is 'no'; wanted True or False"):
            patch(small(), **{name: "no"})
    with pytest.raises(ValueError, match=r"patch: model is a Linear, in which nothing can be replaced"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"patch: model is a LlamaForCausalLM, in which nothing can be replaced"):
        patch(small(), attention=False, rms_norm=False, rope=False)


def test_patch_replaces_operations_in_every_model_of_a_module():
    stock = nn.ModuleList([small(), small("gemma2")])
    both = patched(stock)
    for ours, theirs in zip(both, stock, strict=True):
        assert not stock_rows(ours)
        compare_with_stock(ours, theirs, logits_of(tokens()))
    unpatch(both)
    assert not any(isinstance(module, Patched) for module in both.modules())


# --- warnings --------------------------------------------------------------------------------------------------------


def warnings_of(caplog: Any) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if r.name.startswith("llama_kernels") and r.levelno >= logging.WARNING
    ]


def test_one_warning_names_what_stays_stock(caplog):
    model = with_class(with_class(small(), "model.norm", OwnRMSNorm), "model.layers.1.self_attn", OwnAttention)
    with caplog.at_level(logging.INFO):
        patch(model)
    (warning,) = warnings_of(caplog)
    assert "OwnRMSNorm" in warning and "OwnAttention" in warning and "LlamaRMSNorm" not in warning


@pytest.mark.parametrize("options", [{}, {"fuse": False}, {"rms_norm": False}, {"rope": False}])
def test_there_is_no_warning_if_all_requested_operations_are_replaced(options, caplog):
    with caplog.at_level(logging.WARNING):
        patch(small("qwen3"), **options)
    assert warnings_of(caplog) == []


# --- speed -----------------------------------------------------------------------------------------------------------


def test_patching_a_model_of_70_billion_parameters_takes_under_200_ms_and_builds_no_module(monkeypatch):
    """On the meta device. A patched module is the same object with another class."""
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
