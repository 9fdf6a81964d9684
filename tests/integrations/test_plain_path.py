"""Without padding and packing a patched model calls attention exactly as `lk.attention(q, k, v)` does: the same
arguments of the operators, forward and backward, so the same kernels, tiles and launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="4.57")

import llama_kernels as lk
from llama_kernels.core.registry import KERNELS
from llama_kernels.integrations.transformers import patch
from tests.integrations.small import VERSION, Calls, not_interpreted, padded, small, tokens
from tests.support.environment import compiles
from tests.support.launching_nothing import launched  # noqa: F401  a fixture

pytestmark = not_interpreted

OPS = ("attention_forward", "attention_backward")
USE_CACHE = pytest.mark.parametrize(
    "use_cache",
    [
        True,
        pytest.param(
            False,
            marks=pytest.mark.skipif(
                VERSION < (5, 0), reason="Transformers 4 makes masks of documents for every batch without a cache"
            ),
        ),
    ],
)


def described(call: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments: tensors by what a launch depends on."""
    return {
        name: (tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x
        for name, x in call.items()
    }


def training_calls(model: Any, **call: Any) -> list[list[dict[str, Any]]]:
    """Of a step of training: the calls of each operator, layer after layer."""
    with Calls() as calls:
        model(tokens(), labels=tokens(), **call).loss.backward()
    forward, backward = (calls.of(name) for name in OPS)
    return [forward, backward[::-1]]


def bare_calls(call: dict[str, Any], do: torch.Tensor, window: tuple[int, int]) -> list[dict[str, Any]]:
    q, k, v = (call[name].detach().requires_grad_() for name in "qkv")
    with Calls() as calls:
        lk.attention(q, k, v, is_causal=True, window_size=window).backward(do)
    return [found for name in OPS for found in calls.of(name)]


def windows(model: Any) -> list[tuple[int, int]]:
    """Of each layer, from its config."""
    config = model.config
    size = getattr(config, "sliding_window", None)
    sliding = (
        ["sliding_attention"] * config.num_hidden_layers if size else ["full_attention"] * config.num_hidden_layers
    )
    kinds = config.layer_types if getattr(config, "layer_types", None) else sliding
    return [(size - 1, 0) if kind == "sliding_attention" else (-1, -1) for kind in kinds]


@USE_CACHE
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_a_step_of_training_calls_attention_as_it_is_called_bare(family, use_cache):
    if family == "gemma3_text" and VERSION < (5, 0):
        pytest.skip("Gemma 3 of Transformers 4 has no cache in training: its masks are of documents")
    model = patch(small(family, **({"query_pre_attn_scalar": 16} if family == "gemma3_text" else {}))).train()
    forwards, backwards = training_calls(model, use_cache=use_cache)
    assert len(forwards) == len(backwards) == 2
    for one, other, window in zip(forwards, backwards, windows(model), strict=True):
        bare = bare_calls(one, other["do"], window)
        assert one["kv_start"] is one["kv_end"] is one["cu_seqlens_q"] is None
        for call, expected in zip((one, other), bare, strict=True):
            assert described(call) == described(expected)


def test_padding_is_what_needs_bounds():
    """The test above can fail."""
    model = patch(small())
    forwards, _ = training_calls(model, attention_mask=padded(tokens(), "left"))
    assert all(call["kv_start"] is not None and call["kv_end"] is not None for call in forwards)


@pytest.mark.parametrize("attention_mask", [None, "all tokens"])
def test_prefill_and_decoding_steps_without_padding(attention_mask):
    """Without a mask no bounds; a step of a mask that hides nothing is right, and need not be plain."""
    model, ids = patch(small()), tokens(2, 10)
    with Calls() as calls, torch.no_grad():
        out = model(ids[:, :8], use_cache=True)
        for i in (8, 9):
            mask = None if attention_mask is None else torch.ones_like(ids[:, : i + 1])
            cache = {
                "cache" if VERSION >= (5, 24) else "past_key_values": getattr(out, "cache", None) or out.past_key_values
            }
            out = model(ids[:, i : i + 1], attention_mask=mask, use_cache=True, **cache)
    made = calls.of("attention_forward")
    assert all(call["kv_start"] is None and call["kv_end"] is None for call in made[:2])
    if attention_mask is None and VERSION >= (5, 0):
        assert len(made) == 6 and all(call["kv_start"] is None for call in made)


@compiles
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_step_of_training_launches_what_bare_attention_launches(family, launched):  # noqa: F811
    """On an H100, in bfloat16, with heads of 64: grid, kernel, and its metadata, which are those of one tile."""
    model = small(family, head_dim=64, num_hidden_layers=1).bfloat16()
    forwards, backwards = training_calls(patch(model).train())
    (window,) = windows(model)
    bare = bare_calls(forwards[0], backwards[0]["do"], window)

    def launches(calls: list[dict[str, Any]]) -> list[Any]:
        launched.clear()
        KERNELS["attention_forward"](*calls[0].values())
        KERNELS["attention_backward"](*calls[1].values())
        return [args[:3] + args[4:6] for args in launched]

    ours, theirs = launches([forwards[0], backwards[0]]), launches(bare)
    assert len(ours) >= 3 and ours == theirs
    padded_calls = training_calls(model, attention_mask=padded(tokens(), "left"))
    assert launches([calls[0] for calls in padded_calls]) != theirs  # the comparison can fail
