"""Kinds of models and outputs: rotary scaling, heads of tasks, hidden states, attention weights and images."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import transformers
from torch import nn

from tests.integrations.comparison import (
    Results,
    compare_with_stock,
    gradients,
    logits_and_gradients,
    logits_of,
    padding_mask,
)
from tests.integrations.small import ALTERNATING, not_interpreted, patched, small, tokens
from tests.support.environment import DEVICE

pytestmark = not_interpreted

SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [float(i + 1) for i in range(8)], "factor": 8.0,
                 "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize("rule", SCALINGS)
def test_rotary_scaling_gives_the_logits_of_stock(rule):
    """At a short length, beyond the original length, and at a short length again."""
    scaling = {"rope_type": rule, "rope_theta": 10000.0, **SCALINGS[rule]}
    stock = small(rope_scaling=scaling, max_position_embeddings=16)
    ours = patched(stock)
    for length in (12, 40, 12):
        compare_with_stock(ours, stock, logits_of(tokens(2, length)))


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_task_head_gives_the_scores_and_gradients_of_stock(head):
    ids = tokens()
    ids[0, -6:] = 0
    mask = (ids != 0).long()
    labels = {
        "SequenceClassification": {"labels": torch.tensor([0, 1], device=DEVICE)},
        "TokenClassification": {"labels": ids % 2},
        "QuestionAnswering": dict.fromkeys(("start_positions", "end_positions"), torch.tensor([2, 9], device=DEVICE)),
    }[head]

    def run(model: nn.Module) -> Results:
        out = model(ids, attention_mask=mask, **labels)
        out.loss.backward()
        scores = (out.start_logits, out.end_logits) if head == "QuestionAnswering" else (out.logits,)
        # Padding counts too: the loss of question answering is over all tokens.
        return {"few logits": torch.stack(scores).detach(), **gradients(model)}

    stock = small(auto=getattr(transformers, f"AutoModelFor{head}"))
    compare_with_stock(patched(stock), stock, run)


def attention_weights(model: nn.Module, **options: bool) -> Results:
    attentions = model(tokens(), **options).attentions
    assert len(attentions) == 2 and attentions[0].shape == (2, 4, 20, 20)
    return {"logits": torch.stack(attentions).detach()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_attention_weights_of_a_patched_model_are_those_of_stock(family):
    """The eager attention of the model runs, since no kernel stores them."""
    stock = small(family, num_key_value_heads=2)
    run = functools.partial(attention_weights, output_attentions=True)
    compare_with_stock(patched(stock), stock, run)
    stock.config.output_attentions = True
    compare_with_stock(patched(stock), stock, attention_weights)


def test_generate_returns_as_many_attention_weights_as_stock():
    options = {"max_new_tokens": 3, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    stock = small()
    for model in (stock, patched(stock)):
        assert [len(of_step) for of_step in model.generate(tokens(), **options).attentions] == [2, 2, 2]


def test_a_traced_model_computes_what_the_model_computes():
    stock = small(attention="sdpa", use_cache=False)

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids).logits

    ours = patched(stock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace keeps sizes as they are, and warns of it
        traced = torch.jit.trace(Logits(ours), (tokens(),), check_trace=False)
    compare_with_stock(
        ours, stock, logits_of(tokens().flip(1)), lambda _: {"logits": traced(tokens().flip(1)).detach()}
    )


def test_hidden_states_and_attention_weights_are_those_of_stock():
    stock, ids = small(), tokens()
    ours = patched(stock)

    def hidden_states(model: nn.Module) -> Results:
        states = model(ids, output_hidden_states=True).hidden_states
        assert len(states) == 3
        return {"logits": torch.stack(states).detach()}

    compare_with_stock(ours, stock, hidden_states)
    ours.set_attn_implementation("eager")
    compare_with_stock(ours, stock, functools.partial(attention_weights, output_attentions=True))


# --- images ----------------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 2, "vocab_size": 99, "pad_token_id": 0}  # fmt: skip


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 6, "layer_types": ALTERNATING}, vision_config=VISION,
        mm_tokens_per_image=4, image_token_index=98, boi_token_index=97, eoi_token_index=96,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").to(DEVICE)


def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"}, vision_config={**VISION, "model_type": "siglip_vision_model"},
        projection_dim=64, image_token_index=98,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager").to(DEVICE)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("image", [slice(0, 0), slice(7, 12), slice(14, 20)])
@pytest.mark.parametrize("build", [gemma3, paligemma])
def test_image_tokens_see_later_tokens_as_in_stock(build, image, side):
    """In Gemma 3, tokens of an image see one another. In PaliGemma, tokens of the prefix do, which has the image."""
    ids = tokens()
    kinds = torch.zeros_like(ids)
    if build is gemma3:
        kinds[:, image] = 1
    else:
        kinds[:, image.stop :] = 1  # the tokens after the prefix
    stock = build().train(build is paligemma)
    run = logits_and_gradients(ids, padding_mask(ids, side), token_type_ids=kinds)
    compare_with_stock(patched(stock), stock, run)
