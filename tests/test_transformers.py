"""Stock Hugging Face models on our ops: the same numbers, tokens and behaviour, and no trace afterwards.

docs/transformers.md has the table of families and features; each of its cells is a test here.
"""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="4.57")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from llama_kernels.integrations import transformers as ours
from llama_kernels.integrations.transformers import patch, unpatch
from llama_kernels.language import INTERPRETED
from tests.conftest import DEVICE
from tests.judge import UNIT, relative_error

# What runs here is wiring; the kernels have their own tests. So once is enough, and interpreting takes minutes.
not_interpreted = pytest.mark.skipif(
    INTERPRETED, reason="runs on the reference path, or on a GPU, with compiled kernels"
)
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "rms_norm_eps": 1e-6,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16, "num_hidden_layers": 6},
    "gpt_oss": {"head_dim": 16, "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "sliding_window": 7},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}
EXPERTS = ("gpt_oss", "mixtral", "qwen3_moe")
families = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str, **changes):
    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})


def stock(family: str = "llama", auto=AutoModelForCausalLM, attention: str = "eager", **changes):
    """A small model of random weights, biases and norms among them."""
    torch.manual_seed(1)
    model = auto.from_config(config_of(family, **changes), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(DEVICE)


def tokens(B: int = 2, S: int = 20) -> torch.Tensor:
    return torch.randint(3, 99, (B, S), device=DEVICE)


def padded(ids: torch.Tensor, side: str) -> torch.Tensor:
    """attention_mask: the first sequence is shorter by six."""
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :6] = 0
    elif side == "right":
        mask[0, -6:] = 0
    return mask


def logits_and_gradients(model, ids, mask):
    """Logits of the tokens that are there, one after another, and the gradients of a loss of them all."""
    model.zero_grad()
    return with_gradients(model, model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], ids, mask)


def the_truth(model, ids, mask):
    """The same from the stock model in float64, each sequence on its own: without padding, and without masks."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"  # the grouped one has no float64
    alone = [model(row[there][None], use_cache=False).logits[0] for row, there in zip(ids, mask.bool(), strict=True)]
    return with_gradients(model, torch.cat(alone), ids, mask)


def with_gradients(model, logits, ids, mask):
    row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[mask.bool()]
    follows = row[1:] == row[:-1]
    F.cross_entropy(logits[:-1][follows].float(), ids[mask.bool()][1:][follows]).backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def same(x: torch.Tensor, y: torch.Tensor) -> None:
    """The same numbers, computed in another order: a few float32 roundings apart, of the whole and of the largest."""
    assert x.shape == y.shape
    assert relative_error(x, y) <= 8 * UNIT[torch.float32]
    assert (x - y).abs().max() <= 64 * UNIT[torch.float32] * y.abs().max()


def as_good_as_stock(results, theirs, truth):
    """Within what stock itself is off, twice: two float32 computations in unlike orders."""
    for x, stock_x, exact in zip(results, theirs, truth, strict=True):
        assert relative_error(x, exact) <= 2 * relative_error(stock_x, exact) + UNIT[torch.float32]
        assert (x.double() - exact).abs().max() <= 2e-4


# --- the same numbers ------------------------------------------------------------------------------------------------


@not_interpreted
@families
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_gradients(family, side):
    model = stock(family)
    ids = tokens()
    mask = padded(ids, side)
    theirs = logits_and_gradients(model, ids, mask)
    truth = the_truth(model, ids, mask)
    as_good_as_stock(logits_and_gradients(patch(model), ids, mask), theirs, truth)


def test_through_the_kernels(monkeypatch):
    """In Triton's interpreter too: logits, gradients and a few generated tokens."""
    model = stock(num_hidden_layers=1)
    ids = tokens(2, 8)
    mask = padded(ids, "left")
    theirs = logits_and_gradients(model, ids, mask)
    truth = the_truth(model, ids, mask)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    patch(model)
    as_good_as_stock(logits_and_gradients(model, ids, mask), theirs, truth)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False), written)


