"""Models in which code beside AttentionInterface computes with the mask of a config that names our attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from llama_kernels.integrations.transformers import patch
from tests.integrations.comparison import Results, compare_with_stock
from tests.integrations.small import randomized
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


def compare(stock: Any, ours: Any, inputs: dict[str, torch.Tensor], result: str) -> None:
    """Compare one result of the two models, where `inputs` have the dtype of the model."""

    @torch.no_grad()
    def run(model: Any) -> Results:
        given = {name: x.to(DEVICE, model.dtype if x.is_floating_point() else None) for name, x in inputs.items()}
        return {"logits": model(**given)[result]}

    compare_with_stock(ours, stock, run)


@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.parametrize("attention_type", ["original_full", "block_sparse"])
def test_attention_of_a_class_of_its_own_adds_the_mask(attention_type, heads):
    """With 4 heads a mask of ranges has the shape of the scores' heads, and was added to them."""
    model = randomized(pegasus(attention_type, heads))
    compare(model, by_name(model), with_padding(), "last_hidden_state")
    with pytest.raises(ValueError, match="adds the mask to its scores"):
        patch(copy.deepcopy(model), rms_norm=False, rope=False)


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
