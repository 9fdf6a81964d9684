"""Calls that the attention kernels do not support: stock attention runs, with one warning, or an error is raised."""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llama_kernels.integrations.transformers import attention_refusals, attention_stock, patch, report, source, unpatch
from tests.integrations.comparison import (
    DoubleSoftmax,
    Results,
    compare_with_stock,
    logits_and_gradients,
    logits_of,
    mean_square_of,
    padding_mask,
)
from tests.integrations.small import (
    SIZES,
    VERSION,
    not_interpreted,
    ops_of,
    patched,
    randomized,
    small,
    stock_rows,
    tokens,
)
from tests.integrations.user_classes import OwnMask, with_class
from tests.support.environment import DEVICE

pytestmark = not_interpreted


@pytest.fixture
def stock_warnings(caplog):
    """Returns the warnings of our attention so far. A process warns once for each reason."""
    attention_stock._warn_of_stock.cache_clear()
    caplog.set_level(logging.WARNING)
    yield lambda: [r.getMessage() for r in caplog.records if r.name == attention_stock.__name__]
    attention_stock._warn_of_stock.cache_clear()


WIDE = {"head_dim": 640, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_dropout_of_attention_weights_runs_stock_attention(family, side, stock_warnings):
    """SDPA runs, or with a softcap or sinks the eager function. The same seed drops the same elements."""
    eager = family in ("gemma2", "gpt_oss")
    stock = small(family, attention="eager" if eager else "sdpa", attention_dropout=0.3).train()
    ours = patched(stock)
    step = logits_and_gradients(tokens(), padding_mask(tokens(), side))

    def run(model: Any) -> Results:
        torch.manual_seed(3)
        return step(model)

    compare_with_stock(ours, stock, run)
    assert len(stock_warnings()) == 1 and "dropout of attention probabilities" in stock_warnings()[0]
    assert (run(ours)["logits"] - step(ours.eval())["logits"]).abs().max() > 1e-2
    assert "attention_forward" in ops_of(ours)


def random_mask(dtype: torch.dtype) -> torch.Tensor:
    """A random causal 4-D mask, in which every query sees its own key."""
    generator = torch.Generator().manual_seed(5)
    see = (torch.rand(2, 1, 20, 20, generator=generator) < 0.5).tril() | torch.eye(20, dtype=torch.bool)
    if dtype is not torch.bool:
        see = torch.zeros(see.shape, dtype=dtype).masked_fill(~see, torch.finfo(dtype).min)
    return see.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_4d_mask_from_the_caller_runs_stock_attention(family, dtype, stock_warnings):
    stock = small(family)
    ours = patched(stock)

    def logits(model: Any, boolean: bool = dtype is torch.bool) -> torch.Tensor:
        mask = random_mask(torch.bool if boolean else model.dtype)
        masks = {"full_attention": mask, "sliding_attention": mask}
        mask = masks if family in ("gemma2", "gpt_oss") else mask
        return model(tokens(), attention_mask=mask, use_cache=False).logits

    # The eager function adds its mask to the scores, so stock takes no bool mask.
    compare_with_stock(ours, stock, mean_square_of(lambda model: logits(model, False)), mean_square_of(logits))
    assert len(stock_warnings()) == 1 and "4-D" in stock_warnings()[0]
    assert "attention_forward" in ops_of(ours)


def test_heads_too_wide_for_the_kernels_run_stock_attention(stock_warnings):
    stock = small(**WIDE)
    ours = patched(stock)
    for side in ("none", "left"):
        compare_with_stock(ours, stock, logits_and_gradients(tokens(), padding_mask(tokens(), side)))
    assert len(stock_warnings()) == 1 and "heads 640 wide" in stock_warnings()[0]
    assert "attention_forward" not in ops_of(ours)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_float64_model_gives_the_bits_of_stock(family, stock_warnings):
    stock = small(family, attention="eager" if family != "llama" else "sdpa").double()
    ours = patched(stock)
    run = logits_of(tokens(), attention_mask=padding_mask(tokens(), "left"), use_cache=False)
    with DoubleSoftmax():
        a, b = run(ours)["logits"], run(stock)["logits"]
    there = padding_mask(tokens(), "left").bool()
    assert torch.equal(a[there], b[there])
    assert len(stock_warnings()) == 1 and "float64" in stock_warnings()[0]


@pytest.mark.parametrize("cached", [False, True])
def test_heads_too_wide_for_the_kernels_generate_the_tokens_of_stock(cached):
    stock, mask = small(**WIDE), padding_mask(tokens(), "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "use_cache": cached}
    assert torch.equal(patched(stock).generate(tokens(), **options), stock.generate(tokens(), **options))


# --- errors ----------------------------------------------------------------------------------------------------------


def doge() -> Any:
    if "doge" not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no doge")
    return small("doge")


@pytest.mark.parametrize("side", ["none", "left"])
def test_our_attention_by_name_raises_in_a_module_that_computes_with_its_mask(side):
    model = doge()
    model.set_attn_implementation("llama_kernels")
    error, match = ValueError, r"attention_forward: module is a DogeAttention: its forward computes with attention_mask"
    if side == "left" or VERSION < (5, 23):  # its own code computes with the mask first, and raises
        error, match = (ValueError, RuntimeError), None
    with pytest.raises(error, match=match):
        model(tokens(), attention_mask=None if side == "none" else padding_mask(tokens(), side))


def with_copied_layers(stock):
    """The model with copies of its layers, as depth up-scaling makes them: each has a copy of the config."""
    stock.model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in stock.model.layers)
    return stock


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_copied_layers_get_masks_for_our_attention(attention, side, stock_warnings):
    stock = with_copied_layers(small("mistral", attention))
    ours = patched(stock)
    assert not stock_rows(ours) and ours.config._attn_implementation == "llama_kernels"
    compare_with_stock(ours, stock, logits_and_gradients(tokens(), padding_mask(tokens(), side)))
    assert not stock_warnings()
    unpatch(ours)
    assert {module.config._attn_implementation for module in ours.modules() if hasattr(module, "config")} == {attention}


def test_copied_layers_stay_stock_beside_attention_that_stays_stock():
    stock = with_class(with_copied_layers(small()), "model.layers.1.self_attn", OwnMask)
    ours = patched(stock)
    assert "config stays stock" in stock_rows(ours)["attention", "LlamaAttention"]
    compare_with_stock(ours, stock, logits_and_gradients(tokens(), padding_mask(tokens(), "left")))


def test_patch_leaves_a_module_that_computes_with_its_mask_stock():
    stock = doge()
    ours = patched(stock)
    (row,) = (row for row in report(ours).rows if row.kind == "attention")
    assert not row.ours and row.why == "its forward computes with attention_mask"
    compare_with_stock(ours, stock, logits_and_gradients(tokens(), padding_mask(tokens(), "left")))


def inkling() -> Any:
    """Inkling 2: relative positions, and a sink for each query, which SDPA would ignore."""
    inkling2 = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    of_window = {f"swa_{name}": SIZES[name] for name in ("num_attention_heads", "num_key_value_heads")}
    config = inkling2.Inkling2TextConfig(
        **{**SIZES, **of_window}, head_dim=16, swa_head_dim=16, sliding_window_size=8, unpadded_vocab_size=99, d_rel=4,
        rel_extent=8, n_routed_experts=4, num_experts_per_tok=2, n_layers_per_attn_res_block=1,
    )  # fmt: skip
    torch.manual_seed(1)
    return randomized(inkling2.Inkling2TextModel._from_config(config, attn_implementation="eager"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_4d_mask_of_integers_is_refused(dtype):
    mask = torch.ones(20, 20, device=DEVICE).tril()[None, None].to(dtype)
    with pytest.raises(TypeError, match=rf"attention_mask is {dtype} of shape .*; wanted bool.*attention_mask\.bool"):
        patch(small())(tokens(), attention_mask=mask, use_cache=False)


def test_a_mask_of_integers_for_the_keys_alone_is_refused():
    """(B, 1, 1, S) int32, which is also the form of the masks inside context_parallel."""
    mask = padding_mask(tokens(), "left")[:, None, None]
    with pytest.raises((TypeError, ValueError), match=r"if the mask is yours, pass attention_mask\.bool\(\)"):
        patch(small())(tokens(), attention_mask=mask.int(), use_cache=False)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_mask_of_integers_for_the_keys_and_each_head_is_refused(heads):
    """With 2 or 4 heads it was read as ranges of keys."""
    mask = padding_mask(tokens(), "left")[:, None, None].expand(-1, heads, -1, -1)
    with pytest.raises(TypeError, match=r"attention_mask is torch.int32 of shape .*attention_mask\.bool"):
        patch(small())(tokens(), attention_mask=mask.int(), use_cache=False)


def test_patch_leaves_attention_with_arguments_of_its_own_stock():
    stock = inkling()
    ours = patched(stock)
    rows = [row for row in report(ours).rows if row.kind == "attention"]
    assert rows and all(not row.ours and row.why == "its attention function takes sinks" for row in rows)
    with torch.no_grad():
        hidden, expected = (model(tokens(), use_cache=False).last_hidden_state for model in (ours, stock))
    torch.testing.assert_close(hidden, expected)  # the defaults: stock has layers that do not run in float64


def test_our_attention_by_name_raises_in_a_module_whose_attention_has_arguments_of_its_own():
    model = inkling()
    model.set_attn_implementation("llama_kernels")
    with pytest.raises(ValueError, match=r"module is a Inkling2SlidingAttention: its attention function takes sinks"):
        model(tokens(), use_cache=False)


def test_our_attention_by_name_reads_no_source_or_signature_after_the_first_call(monkeypatch):
    """That took 50 us a layer."""
    model = small()
    model.set_attn_implementation("llama_kernels")
    expected = model(tokens()).logits

    def read(*_: Any) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patches:
        patches.setattr(attention_refusals, "_unknown_arguments", read)
        patches.setattr(attention_refusals, "passes_mask_on", read)
        patches.setattr(source, "codes_in", read)
        assert torch.equal(model(tokens()).logits, expected)

    def eager_attention_forward(module, query, key, value, attention_mask, own=None, **kwargs):
        raise NotImplementedError

    modeling = sys.modules[type(model).__module__]
    monkeypatch.setattr(modeling, "eager_attention_forward", eager_attention_forward)
    with pytest.raises(ValueError, match="its attention function takes own"):
        model(tokens())


def test_forward_mode_derivatives_raise():
    model = patch(small())
    embeddings = model.get_input_embeddings()(tokens()).detach()

    def logits(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x, use_cache=False).logits

    with pytest.raises((NotImplementedError, RuntimeError, ValueError), match="llama_kernels"):
        torch.func.jvp(logits, (embeddings,), (torch.ones_like(embeddings),))
