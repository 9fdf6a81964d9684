"""Models in which code beside AttentionInterface computes with the mask of a config that names our attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from llama_kernels.integrations.transformers import patch, report
from tests.integrations.comparison import Results, compare_with_stock
from tests.integrations.small import VERSION, randomized
from tests.support.environment import DEVICE

OURS = "llama_kernels"


def with_padding() -> dict[str, torch.Tensor]:
    shown = torch.ones(2, 20, dtype=torch.long)
    shown[0, 14:] = 0
    return {"input_ids": torch.randint(3, 100, (2, 20)), "attention_mask": shown}


def pegasus(attention_type: str, heads: int) -> Any:
    config = transformers.BigBirdPegasusConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=160,
        encoder_attention_heads=heads, decoder_attention_heads=heads, max_position_embeddings=128, dropout=0.0,
        attention_type=attention_type,
    )  # fmt: skip
    return transformers.BigBirdPegasusModel(config)


def by_name(model: Any) -> Any:
    """A copy whose configs name our attention, as after attn_implementation="llama_kernels"."""
    named = copy.deepcopy(model)
    named.set_attn_implementation(OURS)
    return named


def compare(stock: Any, ours: Any, inputs: dict[str, torch.Tensor], result: str | None = None) -> None:
    """Compare one result of the two models, or all, where `inputs` have the dtype of the model."""

    @torch.no_grad()
    def run(model: Any) -> Results:
        given = {name: x.to(DEVICE, model.dtype if x.is_floating_point() else None) for name, x in inputs.items()}
        results = model(**given)
        if result is not None:
            return {"logits": results[result]}
        # `compare` bounds what is named logits by its own norm. Integers, such as indices, are equal or far off.
        tensors = {name: x for name, x in results.items() if isinstance(x, torch.Tensor)}
        return {f"{name} logits": x if x.is_floating_point() else x.to(model.dtype) for name, x in tensors.items()}

    compare_with_stock(ours, stock, run)


@pytest.mark.skipif(VERSION < (5, 0), reason="in Transformers 4, its attention takes a head_mask, so ours refuses it")
@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.parametrize("attention_type", ["original_full", "block_sparse"])
def test_attention_of_a_class_of_its_own_adds_the_mask(attention_type, heads):
    """With 4 heads a mask of ranges has the shape of the scores' heads, and was added to them."""
    model = randomized(pegasus(attention_type, heads))
    compare(model, by_name(model), with_padding(), "last_hidden_state")
    with pytest.raises(ValueError, match="other code of the model computes with the mask"):
        patch(copy.deepcopy(model), rms_norm=False, rope=False)


@pytest.mark.skipif(VERSION < (5, 0), reason="in Transformers 4, its attention takes a head_mask, so ours refuses it")
def test_sparse_attention_adds_the_mask():
    config = transformers.InformerConfig(
        prediction_length=8, context_length=12, num_time_features=1, lags_sequence=[1, 2], d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0, attention_dropout=0.0, attention_type="prob",
    )  # fmt: skip
    model = randomized(transformers.InformerModel(config))
    inputs = {
        "past_values": torch.randn(2, 14), "past_time_features": torch.randn(2, 14, 1),
        "past_observed_mask": torch.ones(2, 14), "future_values": torch.randn(2, 8),
        "future_time_features": torch.randn(2, 8, 1),
    }  # fmt: skip
    ours = by_name(model)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(**{name: x.to(DEVICE) for name, x in inputs.items()})[0]
    torch.manual_seed(0)  # it samples keys
    with torch.no_grad():
        torch.testing.assert_close(ours(**{name: x.to(DEVICE) for name, x in inputs.items()})[0], expected)


