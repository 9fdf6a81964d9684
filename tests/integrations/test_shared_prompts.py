"""Completions that share a prompt in one row give what they give after a prompt of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llama_kernels.integrations.transformers import SharedPromptCollator, attention, patch, share_prompts
from llama_kernels.integrations.transformers.packed_masks import unpack, written_out
from tests.integrations.comparison import Results, compare_with_stock, gradients
from tests.integrations.families import stock as stock_of
from tests.integrations.small import VERSION, needs_our_attention, not_interpreted, patched, small
from tests.support.environment import DEVICE

pytestmark = not_interpreted

PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [21], [31, 32]]
COMPLETIONS = [[[40, 41, 42], [43], [44, 45, 46, 47]], [[50, 51], [52, 53]], [[60, 61, 62, 63, 64]]]


def shared(model: Any) -> Results:
    """Logits that predict a token of a completion, in order, and the gradients of the model's own loss."""
    batch = share_prompts(PROMPTS, COMPLETIONS, device=DEVICE)
    out = model(**batch.inputs, use_cache=False)
    out.loss.backward()
    results = {"logits": out.logits[:, :-1][batch.completion[:, 1:] >= 0].detach(), **gradients(model)}
    model.zero_grad()
    return results


def repeated(model: Any) -> Results:
    """The same of one forward for each completion."""
    logits, tokens = [], []
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion]], device=DEVICE)
            logits.append(model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1])
            tokens += completion
    F.cross_entropy(torch.cat(logits), torch.tensor(tokens, device=DEVICE)).backward()
    results = {"logits": torch.cat(logits).detach(), **gradients(model)}
    model.zero_grad()
    return results


@pytest.mark.corpus(77)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_loss_and_gradients_are_those_of_repeated_prompts(family):
    model = small(family)
    compare_with_stock(patched(model), model, repeated, shared)


def test_under_gradient_checkpointing():
    model = small()
    ours = patched(model).train()
    ours.gradient_checkpointing_enable()
    compare_with_stock(ours, model, repeated, shared)


def test_stock_attention_runs_with_the_same_mask_where_the_kernels_cannot():
    model = small().double()
    compare_with_stock(patched(model), model, repeated, shared)


def test_the_mask_shows_the_prompt_and_the_own_segment():
    batch = share_prompts([[1, 2, 3]], [[[4], [5, 6]]])
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 3, 5, 6]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert batch.inputs["labels"].tolist() == [[-100, -100, -100, 4, -100, 5, 6]]
    assert batch.completion.tolist() == [[-1, -1, -1, 0, -1, 1, 1]]
    see = written_out(batch.inputs["attention_mask"], 7, 7)[0, 0].int()
    assert ["".join(map(str, row)) for row in see.tolist()] == [
        "1000000", "1100000", "1110000", "1111000", "1100100", "1100110", "1100111"
    ]  # fmt: skip


def test_padding_sees_itself_alone_and_no_other_token_sees_it():
    batch = share_prompts([[1, 2], [3]], [[[4, 5, 6]], [[7]]], pad_token_id=9)
    assert batch.inputs["input_ids"][1].tolist() == [3, 7, 9, 9, 9]
    see = written_out(batch.inputs["attention_mask"], 5, 5)[1, 0]
    assert torch.equal(see[2:], torch.eye(5, dtype=torch.bool)[2:]) and not see[:2, 2:].any()


def test_a_slice_to_the_last_queries_keeps_their_ranges():
    mask = share_prompts(PROMPTS, COMPLETIONS).inputs["attention_mask"]
    whole, part = unpack(mask, 20, 20), unpack(mask, 3, 20)
    for name in ("start", "end", "prefix"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, -3:])


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {}), ("gemma3_text", {}), ("phimoe", {"sliding_window": 7, "num_local_experts": 2})],
)
def test_layers_with_a_sliding_window_are_refused(family, changes):
    """Those of Phi MoE do not pass their window on."""
    match = r"share_prompts: model is a model with layers of sliding.attention.*attend to all earlier tokens"
    model = small(family, **changes)
    needs_our_attention(model)
    with pytest.raises(ValueError, match=match):
        patched(model)(**share_prompts(PROMPTS, COMPLETIONS, device=DEVICE).inputs)


