"""Without padding and packing, a patched model calls attention as `lk.attention(q, k, v)` does.

The arguments of the operators are the same, forward and backward, so kernels, tiles and launches are the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core.registry import KERNELS
from llama_kernels.integrations.transformers import patch
from tests.integrations.comparison import padding_mask
from tests.integrations.small import CACHE, HOST_KNOWS_POSITIONS, VERSION, Calls, not_interpreted, small, tokens
from tests.support.environment import compiles
from tests.support.launching_nothing import launched  # noqa: F401  a fixture

pytestmark = not_interpreted

OPS = ("attention_forward", "attention_backward")


def described(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operator, with the properties of a tensor on which a launch depends in its place."""
    return {
        name: (tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x
        for name, x in call.items()
    }


def training_calls(model: Any, **call: Any) -> list[list[dict[str, Any]]]:
    """The calls of each operator of OPS in a step of training, in the order of the layers."""
    with Calls() as calls:
        model(tokens(), labels=tokens(), **call).loss.backward()
    forward, backward = (calls.of(name) for name in OPS)
    return [forward, backward[::-1]]


def direct_calls(call: dict[str, Any], do: torch.Tensor, window: tuple[int, int]) -> list[dict[str, Any]]:
    """The calls of each operator of OPS when `lk.attention` is called with the tensors of `call`."""
    q, k, v = (call[name].detach().requires_grad_() for name in "qkv")
    with Calls() as calls:
        lk.attention(q, k, v, is_causal=True, window_size=window).backward(do)
    return [found for name in OPS for found in calls.of(name)]


def windows(model: Any) -> list[tuple[int, int]]:
    """The window_size of each layer, from the config."""
    config = model.config
    size = getattr(config, "sliding_window", None)
    default = ["sliding_attention" if size else "full_attention"] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or default
    return [(size - 1, 0) if kind == "sliding_attention" else (-1, -1) for kind in kinds]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_a_training_step_calls_attention_with_the_arguments_of_a_direct_call(family, use_cache):
    if not use_cache and VERSION < (5, 0):
        pytest.skip("Transformers 4 makes masks of documents for every batch without a cache")
    if family == "gemma3_text" and VERSION < (5, 0):
        pytest.skip("Gemma 3 of Transformers 4 has no cache in training: its masks are of documents")
    model = patch(small(family)).train()
    forwards, backwards = training_calls(model, use_cache=use_cache)
    assert len(forwards) == len(backwards) == 2
    for one, other, window in zip(forwards, backwards, windows(model), strict=True):
        direct = direct_calls(one, other["do"], window)
        assert one["kv_start"] is one["kv_end"] is one["cu_seqlens_q"] is None
        for call, expected in zip((one, other), direct, strict=True):
            assert described(call) == described(expected)


def test_a_training_step_with_padding_passes_bounds():
    model = patch(small())
    forwards, _ = training_calls(model, attention_mask=padding_mask(tokens(), "left"))
    assert all(call["kv_start"] is not None and call["kv_end"] is not None for call in forwards)


@pytest.mark.parametrize("attention_mask", [None, "all tokens"])
def test_prefill_and_decoding_without_padding_pass_no_bounds(attention_mask):
    """A decoding step with a mask that hides nothing may pass them."""
    model, ids = patch(small()), tokens(2, 10)
    with Calls() as calls, torch.no_grad():
        out = model(ids[:, :8], use_cache=True)
        for i in (8, 9):
            mask = None if attention_mask is None else torch.ones_like(ids[:, : i + 1])
            out = model(ids[:, i : i + 1], attention_mask=mask, use_cache=True, **{CACHE: getattr(out, CACHE)})
    made = calls.of("attention_forward")
    assert all(call["kv_start"] is None and call["kv_end"] is None for call in made[:2])
    if attention_mask is None and HOST_KNOWS_POSITIONS:
        assert len(made) == 6 and all(call["kv_start"] is None for call in made)


@compiles
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_training_step_launches_what_a_direct_call_launches(family, launched):  # noqa: F811
    """On an H100, in bfloat16, with heads of 64: the same grid, kernel and metadata, so the same tile."""
    model = small(family, head_dim=64, num_hidden_layers=1).bfloat16()
    forwards, backwards = training_calls(patch(model).train())
    (window,) = windows(model)
    direct = direct_calls(forwards[0], backwards[0]["do"], window)

    def launches(calls: list[dict[str, Any]]) -> list[Any]:
        launched.clear()
        KERNELS["attention_forward"](*calls[0].values())
        KERNELS["attention_backward"](*calls[1].values())
        return [args[:3] + args[4:6] for args in launched]

    ours, theirs = launches([forwards[0], backwards[0]]), launches(direct)
    assert len(ours) >= 3 and ours == theirs
    padded_calls = training_calls(model, attention_mask=padding_mask(tokens(), "left"))
    assert launches([calls[0] for calls in padded_calls]) != theirs  # so the comparison can fail