@pytest.mark.parametrize("shown", [16, 11])
@pytest.mark.parametrize("way", [by_name, lambda model: patch(copy.deepcopy(model))], ids=["by name", "patch"])
def test_a_pooling_head_gives_its_mask_to_multi_head_attention(way, shown):
    config = transformers.Siglip2VisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_patches=16
    )
    model = randomized(transformers.Siglip2VisionModel(config))
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, shown:] = 0
    inputs = {
        "pixel_values": torch.randn(2, 16, 768), "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }  # fmt: skip
    compare(model, way(model), inputs, "pooler_output")


# --- modules of other kinds, which get the mask too ------------------------------------------------------------------


def built(name: str, config_name: str, **settings: Any) -> Any:
    """A small model with eager attention, or a skipped test where this release of Transformers has no such class."""
    if not hasattr(transformers, name):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")
    torch.manual_seed(1)
    config = getattr(transformers, config_name)(**settings)
    return randomized(getattr(transformers, name)._from_config(config, attn_implementation="eager"))


LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def beit() -> tuple[Any, dict[str, torch.Tensor]]:
    """It adds relative positions to the mask."""
    model = built("BeitModel", "BeitConfig", **LAYERS, image_size=32, patch_size=8, use_relative_position_bias=True)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


def lasr() -> tuple[Any, dict[str, torch.Tensor]]:
    """Its convolution hides the rows of padding."""
    model = built("LasrEncoder", "LasrEncoderConfig", **LAYERS, num_mel_bins=16, subsampling_conv_channels=16)
    shown = torch.ones(2, 100, dtype=torch.long)
    shown[0, 70:] = 0
    return model, {"input_features": torch.randn(2, 100, 16), "attention_mask": shown}


def lightglue() -> tuple[Any, dict[str, torch.Tensor]]:
    """Its cross-attention takes the masks of pairs in the other order."""
    detector = {
        "model_type": "superpoint", "descriptor_decoder_dim": 32, "encoder_hidden_sizes": [16, 16, 32, 32],
        "decoder_hidden_size": 32, "max_keypoints": 40,
    }  # fmt: skip
    model = built(
        "LightGlueForKeypointMatching", "LightGlueConfig", descriptor_dim=32, num_hidden_layers=2,
        num_attention_heads=2, keypoint_detector_config=detector,
    )  # fmt: skip
    return model, {"pixel_values": torch.rand(1, 2, 3, 64, 64)}


def nllb_moe() -> tuple[Any, dict[str, torch.Tensor]]:
    """Its router reads from the mask which tokens are padding."""
    if VERSION < (5, 0):
        pytest.skip("stock NLLB-MoE of Transformers 4 does not run in float64")
    parts = ("encoder", "decoder")
    sizes = {f"{part}_{name}": n for part in parts for name, n in
             {"layers": 2, "attention_heads": 2, "ffn_dim": 32, "sparse_step": 1}.items()}  # fmt: skip
    model = built(
        "NllbMoeModel", "NllbMoeConfig", vocab_size=160, d_model=32, num_experts=4, max_position_embeddings=64, **sizes
    )
    given = with_padding()
    return model, {**given, "decoder_input_ids": given["input_ids"], "decoder_attention_mask": given["attention_mask"]}


@pytest.mark.parametrize("of", [beit, lasr, lightglue, nllb_moe])
def test_a_mask_that_other_modules_compute_with_is_the_stock_one(of: Callable[[], Any]):
    """A packed mask made calls of these models fail, or, in nllb_moe, took tokens for padding."""
    torch.manual_seed(2)
    model, inputs = of()
    compare(model, by_name(model), inputs)
    try:
        rows = report(patch(copy.deepcopy(model))).rows
        assert {row.ours for row in rows if row.kind == "attention"} == {False}
    except ValueError as error:
        calls_interface = of is not beit or VERSION >= (5, 9)
        why = "other code of the model computes with the mask" if calls_interface else "nothing can be replaced"
        assert why in str(error)


@pytest.mark.skipif(VERSION < (5, 0), reason="BridgeTower of Transformers 4 does not call AttentionInterface")
def test_layers_that_see_all_keys_without_a_mask_although_they_say_causal_stay_stock():
    """BridgeTower, which supports eager attention only. Our attention read is_causal=True where there was no mask."""
    text = {"vocab_size": 99, **LAYERS, "hidden_size": 64}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    model = built(
        "BridgeTowerModel", "BridgeTowerConfig", **{**LAYERS, "hidden_size": 64}, text_config=text,
        vision_config=vision, share_cross_modal_transformer_layers=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="without a mask its layers see all keys, also with is_causal=True"):
        patch(copy.deepcopy(model))
    with pytest.raises(ValueError, match="module is a BridgeTowerSelfAttention, which sees all keys where it gets no"):
        by_name(model)(input_ids=torch.ones(2, 8, dtype=torch.long), pixel_values=torch.randn(2, 3, 32, 32))