@not_interpreted
@families
def test_attention_alone(family):
    """By name, in a model that is otherwise stock: padded on either side, and packed with a cache."""
    model = stock(family)
    ids = tokens()
    masks = [padded(ids, side) for side in ("none", "left", "right")]
    position_ids = torch.tensor([[*range(8), *range(12)]], device=DEVICE)
    expected = [model(ids, attention_mask=mask).logits[mask.bool()] for mask in masks]
    apart = torch.cat((model(ids[:, :8]).logits, model(ids[:, 8:]).logits), 1)
    model.set_attn_implementation("llama_kernels")
    for mask, logits in zip(masks, expected, strict=True):
        same(model(ids, attention_mask=mask).logits[mask.bool()], logits)
    same(model(ids, position_ids=position_ids).logits, apart)


@not_interpreted
@families
def test_packed_documents(family):
    """Each as if it were alone, by position_ids that start anew, with a cache and without, and by cu_seq_lens."""
    model = stock(family)
    documents = [tokens(1, n) for n in (9, 1, 14)]
    alone = torch.cat([model(ids, use_cache=False).logits for ids in documents], 1)
    patch(model)
    ids = torch.cat(documents, 1)
    position_ids = torch.cat([torch.arange(x.shape[1], device=DEVICE) for x in documents])[None]
    cu = torch.tensor([0, 9, 10, 24], dtype=torch.int32, device=DEVICE)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 14, "max_length_k": 14}
    for how in ({"use_cache": False}, {"use_cache": True}, {"use_cache": False, **lengths}):
        logits = model(ids, position_ids=position_ids, **how).logits
        same(logits, alone)


@not_interpreted
def test_batches_of_the_flattening_collator():
    documents = [tokens(1, n)[0].tolist() for n in (9, 1, 14)]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in collator([{"input_ids": ids} for ids in documents]).items()
    }
    model = stock()
    alone = [model(torch.tensor([ids], device=DEVICE)).logits for ids in documents]
    out = patch(model)(**batch)
    same(out.logits, torch.cat(alone, 1))
    assert out.loss.isfinite()


@not_interpreted
@families
@pytest.mark.parametrize("search", ["greedy", "beams", "static"])
def test_generates_the_same_tokens(family, search):
    """Past the sliding window, from left-padded prompts."""
    model = stock(family)
    ids = tokens(2, 10)
    mask = padded(ids, "left")
    how = {"greedy": {}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static"}}[search]
    how.update(attention_mask=mask, max_new_tokens=12, do_sample=False, disable_compile=True)
    expected = model.generate(ids, **how)
    assert torch.equal(patch(model).generate(ids, **how), expected)


@not_interpreted
@families
def test_a_cache_filled_in_pieces(family):
    """Prefill, more tokens at once, one token: the logits of the whole."""
    model = stock(family)
    ids = tokens(2, 20)
    mask = padded(ids, "left")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        patch(model)
        cache, pieces = None, []
        for a, b in ((0, 9), (9, 17), (17, 18), (18, 20)):
            out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    same(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()])


RULES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [float(i + 1) for i in range(8)], "factor": 8.0,
                 "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@not_interpreted
@pytest.mark.parametrize("rule", RULES)
def test_every_scaling_of_the_rotary_embedding(rule):
    """Their own module computes the frequencies, the longer sequence's anew where the rule has it so."""
    model = stock(rope_scaling={"rope_type": rule, "rope_theta": 10000.0, **RULES[rule]}, max_position_embeddings=16)
    short, long = tokens(2, 12), tokens(2, 40)
    expected = [model(ids).logits for ids in (short, long, short)]
    patch(model)
    for ids, logits in zip((short, long, short), expected, strict=True):
        same(model(ids).logits, logits)


@not_interpreted
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_every_head(head):
    model = stock(auto=getattr(transformers, f"AutoModelFor{head}"))
    ids = tokens()
    ids[0, -6:] = 0
    mask = (ids != 0).long()

    labels = {
        "SequenceClassification": {"labels": torch.tensor([0, 1], device=DEVICE)},
        "TokenClassification": {"labels": ids % 2},
        "QuestionAnswering": {
            name: torch.tensor([2, 9], device=DEVICE) for name in ("start_positions", "end_positions")
        },
    }

    def run(model):
        """Scores of every token, padding too, since the loss of QuestionAnswering is over them all; the loss."""
        out = model(ids, attention_mask=mask, **labels[head])
        return out.loss, *((out.start_logits, out.end_logits) if head == "QuestionAnswering" else (out.logits,))

    expected = run(model)
    for x, y in zip(run(patch(model)), expected, strict=True):
        same(x, y)


