"""`report` after another library has changed the model: it says what a call runs, not what `patch` did.

Each test counts our operators in a forward, and compares the counts with those of the report.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from llama_kernels.integrations.transformers import patch, report, source
from llama_kernels.integrations.transformers.attention import attention_forward
from tests.integrations.small import VERSION, Calls, as_kernels_wraps, not_interpreted, small, stock_rows, tokens
from tests.integrations.user_classes import OwnAttention, OwnRMSNorm, with_class
from tests.support.environment import DEVICE

pytestmark = not_interpreted

KINDS = ("attention", "rms_norm", "rope", "add_rms_norm")
NORM, ADD = ("rms_norm", "LlamaRMSNorm"), ("add_rms_norm", "LlamaDecoderLayer")
ATTENTION, ROPE = ("attention", "LlamaAttention"), ("rope", "LlamaAttention")
FIRST = "model.layers.0.post_attention_layernorm"  # a norm that the residual add before it is fused with


def reported(model: nn.Module) -> dict[str, int]:
    """The number of modules in which each operation is ours, by the report."""
    rows = report(model).rows
    return {kind: sum(row.count for row in rows if row.kind == kind and row.ours) for kind in KINDS}


def called(model: nn.Module) -> dict[str, int]:
    """The number of calls of each of our operations in a forward."""
    with Calls() as calls, torch.no_grad():
        model(tokens(), use_cache=False)
    norms = calls.of("rms_norm_forward")
    counts = [len(calls.of("attention_forward")), len(norms), len(calls.of("rope"))]
    return dict(zip(KINDS, [*counts, sum(norm["residual"] is not None for norm in norms)], strict=True))


def check(model: nn.Module, stock: dict[tuple[str, str], str]) -> None:
    """`report` names these stock operations, with these words in their reasons, and a forward runs all others."""
    why = stock_rows(model)
    assert why.keys() == stock.keys()
    for row, words in stock.items():
        assert words in why[row], why[row]
    assert reported(model) == called(model)


# --- changes of one module -------------------------------------------------------------------------------------------


def half(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * 0.5


def own_forward(module: nn.Module) -> None:
    module.forward = types.MethodType(half, module)  # as Liger-Kernel and kernelize do


def wrapped(module: nn.Module) -> None:
    forward = module.forward

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    module.forward = wrapper


def partly_bound(module: nn.Module) -> None:
    module.forward = functools.partial(module.forward)


def compiled_forward(module: nn.Module) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def compiled(module: nn.Module) -> None:
    module.compile(backend="eager")


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, y: y)


def offloaded(module: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(module, execution_device=torch.device(DEVICE))


def parametrized(module: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())


def subclass(module: nn.Module) -> None:
    module.__class__ = type("Own", (type(module),), {"forward": half})


def calling_super(module: nn.Module) -> None:
    cls = type(module)

    class Own(cls):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    Own.__name__ = cls.__name__
    module.__class__ = Own


class Weight(torch.Tensor):
    """A subclass, as DTensor and quantized weights are. Operations on it return plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def another_weight(module: nn.Module) -> None:
    module._parameters["weight"] = module.weight.detach().as_subclass(Weight)  # type: ignore[assignment]


CHANGES: dict[Callable[[nn.Module], None], dict[tuple[str, str], str]] = {
    own_forward: {NORM: "set on the instance: half of tests.integrations.test_report", ADD: "post_attention_layernorm"},
    wrapped: {ADD: "hooks, a wrapper or another forward on post_attention_layernorm"},
    partly_bound: {ADD: "wrapper"},
    compiled_forward: {ADD: "wrapper"},
    compiled: {ADD: "wrapper"},
    hooked: {ADD: "hooks"},
    offloaded: {ADD: "wrapper"},
    parametrized: {},
    subclass: {("rms_norm", "Own"): "its class now has another: half", ADD: "another forward"},
    another_weight: {NORM: "a weight of RMSNorm is a Weight", ADD: "a weight of RMSNorm is a Weight"},
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_norm(change):
    model = patch(small())
    change(model.get_submodule(FIRST))
    check(model, CHANGES[change])


def test_a_norm_whose_class_calls_super():
    model = patch(small())
    calling_super(model.get_submodule("model.norm"))
    check(model, {})


@pytest.mark.parametrize(
    ("norm", "why"),
    [(modeling_llama.LlamaRMSNorm, "patch has not replaced it"), (nn.RMSNorm, "its forward is not known code")],
)
def test_a_norm_that_was_swapped(norm, why):
    model = patch(small())
    model.model.layers[0].post_attention_layernorm = norm(64).to(DEVICE)
    check(model, {("rms_norm", norm.__name__): why, ADD: "post_attention_layernorm"})


def test_a_layer_with_a_forward_of_its_own():
    model = patch(small())
    layer = model.model.layers[0]
    layer.forward = types.MethodType(lambda self, x, **kwargs: x, layer)
    assert "set on the instance" in stock_rows(model)[ADD]
    assert reported(model)["add_rms_norm"] == called(model)["add_rms_norm"] == 1


# --- attention -------------------------------------------------------------------------------------------------------


def attention_of_zeros(self, hidden_states, *args, **kwargs):
    return torch.zeros_like(hidden_states), None


def test_an_attention_forward_set_on_the_instance():
    model = patch(small())
    attention = model.model.layers[0].self_attn
    attention.forward = types.MethodType(attention_of_zeros, attention)
    check(model, {ATTENTION: "attention_of_zeros", ROPE: "attention_of_zeros"})


@pytest.mark.parametrize("rope", [True, False])
def test_an_attention_class_whose_forward_was_replaced(rope, monkeypatch):
    """A patched module runs a copy of the forward that its class had. With rope=False, it runs its class's own."""
    model = patch(small(), rope=rope)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", attention_of_zeros)
    check(model, {} if rope else {ATTENTION: "its class now has another: attention_of_zeros"})


def test_an_attention_class_that_calls_super():
    model = with_class(patch(small()), "model.layers.0.self_attn", OwnAttention)
    check(model, {("rope", "OwnAttention"): "its forward is not that of LlamaAttention"})


def test_another_attn_implementation():
    model = patch(small())
    model.set_attn_implementation("sdpa")
    check(model, {ATTENTION: "its config now names 'sdpa'"})


def no_attention(module, query, *args, **kwargs):
    return query.transpose(1, 2).contiguous(), None


class NoAttention:
    def __call__(self, *args, **kwargs):
        return no_attention(*args, **kwargs)


def test_another_function_registered_under_our_name(monkeypatch):
    model = patch(small())
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "llama_kernels", no_attention)
    check(model, {ATTENTION: "no_attention of tests.integrations.test_report is registered under the name"})
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "llama_kernels", functools.partial(no_attention))
    check(model, {ATTENTION: "no_attention of tests.integrations.test_report is registered under the name"})
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "llama_kernels", NoAttention())
    check(model, {ATTENTION: "a NoAttention of tests.integrations.test_report is registered under the name"})
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "llama_kernels", functools.partial(attention_forward))
    check(model, {})
    around = functools.wraps(attention_forward)(lambda *args, **kwargs: attention_forward(*args, **kwargs))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "llama_kernels", around)
    check(model, {})


