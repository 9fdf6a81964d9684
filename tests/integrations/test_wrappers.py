"""Patched models whose modules or functions other libraries wrap: results are those of stock."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_kernels.integrations.transformers import patch, source, unpatch
from llama_kernels.integrations.transformers.attention import attention_forward
from tests.integrations.changed_models import changed, compare_with_stock, families, on_cpu, orders, replaced
from tests.integrations.families import batch, stock
from tests.integrations.small import as_kernels_wraps
from tests.support.environment import DEVICE

pytestmark = on_cpu

# --- accelerate ------------------------------------------------------------------------------------------------------


def offloaded_to_cpu(model: nn.Module, folder) -> nn.Module:
    return accelerate().cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_to_disk(model: nn.Module, folder) -> nn.Module:
    return accelerate().disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched(model: nn.Module, folder) -> nn.Module:
    """One layer stays on the CPU. The other layer and the last norm are offloaded to disk."""
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    parts |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    return accelerate().dispatch_model(model, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def accelerate():
    return pytest.importorskip("accelerate")


@orders
@pytest.mark.parametrize("change", [offloaded_to_cpu, offloaded_to_disk, dispatched])
@families
def test_offloading_by_accelerate_gives_the_results_of_stock(family, change, order, tmp_path):
    model = changed(functools.partial(change, folder=tmp_path), stock(family), order)
    assert "attention" in replaced(model)
    assert ("rms_norm" in replaced(model)) == (order == "patch first")
    compare_with_stock(family, model, "far positions")
    compare_with_stock(family, unpatch(model), "far positions")


# --- wrappers of our attention ---------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
    """A context in which another function is registered under the name of our attention."""

    @contextlib.contextmanager
    def registered(function) -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "llama_kernels", function)
            yield

    return registered


def test_a_wrapper_registered_under_our_name_is_called(registered):
    """DeepSpeed's UlyssesSPAttentionHF registers itself in this way."""
    calls = []

    def wrapper(module, *args, **kwargs):
        calls.append(module.layer_idx)
        return attention_forward(module, *args, **kwargs)

    model = patch(stock("llama"))
    with registered(wrapper):
        compare_with_stock("llama", model)
    assert calls == [0, 1]
    compare_with_stock("llama", model)
    assert calls == [0, 1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_windows_and_documents_need_no_mask(family, registered):
    """A wrapper may drop the mask, as DeepSpeed's does, which collects the keys of all ranks."""

    def wrapper(module, query, key, value, attention_mask, *args, **kwargs):
        return attention_forward(module, query, key, value, None, *args, **kwargs)

    model, ids = patch(stock(family)), batch(family).ids
    positions = torch.cat([torch.arange(9), torch.arange(11)]).expand_as(ids)
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        with registered(wrapper):
            logits = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("mapping", [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS], ids=["attention", "mask"])
@pytest.mark.parametrize("name", ["tree", "sdpa"])
def test_attention_that_another_library_registered_stays(monkeypatch, caplog, name, mapping):
    """TRL's AsyncGRPOTrainer registers attention over a tree, whose edges it passes to the model's forward. Ring
    attention and DeepSpeed register theirs under names of Transformers."""

    def tree_attention(module, query, key, value, attention_mask, tree=1.0, **kwargs):
        return ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"](module, query, key, value, None, **kwargs)[
            0
        ] * tree, None

    def only_diagonal(kv_length, **kwargs):  # in a call without a cache
        return torch.eye(kv_length, dtype=torch.bool, device=DEVICE)[None, None]

    if name == "tree":  # its functions are those of "sdpa", but for the one that is tested
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            monkeypatch.setitem(functions._local_mapping, name, functions["sdpa"])
    function = tree_attention if mapping is ALL_ATTENTION_FUNCTIONS else only_diagonal
    monkeypatch.setitem(mapping._local_mapping, name, function)
    theirs = stock("llama")
    theirs.set_attn_implementation(name)
    with caplog.at_level(logging.WARNING, "llama_kernels"):
        model = patch(copy.deepcopy(theirs))
    assert function.__name__ in caplog.text and "attention" not in replaced(model) >= {"rms_norm", "rope"}
    with torch.no_grad():
        logits, expected = (m(batch("llama").ids, tree=0.25, use_cache=False).logits for m in (model, theirs))
    torch.testing.assert_close(logits, expected)
    with pytest.raises(ValueError, match="of which this stays stock"):
        patch(copy.deepcopy(theirs), strict=True)


def test_an_eager_function_that_another_library_replaced_stays(monkeypatch):
    """Libraries that read or change attention weights replace it in the module of a model."""
    theirs = stock("llama")
    assert theirs.config._attn_implementation == "eager"
    module = sys.modules[type(theirs).__module__]
    eager = module.eager_attention_forward

    def halved(*args, **kwargs):
        out, weights = eager(*args, **kwargs)
        return out / 2, weights

    monkeypatch.setattr(module, "eager_attention_forward", halved)
    model = patch(copy.deepcopy(theirs))
    assert "attention" not in replaced(model) >= {"rms_norm", "rope"}
    with torch.no_grad():
        torch.testing.assert_close(*(m(batch("llama").ids, use_cache=False).logits for m in (model, theirs)))
    theirs.set_attn_implementation("sdpa")
    assert "attention" in replaced(patch(theirs))


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "paged|eager"])
def test_attention_functions_of_transformers_are_replaced(name):
    model = stock("llama")
    model.config._attn_implementation_internal = name  # without the checks of Transformers for its packages
    assert "attention" in replaced(patch(model))


def test_an_attention_function_that_torch_compile_leaves_out_is_replaced(monkeypatch):
    """Transformers 5.20 wraps its own so."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", torch.compiler.disable(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    assert "attention" in replaced(patch(stock("llama")))


# --- the package kernels ---------------------------------------------------------------------------------------------


def by_kernels(function):
    return pytest.importorskip("kernels").use_kernel_forward_from_hub("rotary_pos_emb")(function)


@pytest.mark.parametrize("wrap", [as_kernels_wraps, by_kernels])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_rotary_function_wrapped_by_kernels_is_replaced_until_kernelize_sets_its_forward(monkeypatch, family, wrap):
    """All models of the family then run that forward, patched ones too."""
    module = sys.modules[type(stock(family)).__module__]
    wrapped = wrap(source.called_by(module.apply_rotary_pos_emb))
    monkeypatch.setattr(module, "apply_rotary_pos_emb", wrapped)
    theirs, model = stock(family), patch(stock(family))
    assert "rope" in replaced(model) and ("qk_norm_rope" in replaced(model)) == (family == "qwen3")
    compare_with_stock(family, model)
    compare_with_stock(family, copy.deepcopy(model))
    wrapped.forward = lambda q, k, cos, sin: (q * 2, k)
    ids = batch(family).ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits)
