"""Patched Hugging Face models under context_parallel, on 2 processes, against the stock model on one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", minversion="5.0")

from torch.distributed.device_mesh import DeviceMesh
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llama_kernels.distributed import Layout, context_parallel, models
from llama_kernels.integrations.transformers import patch
from tests.distributed import hf_models
from tests.distributed.comparison import check
from tests.distributed.processes import run
from tests.integrations.families import stock
from tests.integrations.small import tokens
from tests.support.environment import INTERPRETED

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(INTERPRETED, reason="about what is sent to whom; the kernels have other tests"),
]

# Family, method, packed documents, checkpointed layers. Gemma 3 and GPT-OSS have sliding windows; GPT-OSS has sinks.
CASES = [
    ("llama", "ring", False, False),
    ("llama", "all_gather", True, False),
    ("llama", "ulysses", True, True),
    ("llama", "ring", True, True),
    ("gemma3_text", "ring", True, False),
    ("gpt_oss", "ring", False, False),
    ("qwen3", "ulysses", False, False),
]


@functools.cache
def results() -> dict[str, Any]:
    return run({f"{case}": (hf_models.errors_and_tokens, case) for case in CASES}, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_whole_batch(case):
    result = results()[f"{case}"]
    check(result)
    assert result["tokens"] == hf_models.TOKENS // 2


@pytest.fixture
def model() -> torch.nn.Module:
    return patch(stock("llama").cpu())  # the processes of these tests meet over gloo


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_bad_arguments_are_named(model, mesh):
    ids, layout = torch.zeros(2, 32, dtype=torch.int64), Layout(32, 1)
    with pytest.raises(ValueError, match="model is not patched"), context_parallel(stock("llama"), mesh, layout=layout):
        pass
    with context_parallel(model, mesh, layout=layout):
        with pytest.raises(ValueError, match=r"attention_mask is given.*position_ids"):
            model(ids, attention_mask=torch.ones_like(ids))
        with pytest.raises(ValueError, match="output_router_logits is True"):
            model(ids, output_router_logits=True)
        with pytest.raises(ValueError, match=r"input_ids is of shape \(2, 31\); wanted \(B, 32\)"):
            model(ids[:, 1:])
        with pytest.raises(ValueError, match=r"input_ids is missing; wanted \(B, 32\)"):
            model(position_ids=ids)
        for name in ("labels", "shift_labels"):
            for other in (ids[:, 1:], ids[:1], torch.cat((ids, ids), 1), ids[0]):
                with pytest.raises(ValueError, match=rf"{name} is of shape .*; wanted \(2, 32\), as input_ids"):
                    model(ids, **{name: other})


def test_a_model_with_chunked_attention_is_refused(mesh):
    """Llama 4: its chunked layers would see the whole sequence."""
    model = patch(stock("llama4_text").cpu())
    match = r"context_parallel: model is a Llama4ForCausalLM with layers of chunked_attention; wanted layers of full_"
    with pytest.raises(ValueError, match=match), context_parallel(model, mesh, layout=Layout(32, 1)):
        pass


# Each has a layer that combines tokens without attention: a recurrence, linear attention or a convolution.
OTHER_LAYERS = [
    "bamba", "falcon_h1", "granitemoehybrid", "lfm2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_next",
    "recurrent_gemma", "zamba2",
]  # fmt: skip


@pytest.mark.parametrize("family", OTHER_LAYERS)
def test_a_model_with_recurrent_or_convolutional_layers_is_refused(family, mesh, monkeypatch):
    """By its config, and by its modules where the config does not say it."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {family}")
    model, layout = patch(stock(family).cpu()), Layout(32, 1)
    with pytest.raises(ValueError, match="context_parallel: model is a"), context_parallel(model, mesh, layout=layout):
        pass
    monkeypatch.setattr(models, "_refuse_listed_kinds", lambda *_: None)
    with pytest.raises(ValueError, match="which combines tokens"), context_parallel(model, mesh, layout=layout):
        pass