def test_dropout_of_attention_counts_in_training_only():
    model = patch(small(attention_dropout=0.1))
    check(model, {})
    check(model.train(), {ATTENTION: "in training mode, with attention dropout 0.1"})


# --- the whole model -------------------------------------------------------------------------------------------------


def test_a_model_in_float64():
    model = patch(small()).double()
    why = "its parameters are float64"
    check(model, {ATTENTION: why, NORM: why, ROPE: why, ADD: why})


def test_rotary_functions_that_were_replaced_do_not_change_a_patched_model(monkeypatch):
    """Liger-Kernel sets its function in the file of the model's classes."""
    model = patch(small())
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k))
    check(model, {})
    assert {row.why for row in report(model).rows} == {"through AttentionInterface", "known code"}


def test_compiled_models_and_replicas():
    model = patch(small())
    assert report(torch.compile(model, backend="eager")) == report(model)
    assert report(copy.deepcopy(model)) == report(model)
    model.compile(backend="eager")
    assert all(row.ours for row in report(model).rows)


def test_adapters_of_peft():
    """A norm that PEFT copies to train it is called through a wrapper, so the add before it is not fused."""
    peft = pytest.importorskip("peft", reason="needs peft")
    plain = peft.get_peft_model(patch(small()), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    check(plain, {})
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"])
    with_norms = peft.get_peft_model(patch(small()), config)
    assert "post_attention_layernorm" in stock_rows(with_norms)[ADD]
    modules, calls = reported(with_norms), called(with_norms)
    assert modules.pop("rms_norm") == calls.pop("rms_norm") + 2  # PEFT keeps the two that it copied
    assert modules == calls


def test_quantized_linear_layers():
    model = patch(small()).cpu()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    check(quantized, {})


def test_kernels_rotary_function(monkeypatch):
    """kernelize sets a forward on the object that the package kernels makes of apply_rotary_pos_emb."""
    wrapper = as_kernels_wraps(source.called_by(modeling_llama.apply_rotary_pos_emb))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", wrapper)
    model = patch(small())
    check(model, {})
    wrapper.forward = lambda q, k, *args, **kwargs: (q, k)
    check(model, {ROPE: "kernelize has replaced apply_rotary_pos_emb"})


def test_a_subclass_of_a_stock_norm_set_afterwards():
    model = with_class(patch(small()), "model.norm", OwnRMSNorm)
    check(model, {("rms_norm", "OwnRMSNorm"): "its forward is not known code"})


@pytest.mark.skipif(VERSION < (5, 0), reason="this release of Liger-Kernel takes Transformers 5")
def test_norms_that_liger_replaced(monkeypatch):
    """Liger sets a forward on each norm. The rotary function that it replaces is not the one of a patched model.

    A forward is not run: Liger's norm needs a GPU.
    """
    liger = pytest.importorskip("liger_kernel.transformers", reason="needs liger-kernel")
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm"):  # Liger replaces these for all models: restored afterwards
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = patch(small())
    others = {"swiglu": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    liger._apply_liger_kernel_to_instance(model=model, rope=True, rms_norm=True, **others)
    assert reported(model) == {"attention": 2, "rms_norm": 0, "rope": 2, "add_rms_norm": 0}
    why = stock_rows(model)
    assert why[NORM].endswith("forward of liger_kernel.transformers.rms_norm")
    assert why[ADD] == "hooks, a wrapper or another forward on post_attention_layernorm"