@not_interpreted
def test_loss_curves_lie_on_each_other():
    losses = []
    batches = [tokens(4, 24) % 17 + 3 for _ in range(12)]
    for change in (lambda model: model, patch):
        model = change(stock()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append([])
        for ids in batches:
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.5
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 2e-3


# --- masks as ranges -------------------------------------------------------------------------------------------------


def written_out(ranges, is_causal, Sq, Sk, window):
    """What `attention_forward` makes of them, (B, Sq, Sk)."""
    i, j = torch.arange(Sq)[:, None] + Sk - Sq, torch.arange(Sk)[None]
    see = (j <= i) if is_causal and (ranges is None or ranges.shape[-1] == 1) else torch.ones(Sq, Sk, dtype=torch.bool)
    start, *ends = [torch.zeros(1, Sq)] if ranges is None else ranges[:, 0].unbind(-1)
    if window is not None and len(ends) == 2:
        start = torch.maximum(start, ends[1] - window)
    elif window is not None:
        see = see & (j > i - window)
    see = see & (j >= start[..., None])
    return see & (j < ends[0][..., None]) if ends else see


@not_interpreted
@pytest.mark.skipif(VERSION < (5, 0), reason="the mask functions of Transformers 4 take other arguments")
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked", "bidirectional"])
@pytest.mark.parametrize("Sq, Sk, q_offset, kv_offset", [
    (12, 12, 0, 0), (1, 12, 11, 0), (5, 12, 7, 0), (3, 12, 20, 11), (5, 20, 3, 0), (1, 20, 9, 0),
])  # fmt: skip
def test_ranges_are_the_mask(kind, padding, Sq, Sk, q_offset, kv_offset):
    from transformers import masking_utils

    functions = {
        "causal": masking_utils.causal_mask_function,
        "sliding": masking_utils.sliding_window_causal_mask_function(4),
        "chunked": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
        "bidirectional": masking_utils.bidirectional_mask_function,
    }
    if kind == "bidirectional" and q_offset:
        pytest.skip("a bidirectional model has no cache")
    seen = q_offset + Sq
    attention_mask = None
    if padding != "none":
        attention_mask = torch.ones(2, seen, dtype=torch.bool)
        attention_mask[0, slice(0, 2) if padding == "left" else slice(seen - 1, seen)] = False
    offset = q_offset if q_offset + Sq == Sk + kv_offset else torch.tensor(q_offset)  # a static cache has a tensor
    call = {
        "batch_size": 2, "q_length": Sq, "kv_length": Sk, "q_offset": offset, "kv_offset": kv_offset,
        "mask_function": functions[kind], "attention_mask": attention_mask, "device": torch.device("cpu"),
    }  # fmt: skip
    if kind == "bidirectional" and Sk > seen:
        pytest.skip("a bidirectional model has no cache")
    expected = sdpa_mask(**call, allow_is_causal_skip=False)[:, 0]
    ranges = ours.row_ranges(**call)
    assert ranges is None or ranges.dtype == torch.int32
    see = written_out(ranges, kind != "bidirectional", Sq, Sk, 4 if kind == "sliding" else None).expand(2, Sq, Sk)
    assert torch.equal(see, expected)  # rows of padding too: they take part in some losses


@not_interpreted
def test_a_plain_mask_costs_nothing_and_no_mask_is_square(monkeypatch):
    seen = []
    forward = ours.attention_forward

    def record(module, q, k, v, attention_mask, **kwargs):
        seen.append(attention_mask)
        return forward(module, q, k, v, attention_mask, **kwargs)

    monkeypatch.setattr(ours, "attention_forward", record)
    ids = tokens(2, 20)
    # In Transformers 4 Gemma 3 has two rotary embeddings and keeps its attention module.
    for family in ("llama", "mistral", "gemma3_text")[: 2 if VERSION < (5, 0) else 3]:
        model = patch(stock(family))
        seen.clear()  # of the twin's
        model(ids, use_cache=False)
        assert VERSION < (5, 0) or all(mask is None for mask in seen), family  # 4 calls every batch packed
        seen.clear()
        model(ids, attention_mask=padded(ids, "left"))
        assert {tuple(mask.shape) for mask in seen} == {(2, 1, 20, 2)}


@not_interpreted
def test_padding_in_the_middle_is_refused_not_ignored():
    model = patch(stock())
    ids = tokens(1, 8)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]], device=DEVICE)
    if DEVICE == "cuda":
        pytest.skip("a device-side assertion ends the process's use of the GPU")
    with pytest.raises(RuntimeError, match="padding between the tokens"):
        model(ids, attention_mask=mask)


