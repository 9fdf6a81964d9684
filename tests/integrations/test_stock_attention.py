"""What the attention kernels do not compute runs as in stock, with one warning, or is refused with a message."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="4.57")

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llama_kernels.integrations.transformers import attention, patch, report
from tests.integrations.checks import DoubleSoftmax
from tests.integrations.small import (
    VERSION,
    Calls,
    as_stock,
    logits_and_gradients,
    logits_of,
    not_interpreted,
    padded,
    small,
    tokens,
)
from tests.support.environment import DEVICE

pytestmark = not_interpreted


@pytest.fixture
def warnings(caplog):
    """The warnings of our attention so far; each reason is given once in a process."""
    attention._warn_of_stock.cache_clear()
    caplog.set_level(logging.WARNING)
    yield lambda: [r.getMessage() for r in caplog.records if r.name == attention.__name__]
    attention._warn_of_stock.cache_clear()


def kernels_run(model: Any, **call: Any) -> bool:
    with Calls() as calls, torch.no_grad():
        model(tokens(), **call)
    return bool(calls.of("attention_forward"))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_dropout_of_probabilities(family, side, warnings):
    """By SDPA, or, with a softcap or sinks, by the eager function: the same elements from one seed, and one warning."""
    eager = family in ("gemma2", "gpt_oss")
    stock = small(family, attention="eager" if eager else "sdpa", attention_dropout=0.3).train()
    ours = patch(copy.deepcopy(stock))
    step = logits_and_gradients(tokens(), padded(tokens(), side))

    def run(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return step(model)

    as_stock(ours, stock, run)
    assert len(warnings()) == 1 and "dropout of attention probabilities" in warnings()[0]
    assert (run(ours)["logits"] - step(ours.eval())["logits"]).abs().max() > 1e-2
    assert kernels_run(ours)


def random_mask(dtype: torch.dtype) -> torch.Tensor:
    """A 4-D mask of the caller's own: random, causal, each query sees itself."""
    generator = torch.Generator().manual_seed(5)
    see = (torch.rand(2, 1, 20, 20, generator=generator) < 0.5).tril() | torch.eye(20, dtype=torch.bool)
    if dtype is not torch.bool:
        see = torch.zeros(see.shape, dtype=dtype).masked_fill(~see, torch.finfo(dtype).min)
    return see.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_mask_of_the_callers_own(family, dtype, warnings):
    stock = small(family)
    ours = patch(copy.deepcopy(stock))

    def run(model: Any, boolean: bool = dtype is torch.bool) -> dict[str, torch.Tensor]:
        mask = random_mask(torch.bool if boolean else model.dtype)
        masks = {"full_attention": mask, "sliding_attention": mask}
        mask = masks if family in ("gemma2", "gpt_oss") else mask
        model.zero_grad()
        logits = model(tokens(), attention_mask=mask, use_cache=False).logits
        logits.square().mean().backward()
        return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}

    # The eager function adds its mask: only ours takes bool there.
    as_stock(ours, stock, lambda model: run(model, False), run)
    assert len(warnings()) == 1 and "4-D" in warnings()[0]
    assert kernels_run(ours)


def test_heads_wider_than_256(warnings):
    stock = small(head_dim=320, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    ours = patch(copy.deepcopy(stock))
    for side in ("none", "left"):
        as_stock(ours, stock, logits_and_gradients(tokens(), padded(tokens(), side)))
    assert warnings() == ["llama_kernels: heads wider than 256: " + warnings()[0].partition("256: ")[2]]
    assert not kernels_run(ours)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_model_in_float64(family, warnings):
    """Everything is stock, bit for bit where stock attention is the same code."""
    stock = small(family, attention="eager" if family != "llama" else "sdpa").double()
    ours = patch(copy.deepcopy(stock))
    run = logits_of(tokens(), attention_mask=padded(tokens(), "left"), use_cache=False)
    with DoubleSoftmax():
        a, b = run(ours)["logits"], run(stock)["logits"]
    there = padded(tokens(), "left").bool()
    assert torch.equal(a[there], b[there])
    assert len(warnings()) == 1 and "float64" in warnings()[0]


@pytest.mark.parametrize("cached", [False, True])
def test_generating_with_heads_wider_than_256(cached):
    stock = small(head_dim=320, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    how = {"attention_mask": padded(tokens(), "left"), "max_new_tokens": 5, "do_sample": False, "use_cache": cached}
    assert torch.equal(patch(copy.deepcopy(stock)).generate(tokens(), **how), stock.generate(tokens(), **how))


# --- refused ---------------------------------------------------------------------------------------------------------


def doge() -> Any:
    if "doge" not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no doge")
    return small("doge")


@pytest.mark.parametrize("side", ["none", "left"])
def test_an_attention_that_computes_with_its_mask_is_refused_by_name(side):
    model = doge()
    model.set_attn_implementation("llama_kernels")
    error, said = ValueError, r"attention_forward: module is a DogeAttention.*hands its attention_mask on"
    if side == "left" or VERSION < (5, 23):  # its own arithmetic with the mask comes first, and fails
        error, said = (ValueError, RuntimeError), ""
    with pytest.raises(error, match=said):
        model(tokens(), attention_mask=None if side == "none" else padded(tokens(), side))


def test_an_attention_that_computes_with_its_mask_stays_stock():
    stock = doge()
    ours = patch(copy.deepcopy(stock))
    (row,) = (row for row in report(ours).rows if row.kind == "attention")
    assert not row.ours and row.why == "it computes with attention_mask before it hands it on"
    as_stock(ours, stock, logits_and_gradients(tokens(), padded(tokens(), "left")))


def test_forward_mode_is_refused_and_not_wrong():
    model = patch(small())
    embeddings = model.get_input_embeddings()(tokens()).detach()

    def logits(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x, use_cache=False).logits

    with pytest.raises((NotImplementedError, RuntimeError, ValueError), match="llama_kernels"):
        torch.func.jvp(logits, (embeddings,), (torch.ones_like(embeddings),))