def test_layers_with_a_sliding_window_are_refused_where_stock_attention_runs():
    with pytest.raises(ValueError, match=r"share_prompts: model .*attend to all earlier tokens"):
        patched(small("mistral")).double()(**share_prompts(PROMPTS, COMPLETIONS, device=DEVICE).inputs)


@pytest.mark.skipif(VERSION < (5, 13), reason="before Transformers 5.13, the layers themselves fail with these masks")
@pytest.mark.parametrize(("family", "layers"), [("qwen3_next", "linear_attention"), ("lfm2", "conv")])
def test_layers_that_combine_tokens_without_attention_are_refused(family, layers):
    """They would carry the tokens of one completion on to the next. The attention layers beside them see all."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {family}")
    model = patch(stock_of(family))
    with pytest.raises(ValueError, match=f"share_prompts: model is a model with layers of {layers}; wanted"):
        model(**share_prompts(PROMPTS, COMPLETIONS, device=DEVICE).inputs)


def test_context_parallel_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "context_parallels", [None])
    with pytest.raises(ValueError, match=r"share_prompts: model .*inside context_parallel"):
        patched(small())(**share_prompts(PROMPTS, COMPLETIONS, device=DEVICE).inputs)


@pytest.mark.parametrize("heads", [1, 2, 4, 5, 6, 7, 9, 12, 14, 16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [1, 3])
def test_stock_models_raise(attention, heads, rows):
    """Eager attention would add a mask with an element for each of its heads to the scores."""
    sizes = {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": heads}
    model = small(attention=attention, num_hidden_layers=1, **sizes)
    with pytest.raises((RuntimeError, ValueError)):
        model(**share_prompts(PROMPTS[:rows], COMPLETIONS[:rows], device=DEVICE).inputs)


@pytest.mark.parametrize(
    "prompts, completions, named",
    [
        ([[1]], [], "completions is 0 lists; wanted 1 lists"),
        ([], [], "prompts is empty"),
        ([[1], []], [[[2]], [[3]]], r"prompts\[1\]"),
        ([[1], [2]], [[[2]], []], r"completions\[1\]"),
    ],
)
def test_a_prompt_without_tokens_or_completions_is_refused(prompts, completions, named):
    with pytest.raises(ValueError, match=f"share_prompts: {named}"):
        share_prompts(prompts, completions)


@pytest.mark.parametrize("array", [torch.tensor, lambda ids: torch.tensor(ids).numpy()], ids=["tensor", "numpy"])
def test_token_ids_may_be_tensors_or_arrays(array):
    prompts, completions = [[5, 6, 7]], [[[8, 9], [3, 4]]]
    expected, batch = share_prompts(prompts, completions), share_prompts(array(prompts), array(completions))
    assert torch.equal(batch.completion, expected.completion)
    assert all(torch.equal(batch.inputs[name], x) for name, x in expected.inputs.items())


def test_the_collator_gives_the_inputs_of_the_model():
    examples = [{"prompt": p, "completions": c} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch = SharedPromptCollator(pad_token_id=5)(examples)
    expected = share_prompts(PROMPTS, COMPLETIONS, pad_token_id=5).inputs
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.corpus(77)
def test_the_work_is_that_of_the_unique_tokens():
    """Of tokens, and of blocks of 64 rows and 64 keys, beside the pairs of a query and a key that it sees."""
    example = pytest.importorskip("examples.shared_prompts", reason="needs the packages of the examples")
    prompt, completions = [1] * 2048, [[2] * 256] * 8
    batch = share_prompts([prompt], [completions])
    S = batch.completion.shape[1]
    assert S <= 1.1 * (2048 + 8 * 256)
    ranges = unpack(batch.inputs["attention_mask"], S, S)
    start, end, prefix = (x[0].long() for x in (ranges.start, ranges.end, ranges.prefix))
    pairs = (end - start + prefix).sum().item()
    assert pairs * 0.99 < example.visited(start, end, prefix) * 64 * 64 < pairs * 1.1