@not_interpreted
def test_a_mask_written_out_is_served_by_torch(caplog):
    model = stock()
    ids = tokens(2, 12)
    mask = torch.rand(2, 1, 12, 12, device=DEVICE) < 0.5
    mask = (mask & torch.ones(12, 12, dtype=torch.bool, device=DEVICE).tril()) | torch.eye(
        12, dtype=torch.bool, device=DEVICE
    )
    model.set_attn_implementation("sdpa")
    expected = model(ids, attention_mask=mask).logits
    ours._warn_of_written_out_mask.cache_clear()
    with caplog.at_level(logging.WARNING):
        same(patch(model)(ids, attention_mask=mask).logits, expected)
    assert "SDPA" in caplog.text
    with pytest.raises(ValueError, match="attention_mask"):
        patch(stock("gemma2"))(ids, attention_mask=mask)


# --- the same behaviour ----------------------------------------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("use_reentrant", [False, True])
@families
def test_gradient_checkpointing(family, use_reentrant):
    model = patch(stock(family)).train()
    ids = tokens()
    mask = padded(ids, "left")
    _, expected = logits_and_gradients(model, ids, mask)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    _, grads = logits_and_gradients(model, ids, mask)
    assert torch.equal(grads, expected)


@not_interpreted
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@families
def test_half_precision_is_no_worse_than_stock(family, how):
    ids = tokens(2, 40)
    mask = padded(ids, "left")
    # All four experts: a router of two, its scores rounded, picks others, and there is no number to compare.
    model = stock(family, **({"num_experts_per_tok": 4} if family in EXPERTS else {}))
    if how == "bfloat16":
        model.bfloat16()
    exact, _ = the_truth(model, ids, mask)
    errors = []
    for change in (lambda model: model, patch):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=how == "autocast"):
            logits, grads = logits_and_gradients(change(model), ids, mask)
        assert grads.isfinite().all()
        errors.append(relative_error(logits, exact))
    assert errors[1] <= 1.1 * errors[0]


@not_interpreted
def test_float32_norms_in_a_bfloat16_model():
    """Which stock does not run: it promotes, and the next projection refuses. Here y is of the activations' dtype."""
    model = stock().bfloat16()
    ids = tokens()
    expected = patch(copy.deepcopy(model))(ids).logits
    for module in patch(model).modules():
        if isinstance(module, ours.RMSNorm):
            module.float()
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)  # the weights are the same numbers