@pytest.mark.parametrize("added", [torch.nn.Conv1d(64, 64, 3), torch.nn.GRU(64, 64)], ids=["convolution", "GRU"])
def test_a_model_to_which_a_layer_over_tokens_was_added_is_refused(added, model, mesh):
    model.model.layers[0].mlp.extra = added
    match = rf"with a {type(added).__name__}, which combines tokens"
    with pytest.raises(ValueError, match=match), context_parallel(model, mesh, layout=Layout(32, 1)):
        pass


def test_a_window_that_a_layer_does_not_pass_on_is_refused(mesh):
    """Only the mask of Phi MoE says its window."""
    if "phimoe" not in CONFIG_MAPPING:
        pytest.skip("this Transformers has no phimoe")
    model, ids = patch(stock("phimoe").cpu()), torch.zeros(1, 32, dtype=torch.int64)
    with context_parallel(model, mesh, layout=Layout(32, 1)), pytest.raises(ValueError, match="a sliding window of 7"):
        model(ids)


def loss_and_logits(call: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    out = call(input_ids=ids, labels=ids)
    return [out.loss, out.logits]


def test_a_model_whose_attention_is_named_by_its_text_config_only_takes_text(mesh):
    whole = patch(stock("gemma3").cpu())
    assert whole.config._attn_implementation != "llama_kernels"
    ids = tokens(2, 32).cpu()
    expected = loss_and_logits(whole, ids)
    with context_parallel(whole, mesh, layout=Layout(32, 1)):
        torch.testing.assert_close(loss_and_logits(whole, ids), expected)
        for name in ("token_type_ids", "pixel_values"):
            with pytest.raises(ValueError, match=f"{name} is given; wanted None: text only"):
                whole(ids, **{name: torch.zeros(2, 32)})


def test_a_model_in_distributed_data_parallel_is_taken(model, mesh):
    ids = tokens(2, 32).cpu()
    expected, wrapper = loss_and_logits(model, ids), torch.nn.parallel.DistributedDataParallel(model)
    with context_parallel(wrapper, mesh, layout=Layout(32, 1)):
        torch.testing.assert_close(loss_and_logits(wrapper, ids), expected)
        with pytest.raises(ValueError, match=r"input_ids is of shape \(2, 31\)"):
            wrapper(ids[:, 1:])


@pytest.mark.parametrize("shape", [(3, 2, 32), (32,), (2, 31)])
def test_position_ids_of_another_shape_are_named(shape, model, mesh):
    positions = torch.zeros(shape, dtype=torch.int64)
    with (
        context_parallel(model, mesh, layout=Layout(32, 1)),
        pytest.raises(ValueError, match="position_ids is of shape"),
    ):
        model(tokens(2, 32).cpu(), position_ids=positions)


def test_a_model_that_runs_stock_attention_since_patch_is_not_patched(model, mesh):
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="not patched"), context_parallel(model, mesh, layout=Layout(32, 1)):
        pass


def test_a_backward_of_checkpointed_layers_outside_is_an_error(model, mesh):
    model.train()
    model.gradient_checkpointing_enable()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with context_parallel(model, mesh, layout=Layout(8, 1)):
        loss = model(ids, labels=ids).loss
    with pytest.raises(ValueError, match=r"attention_mask is that of a context_parallel.*Run the backward"):
        loss.backward()


def test_attention_that_is_not_causal_is_refused(model, mesh):
    model.model.layers[0].self_attn.is_causal = False
    match = r"model is a model with this in an attention layer: is_causal=False; wanted causal attention"
    with context_parallel(model, mesh, layout=Layout(32, 1)), pytest.raises(ValueError, match=match):
        model(tokens(1, 32).cpu())


def test_a_mask_that_a_hook_drops_is_an_error(model, mesh):
    """As accelerate's hooks do. Attention would see the keys of its own process only."""

    def drop(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "attention_mask": None, "is_causal": True}

    model.model.layers[0].self_attn.register_forward_pre_hook(drop, with_kwargs=True)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with context_parallel(model, mesh, layout=Layout(8, 1)), pytest.raises(ValueError, match="leave cp_size out"):
        model(ids, labels=ids)


def test_the_model_is_as_before_afterwards(model, mesh):
    ids = torch.arange(3, 11)[None]
    before = model(ids).logits
    with context_parallel(model, mesh, layout=Layout(8, 1)):
        torch.testing.assert_close(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
