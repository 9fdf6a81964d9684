"""A patched model in use: hooks, fine-tuning methods, precisions, heads and training do as in the stock model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="4.57")

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llama_kernels.integrations.transformers import patch, report, unpatch
from tests.integrations.checks import DoubleSoftmax, DropoutInFloat32
from tests.integrations.small import (
    FAMILIES,
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
from tests.support.judge import relative_error

families = pytest.mark.parametrize("family", FAMILIES)


def test_through_the_kernels():
    """In Triton's interpreter too: logits, gradients and a few generated tokens."""
    stock = small(num_hidden_layers=1)
    ids = tokens(2, 8)
    mask = padded(ids, "left")
    how = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    ours = patch(copy.deepcopy(stock))
    as_stock(ours, stock, logits_and_gradients(ids, mask))
    assert torch.equal(ours.generate(ids, **how), stock.generate(ids, **how))


# --- hooks -----------------------------------------------------------------------------------------------------------


def called_hooks(model: nn.Module, name: str) -> list[str]:
    """The hooks of one module that fire in a step of training, in order."""
    seen: list[str] = []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_pre_hook(lambda *_: seen.append("before backward"))
    module.register_full_backward_hook(lambda *_: seen.append("after backward"))
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    return seen


@not_interpreted
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.input_layernorm"),
        ("llama", "model.layers.1.post_attention_layernorm"),
        ("llama", "model.norm"),
        ("llama", "model.layers.0.self_attn"),
        ("llama", "model.layers.0"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm"),
        ("qwen3", "model.layers.0.self_attn.q_norm"),
        ("qwen3", "model.layers.1.self_attn.k_norm"),
    ],
)
def test_hooks_fire_as_in_stock(family, name):
    assert called_hooks(patch(small(family)), name) == called_hooks(small(family), name) != []


WATCHED = [("llama", "model.layers.1.post_attention_layernorm"), ("qwen3", "model.layers.0.self_attn.q_norm")]


@not_interpreted
@pytest.mark.parametrize(("family", "name"), WATCHED)
@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_a_hook_that_edits_an_output_is_obeyed(family, name, when):
    def hooked(model: nn.Module) -> nn.Module:
        model.get_submodule(name).register_forward_hook(lambda module, args, y: y * 0.5)
        return model

    stock = hooked(small(family))
    ours = patch(hooked(small(family))) if when == "before patch" else hooked(patch(small(family)))
    run = logits_and_gradients(tokens())
    as_stock(ours, stock, run)
    assert (run(ours)["logits"] - run(small(family))["logits"]).abs().max() > 1e-2


@not_interpreted
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_fusions_make_way_for_hooks_and_come_back(family):
    """One operator for norm and rotation of heads; in a layer whose norm has a hook the module is called."""
    model = patch(small(family))
    norm, seen = model.model.layers[0].self_attn.q_norm, []

    def fused() -> int:
        with Calls() as calls, torch.no_grad():
            model(tokens(), use_cache=False)
        return len(calls.of("qk_norm_rope"))

    assert fused() == 2
    hook = norm.register_forward_hook(lambda *_: seen.append(1))
    assert fused() == 1 and seen == [1]
    hook.remove()
    assert fused() == 2 and seen == [1]
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        fused()
    finally:
        hook.remove()
    assert any(module is norm for module in seen)


# --- parts of a model used by others ---------------------------------------------------------------------------------


@not_interpreted
def test_the_rotary_embedding_returns_what_stock_returns():
    stock, ours = small(), patch(small())
    x, positions = torch.zeros(1, 4, 64, device=DEVICE), torch.arange(4, device=DEVICE)[None]
    for a, b in zip(ours.model.rotary_emb(x, positions), stock.model.rotary_emb(x, positions), strict=True):
        assert torch.equal(a, b)


@not_interpreted
@pytest.mark.parametrize("part", ["layer", "attention"])
def test_a_layer_is_called_with_a_pair_of_tables(part):
    x = torch.randn(1, 6, 64, device=DEVICE)

    def run(model: Any) -> dict[str, torch.Tensor]:
        h = x.to(model.dtype)
        turn = model.model.rotary_emb(h, torch.arange(6, device=DEVICE)[None])
        layer = model.model.layers[0]
        if part == "attention":
            return {"logits": layer.self_attn(h, position_embeddings=turn, attention_mask=None)[0].detach()}
        out = layer(h, position_embeddings=turn)
        return {"logits": (out[0] if isinstance(out, tuple) else out).detach()}

    as_stock(patch(small(attention="sdpa")), small(attention="sdpa"), run)