@not_interpreted
@pytest.mark.parametrize("patched", ["before", "after"])
def test_lora(patched):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, init_lora_weights=False)

    def tuned(when: str | None):
        model = stock()
        model = patch(model) if when == "before" else model
        torch.manual_seed(2)
        model = peft.get_peft_model(model, config)
        return patch(model) if when == "after" else model

    ids = tokens()
    mask = padded(ids, "right")
    theirs = logits_and_gradients(tuned(None), ids, mask)
    truth = the_truth(tuned(None), ids, mask)
    model = tuned(patched)
    assert any("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    as_good_as_stock(logits_and_gradients(model, ids, mask), theirs, truth)
    merged = model.merge_and_unload()
    same(unpatch(merged)(ids, attention_mask=mask).logits[mask.bool()], theirs[0])


@not_interpreted
@pytest.mark.parametrize("family, side", [*((family, "left") for family in FAMILIES), ("llama", None)])
def test_compiles_without_a_graph_break(family, side):
    if family in EXPERTS and VERSION < (5, 0):
        pytest.skip("in Transformers 4 the experts are a loop over what was routed to them, in the stock model too")
    torch._dynamo.reset()
    model = patch(stock(family))
    ids = tokens()
    mask = None if side is None else padded(ids, side)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(ids, attention_mask=mask, use_cache=False).logits
    same(logits[real], expected[real])
    logits.square().mean().backward()
    compiled_grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    expected.square().mean().backward()
    same(compiled_grads, torch.cat([p.grad.flatten() for p in model.parameters()]))


@not_interpreted
def test_a_static_cache_decodes_compiled_without_a_graph_break():
    from transformers import StaticCache

    torch._dynamo.reset()
    model = patch(stock())
    ids = tokens(2, 9)
    mask = padded(ids, "left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[:, -1]
        cache = StaticCache(config=model.config, max_cache_len=16)
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        call = {"past_key_values": cache, "use_cache": True}
        if VERSION < (5, 0):
            call["cache_position"] = torch.arange(8, device=DEVICE)
        model(ids[:, :8], attention_mask=mask[:, :8], position_ids=position_ids[:, :8], **call)
        if VERSION < (5, 0):
            call["cache_position"] = torch.tensor([8], device=DEVICE)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(ids[:, 8:], attention_mask=mask, position_ids=position_ids[:, 8:], **call)
    # stock counts position_ids from the padding where it is given none: relative positions are the same
    same(out.logits[:, -1], expected)


@not_interpreted
def test_quantised_linear_layers():
    model = patch(stock()).cpu()
    ids = tokens().cpu()
    with pytest.warns(DeprecationWarning):
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    reference = unpatch(copy.deepcopy(quantised))
    with torch.no_grad():
        same(quantised(ids).logits, reference(ids).logits)
    assert not any(type(module) is torch.nn.Linear for module in quantised.modules())


@not_interpreted
def test_torchao_int8_weights():
    quantization = pytest.importorskip("torchao.quantization")
    model = stock()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
        same(patch(model)(ids).logits, expected)


@not_interpreted
def test_sharded_by_fsdp2():
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = patch(stock())
    ids = tokens()
    mask = padded(ids, "left")
    expected, _ = logits_and_gradients(model, ids, mask)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        same(logits.detach(), expected)
        logits.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        with pytest.raises(ValueError, match="Unpatch before fully_shard"):
            unpatch(model)
    finally:
        dist.destroy_process_group()


@not_interpreted
@pytest.mark.parametrize("patched", ["before", "after"])
def test_under_the_hooks_of_device_map(patched):
    accelerate = pytest.importorskip("accelerate")
    model = stock()
    ids = tokens()
    expected = model(ids).logits
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    where = dict.fromkeys(parts, DEVICE)
    model = patch(model) if patched == "before" else model
    model = accelerate.dispatch_model(model, where, force_hooks=True)
    model = patch(model) if patched == "after" else model
    seen = []
    hook = model.model.norm.register_forward_hook(lambda *call: seen.append(call))
    same(model(ids).logits, expected)
    hook.remove()
    assert seen and isinstance(model.model.rotary_emb, ours.Rotary)
    assert torch.equal(unpatch(model)(ids).logits, expected)


@not_interpreted
def test_a_module_with_a_forward_of_its_own_is_refused():
    model = stock()
    model.model.layers[1].self_attn.forward = model.model.layers[1].self_attn.forward
    with pytest.raises(ValueError, match=r"forward of its own at layers\.1\.self_attn"):
        patch(model)
    assert not any(isinstance(m, ours._Patched) for m in model.modules())


@not_interpreted
def test_hidden_states_and_attentions_are_still_recorded():
    model = patch(stock())
    ids = tokens()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    logits = out.logits
    model.set_attn_implementation("eager")  # the only one that has attention weights
    out = model(ids, output_attentions=True)
    assert len(out.attentions) == 2 and out.attentions[0].shape == (2, 4, 20, 20)
    same(out.logits, logits)


# --- no trace --------------------------------------------------------------------------------------------------------


def state_of(module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


@not_interpreted
@families
def test_unpatch_leaves_no_trace(family):
    model, other = stock(family), stock(family)
    other.config = model.config  # some people share one
    home = sys.modules[type(model).__module__]
    before = (
        {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}, state_of(home),
        list(model.state_dict()), model.config.to_dict(),
    )  # fmt: skip
    ids = tokens()
    logits = model(ids).logits
    seed = torch.random.get_rng_state()
    assert patch(model) is model and patch(model) is model
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert list(model.state_dict()) == before[2]
    assert state_of(home) == before[1]
    assert not any(isinstance(m, ours._Patched) for m in other.modules())
    assert other.config._attn_implementation == "eager" != model.config._attn_implementation
    assert torch.equal(other(ids).logits, logits)
    assert unpatch(model) is model
    after = (
        {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}, state_of(home),
        list(model.state_dict()), model.config.to_dict(),
    )  # fmt: skip
    assert after == before
    assert torch.equal(model(ids).logits, logits)


@not_interpreted
def test_copies_and_files(tmp_path):
    model = patch(stock())
    ids = tokens()
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, expected)
        assert type(other.model.norm) is type(model.model.norm)
        same(unpatch(other)(ids).logits, expected)
        assert type(other.model.norm).__mro__[1] is torch.nn.Module
    model.save_pretrained(tmp_path)
    assert "llama_kernels" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="llama_kernels").to(DEVICE).eval()
    same(loaded(ids).logits, expected)
    same(patch(loaded)(ids).logits, expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE).eval()
    loaded.set_attn_implementation("llama_kernels")
    same(loaded(ids).logits, expected)


# --- what is refused -------------------------------------------------------------------------------------------------


@not_interpreted
def test_what_differs_is_left_and_told(monkeypatch, caplog):
    def forget():
        ours._proven.cache_clear()
        ours._patched_class.cache_clear()  # Transformers wraps the forward of each class that is made

    def wrong_sum(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(hidden_states)

    forget()
    monkeypatch.setattr(ours.DecoderLayer, "forward", wrong_sum)
    model = stock()
    ids = tokens()
    expected = model(ids).logits
    with caplog.at_level(logging.INFO):
        patch(model)
    assert "DecoderLayer left as it is" in caplog.text and "2 Attention" in caplog.text
    same(model(ids).logits, expected)

    forget()
    monkeypatch.setitem(
        ours.ALL_ATTENTION_FUNCTIONS, "llama_kernels", lambda module, q, *args, **kwargs: (q.transpose(1, 2), None)
    )
    monkeypatch.setattr(ours, "attention_forward", lambda module, q, *args, **kwargs: (q.transpose(1, 2), None))
    other = stock(rms_norm_eps=1e-5)
    with pytest.raises(ValueError, match="model is a LlamaModel"):
        patch(other)
    assert not any(isinstance(m, ours._Patched) for m in other.modules())
    forget()


@not_interpreted
@pytest.mark.parametrize("family", ["olmo2", "phi3", "cohere"])
def test_relatives_are_served_as_far_as_they_are_alike(family, caplog):
    """Their attention is of another build: stock but for the kernel, and `patch` says so."""
    model = stock(family)
    ids = tokens()
    expected = model(ids).logits
    ours._proven.cache_clear()
    with caplog.at_level(logging.WARNING):
        patch(model)
    assert "Attention left as it is" in caplog.text
    same(model(ids).logits, expected)


@not_interpreted
def test_bad_calls_name_what_is_wrong():
    with pytest.raises(TypeError, match=r"patch: model is a str"):
        patch("llama")
    with pytest.raises(TypeError, match=r"unpatch: model is a NoneType"):
        unpatch(None)
    with pytest.raises(ValueError, match="no decoder with rotary embeddings"):
        patch(torch.nn.Linear(2, 2))
    two = torch.nn.ModuleList([stock(), stock()])
    with pytest.raises(ValueError, match="LlamaModel and LlamaModel"):
        patch(two)
    model = patch(stock(attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match=r"dropout is 0\.1"):
        model(tokens())


def test_the_table_of_the_documentation_lists_what_is_tested():
    text = (Path(__file__).parent.parent / "docs/transformers.md").read_text()
    rows = [line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")]
    assert rows == list(FAMILIES)


# --- fused heads -----------------------------------------------------------------------------------------------------


class _Called(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@not_interpreted
@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_heads_are_normed_and_rotated_at_once(family, watched):
    """One op a layer; where somebody watches a norm, it is called as before."""
    if family == "gemma3_text" and VERSION < (5,):
        pytest.skip("has two rotary embeddings in Transformers 4 and keeps its attention module")
    model, ids = stock(family), tokens()
    expected = model(ids, use_cache=False).logits
    patch(model)
    seen = []
    if watched:
        model.model.layers[0].self_attn.q_norm.register_forward_hook(lambda *_: seen.append(1))
    with _Called() as called, torch.no_grad():
        logits = model(ids, use_cache=False).logits
    same(logits, expected)
    fused = called.ops.count("llama_kernels.qk_norm_rope.default")
    assert fused == model.config.num_hidden_layers - watched and len(seen) == watched
