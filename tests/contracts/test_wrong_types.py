"""Every argument of every public function, replaced by values that no argument takes: the error names the argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import llama_kernels as lk
from llama_kernels import layers
from tests.support.bad_inputs import F, I, all_arguments
from tests.support.ops import OPS

WRONG = ("x", float("nan"), float("inf"), [1.0], object())
TENSORS = (torch.empty(0), F(2, 3).double(), I(2, 3, dtype=torch.int64), I(2, dtype=torch.bool))


def _with_defaults(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, and the defaults of the other arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **given}


def _refuse(call: Callable[..., Any], args: dict[str, Any], argument: str, value: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^llama_kernels\.{said}"):
        call(**{**args, argument: value})
        pytest.fail(f"{argument}={value!r} was accepted")


@pytest.mark.parametrize("op", OPS)
def test_every_argument_of_an_op(op):
    call = getattr(lk, op)
    args = _with_defaults(call, all_arguments(op))
    call(**args)
    for argument in args:
        for value in WRONG:
            _refuse(call, args, argument, value, rf"{op}: {argument} is ")
        for value in TENSORS:  # the error may name another argument, which does not fit this one
            _refuse(call, args, argument, value, rf"{op}: ")


def _norm() -> torch.nn.Module:
    norm = layers.RMSNorm()
    norm.weight, norm.variance_epsilon = torch.ones(8), 1e-6
    return norm


_HEADS, _LSE, _ANGLES = F(2, 4, 6, 8), F(2, 4, 6), F(2, 6, 8)
_SCALING = {"rope_type": "dynamic", "factor": 2.0}
# By the name in errors: the function, and arguments without defaults, or whose defaults take no other value.
OTHERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "rope_frequencies": (lk.rope_frequencies, {"head_dim": 8, "scaling": _SCALING, "max_position_embeddings": 8}),
    "rope_tables": (lk.rope_tables, {"inv_freq": torch.ones(4), "positions": 5}),
    "rope_axes": (lk.rope_axes, {"sections": (1, 2)}),
    "merge_attention": (lk.merge_attention, {"outs": [_HEADS], "lses": [_LSE]}),
    "hopper_attention": (lk.hopper_attention, {"enabled": lk.hopper_attention.enabled}),
    "nn.RMSNorm": (lk.nn.RMSNorm, {"hidden_size": 8}),
    "nn.RotaryEmbedding": (lk.nn.RotaryEmbedding(8).forward, {"x": F(2, 8), "position_ids": torch.arange(4)[None]}),
    "layers.ApplyRotaryPosEmb": (
        layers.ApplyRotaryPosEmb().forward, {"q": _HEADS, "k": _HEADS, "cos": _ANGLES, "sin": _ANGLES}),
}  # fmt: skip
# What a module passes on is named by the function that gets it.
PASSED_ON: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = {
    "rotary embedding": (lk.nn.RotaryEmbedding, {"head_dim": 8}, {"frequency_dtype": "dtype"}),
    "norm": (lk.nn.RMSNorm(8).forward, {"x": F(2, 8)}, {}),
    "layer of a norm": (_norm().forward, {"hidden_states": F(2, 8)}, {"hidden_states": "x"}),
}


@pytest.mark.parametrize("function", OTHERS)
def test_every_argument_of_another_function(function):
    call, given = OTHERS[function]
    args = _with_defaults(call, given)
    call(**args)
    for argument in args:
        for value in WRONG:
            _refuse(call, args, argument, value, rf"{function}: {argument}\b")


@pytest.mark.parametrize("function", PASSED_ON)
def test_every_argument_that_a_module_passes_on(function):
    call, given, names = PASSED_ON[function]
    args = _with_defaults(call, given)
    args.pop("positional", None)
    call(**args)
    for argument in args:
        for value in WRONG:
            _refuse(call, args, argument, value, rf"\w+: {names.get(argument, argument)} ")