# --- precision -------------------------------------------------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@families
def test_half_precision_is_no_worse_than_stock(family, how):
    ids = tokens(2, 40)
    run = logits_and_gradients(ids, padded(ids, "left"))
    model = small(family)
    if how == "bfloat16":
        model.bfloat16()
    with DoubleSoftmax():
        exact = run(copy.deepcopy(model).double())["logits"]
    errors = []
    for changed in (model, patch(copy.deepcopy(model))):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=how == "autocast"):
            results = run(changed)
        assert all(x.isfinite().all() for x in results.values())
        errors.append(relative_error(results["logits"], exact))
    assert errors[1] <= 1.1 * errors[0]


def with_float32_norms(model: nn.Module) -> nn.Module:
    model.bfloat16()
    for name, module in model.named_modules():
        if name.rpartition(".")[2].endswith("norm"):
            module.float()
    return model


@not_interpreted
def test_float32_norms_of_a_bfloat16_model_promote_as_in_stock():
    """Then the next projection refuses: a loss of precision is not made up."""
    for model in (with_float32_norms(small()), patch(with_float32_norms(small()))):
        with pytest.raises(RuntimeError, match="dtype"):
            model(tokens())


@not_interpreted
def test_float32_norms_that_cast_their_result_are_ours():
    """Gemma's: the result has the dtype of the activations."""
    stock = with_float32_norms(small("gemma2"))
    ours = patch(copy.deepcopy(stock))
    with Calls() as calls, torch.no_grad():
        logits = ours(tokens(), use_cache=False).logits
    assert any(name.startswith("llama_kernels::rms_norm") for name, _ in calls.made)
    with DoubleSoftmax():
        exact = copy.deepcopy(stock).double()(tokens(), use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, exact) <= 1.1 * relative_error(stock(tokens(), use_cache=False).logits, exact)


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def tuned(config: Any, when: str | None) -> nn.Module:
    """A small Llama with an adapter of PEFT, patched before it, after it, or not at all."""
    import peft

    model = small()
    model = patch(model) if when == "before" else model
    torch.manual_seed(2)
    model = peft.get_peft_model(model, config).to(DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return patch(model) if when == "after" else model


@not_interpreted
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, init_lora_weights=False)
    run = logits_and_gradients(tokens(), padded(tokens(), "right"))
    stock, ours = tuned(config, None), tuned(config, when)
    assert any("lora" in name for name in run(ours))
    as_stock(ours, stock, run)
    merged = ours.merge_and_unload()
    assert {row.ours for row in report(merged).rows} == {True}
    logits = logits_of(tokens())
    as_stock(merged, stock, logits)
    as_stock(unpatch(merged), stock, logits)


@not_interpreted
@pytest.mark.parametrize("when", ["before", "after"])
def test_tuned_norms(when):
    """PEFT's LN tuning wraps each norm in a module of its own."""
    peft = pytest.importorskip("peft")
    norms = ["input_layernorm", "post_attention_layernorm", "norm"]
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=norms)
    run = logits_and_gradients(tokens(), padded(tokens(), "left"))
    stock, ours = tuned(config, None), tuned(config, when)
    assert sum("norm" in name for name in run(ours)) == 5
    as_stock(ours, stock, run)


@not_interpreted
def test_another_norm_in_the_place_of_one():
    def with_layer_norm(model: nn.Module) -> nn.Module:
        for layer in model.model.layers:
            layer.post_attention_layernorm = nn.LayerNorm(64, device=DEVICE)
        return model

    run = logits_and_gradients(tokens())
    as_stock(patch(with_layer_norm(small())), with_layer_norm(small()), run)
    as_stock(with_layer_norm(patch(small())), with_layer_norm(small()), run)


@not_interpreted
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "AdaptionPromptConfig"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_virtual_tokens(kind, side, when):
    """Before padding on the left they leave a hole in the mask."""
    peft = pytest.importorskip("peft")
    sizes = {"adapter_len": 4, "adapter_layers": 2} if kind == "AdaptionPromptConfig" else {"num_virtual_tokens": 5}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **sizes)
    run = logits_and_gradients(tokens(), padded(tokens(), side))
    if kind == "PrefixTuningConfig":
        run = logits_and_gradients(tokens(), padded(tokens(), side), use_cache=True)
    as_stock(tuned(config, when), tuned(config, None), run)


# --- training --------------------------------------------------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("use_reentrant", [False, True])
@families
def test_gradient_checkpointing(family, use_reentrant):
    model = patch(small(family)).train()
    run = logits_and_gradients(tokens(), padded(tokens(), "left"))
    expected = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    results = run(model)
    assert all(torch.equal(results[name], x) for name, x in expected.items())


@not_interpreted
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("starcoder2", {"residual_dropout": 0.5, "embedding_dropout": 0.5, "norm_epsilon": 1e-2}),
        ("seed_oss", {"residual_dropout": 0.5, "head_dim": 16}),
        ("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    ],
)
def test_dropout_of_hidden_states(family, config):
    """The same elements as in stock, from one seed."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {family}")
    stock = small(family, attention_dropout=0.0, **config).train()
    ours = patch(copy.deepcopy(stock))
    step = logits_and_gradients(tokens())

    def run(model: nn.Module) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        with DropoutInFloat32():
            return step(model)

    as_stock(ours, stock, run)
    assert (run(ours)["logits"] - step(ours.eval())["logits"]).abs().max() > 1e-1


@not_interpreted
def test_loss_curves_lie_on_each_other():
    losses = []
    batches = [torch.randint(3, 20, (4, 24), device=DEVICE) for _ in range(12)]
    for change in (lambda model: model, patch):
        model = change(small()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append([])
        for ids in batches:
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    fallen = losses[0][0] - losses[0][-1]
    assert fallen > 0.5
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.01 * fallen


# --- quantised weights -----------------------------------------------------------------------------------------------


@not_interpreted
def test_quantised_linear_layers():
    ids, model = tokens().cpu(), patch(small()).cpu()
    with pytest.warns(DeprecationWarning):
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    stock = unpatch(copy.deepcopy(quantised))
    with torch.no_grad():
        a, b = (m(ids).logits for m in (quantised, stock))
    plain = small().cpu()(ids).logits
    assert relative_error(a, b) <= 0.1 * relative_error(
        b, plain
    )  # int8 rounds again what differs in float32's last bit


@not_interpreted
def test_torchao_int8_weights():
    quantization = pytest.importorskip("torchao.quantization")
    stock = small()
    quantization.quantize_(stock, quantization.Int8WeightOnlyConfig())
    as_stock(patch(copy.deepcopy(stock)), stock, logits_of(tokens()))


# --- the rest of a model ---------------------------------------------------------------------------------------------

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
    """Stock's own module computes the frequencies, anew for a longer sequence where the rule has it so."""
    scaling = {"rope_type": rule, "rope_theta": 10000.0, **RULES[rule]}
    stock = small(rope_scaling=scaling, max_position_embeddings=16)
    ours = patch(copy.deepcopy(stock))
    for length in (12, 40, 12):
        as_stock(ours, stock, logits_of(tokens(2, length)))


@not_interpreted
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_every_head(head):
    auto = getattr(transformers, f"AutoModelFor{head}")
    ids = tokens()
    ids[0, -6:] = 0
    mask = (ids != 0).long()
    two = {name: torch.tensor([2, 9], device=DEVICE) for name in ("start_positions", "end_positions")}
    labels = {
        "SequenceClassification": {"labels": torch.tensor([0, 1], device=DEVICE)},
        "TokenClassification": {"labels": ids % 2},
        "QuestionAnswering": two,
    }[head]

    def run(model: nn.Module) -> dict[str, torch.Tensor]:
        out = model(ids, attention_mask=mask, **labels)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        scores = (out.start_logits, out.end_logits) if head == "QuestionAnswering" else (out.logits,)
        # Of padding too, since the loss of question answering is over all tokens.
        return {"few logits": torch.stack(scores).detach(), **{name: x.clone() for name, x in gradients.items()}}

    stock = small(auto=auto)
    as_stock(patch(copy.deepcopy(stock)), stock, run)


@not_interpreted
def test_hidden_states_and_attentions():
    stock = small()
    ours = patch(copy.deepcopy(stock))
    ids = tokens()

    def hidden(model: nn.Module) -> dict[str, torch.Tensor]:
        states = model(ids, output_hidden_states=True).hidden_states
        assert len(states) == 3
        return {"logits": torch.stack(states).detach()}

    as_stock(ours, stock, hidden)
    ours.set_attn_implementation("eager")  # the one that has the weights

    def weights(model: nn.Module) -> dict[str, torch.Tensor]:
        attentions = model(ids, output_attentions=True).attentions
        assert len(attentions) == 2 and attentions[0].shape == (2, 4, 20, 20)
        return {"logits": torch.stack(attentions).detach()}

    as_stock(ours, stock, weights)


# --- images ----------------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 2, "vocab_size": 99, "pad_token_id": 0}  # fmt: skip


def gemma3() -> nn.Module:
    text = {**TEXT, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=98, boi_token_index=97,
        eoi_token_index=96,
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


@not_interpreted
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("image", [slice(0, 0), slice(7, 12), slice(14, 20)])
@pytest.mark.parametrize("build", [gemma3, paligemma])
def test_the_tokens_of_an_image_see_ahead(build, image, side):
    """Gemma 3's see each other; PaliGemma's, which are in the prefix, all of it."""
    ids = tokens()
    kinds = torch.zeros_like(ids)
    if build is gemma3:
        kinds[:, image] = 1
    else:
        kinds[:, image.stop :] = 1  # what follows the prefix
    stock = build().train() if build is paligemma else build().eval()
    run = logits_and_gradients(ids, padded(ids, side), token_type_ids=kinds)
    as_stock(patch(copy.deepcopy(stock)), stock, run)
