"""Patched models against stock under random configs and random calls, drawn by hypothesis.

The suite draws the same 25 for each test. `make fuzz-models CASES=1000` draws as many new ones.
"""

from __future__ import annotations

import copy
import functools
import os
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", minversion="5.24")  # the settings and families are those of this release

from transformers import DynamicCache, StaticCache

from llama_kernels.integrations.transformers import patch
from tests.integrations.checks import CHECKS, Baseline
from tests.integrations.comparison import Run, compare_with_stock, gradients
from tests.integrations.families import (
    DYNAMIC,
    FAMILIES,
    LINEAR,
    LLAMA3,
    LONGROPE,
    SLIDING_FULL,
    UNDEFINED,
    YARN,
    config_of,
    rope,
    stock,
)
from tests.integrations.small import CACHE, not_interpreted
from tests.support.environment import DEVICE

pytestmark = not_interpreted

CASES = int(os.environ.get("CASES", 0))
drawn = settings(
    max_examples=CASES or 25,
    derandomize=not CASES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# --- random configs --------------------------------------------------------------------------------------------------

RULES = (
    rope(theta=100.0), LINEAR, DYNAMIC["rope_parameters"], LLAMA3, YARN, {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5},
    {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}, LONGROPE, rope(partial_rotary_factor=0.5),
    rope("proportional", partial_rotary_factor=0.5),
)  # fmt: skip
BOTH = (False, True)
# The settings that change what rotary embeddings, norms and attention compute, where a config has them.
CHOICES: dict[str, tuple[Any, ...]] = {
    "num_attention_heads": (2, 4, 8), "num_key_value_heads": (1, 2, 4), "head_dim": (8, 12, 16, 20, 32),
    "global_head_dim": (16, 24, 32), "hidden_size": (32, 48, 96), "kv_lora_rank": (8, 24), "q_lora_rank": (None, 8),
    "qk_rope_head_dim": (4, 16), "qk_nope_head_dim": (4, 24), "v_head_dim": (4, 24, 32),
    "sliding_window": (None, 2, 3, 8, 13, 64), "attention_chunk_size": (1, 3, 8, 64), "local_attention": (2, 6, 64),
    "window_size": (1, 4, 9), "layer_types": (SLIDING_FULL, SLIDING_FULL[::-1], SLIDING_FULL[:1] * 2),
    "no_rope_layers": ([0, 1], [1, 0], [1, 1]), "num_kv_shared_layers": (0, 1), "max_position_embeddings": (8, 24),
    "rope_parameters": RULES, "query_pre_attn_scalar": (1, 7, 64), "attention_multiplier": (0.1, 1.0),
    "attn_logit_softcapping": (None, 0.5, 30.0), "final_logit_softcapping": (None, 2.0), "clip_qkv": (None, 0.3),
    "rms_norm_eps": (1e-6, 1.0), "norm_eps": (1e-6, 1.0), "layer_norm_eps": (1e-6, 1.0), "attention_bias": BOTH,
    "qkv_bias": BOTH, "use_qkv_bias": BOTH, "mlp_bias": BOTH, "qk_layernorm": BOTH, "use_qk_norm": BOTH,
    "use_sliding_window": BOTH, "tie_word_embeddings": BOTH, "attn_temperature_tuning": BOTH, "norm_topk_prob": BOTH,
    "rope_interleave": BOTH, "attention_k_eq_v": BOTH, "use_mem_rope": BOTH,
}  # fmt: skip


@st.composite
def changes(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """One to three settings of the family's config that have other values than in its row."""
    config = config_of(family).to_dict()
    known = sorted(config.keys() & CHOICES.keys())
    names = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    made = {name: draw(st.sampled_from(CHOICES[name])) for name in names}
    rules = config.get("rope_parameters")
    if "rope_parameters" in made and rules and all(isinstance(rule, dict) for rule in rules.values()):
        made["rope_parameters"] = {layer_type: draw(st.sampled_from(RULES)) for layer_type in rules}
    return made


@drawn
@given(st.data())
def test_random_configs(data):
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    changed = data.draw(changes(family))
    name = data.draw(st.sampled_from(sorted(CHECKS)))
    assume((family, name) not in UNDEFINED)
    try:
        Baseline(family, **changed).results(name)
    except Exception:  # stock refuses it
        assume(False)
    baseline = Baseline(family, **changed)  # a dynamic rotary embedding remembers the calls before
    assume(getattr(baseline.model.config, "sliding_window", None) != 0)  # then no token sees any
    try:
        patched = patch(copy.deepcopy(baseline.model))
    except ValueError as error:
        assert "nothing can be replaced" in str(error)
    else:
        baseline.check(name, patched)


# --- random calls ----------------------------------------------------------------------------------------------------

CALLED = (
    "afmoe", "apertus", "arcee", "cohere2", "deepseek_v3", "exaone4", "gemma", "gemma2", "gemma3_text", "gemma3n_text",
    "glm4", "gpt_oss", "granite", "helium", "hunyuan_v1_dense", "laguna", "lfm2", "llama", "llama4_text",
    "mimo_v2_flash", "ministral3", "mistral", "mixtral", "modernbert-decoder", "nemotron", "olmo3", "phi3", "qwen2",
    "qwen3", "qwen3_5_text", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip


class Tokens(NamedTuple):
    ids: torch.Tensor  # (B, S)
    mask: torch.Tensor | None  # (B, S), or (1 or B, 1, S, S) with the pairs of query and key that are visible
    position_ids: torch.Tensor | None  # increasing in each row

    @property
    def shown(self) -> torch.Tensor:
        """(B, S): the tokens whose results are compared."""
        return self.mask.bool() if self.mask is not None and self.mask.ndim == 2 else torch.ones_like(self.ids).bool()


@st.composite
def tokens(draw: st.DrawFn, masks: tuple[str, ...]) -> Tokens:
    B, S = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 5, 12, 20, 33)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ids = torch.randint(3, 90, (B, S), generator=generator)
    kind = draw(st.sampled_from(masks))
    mask = None if kind == "none" else torch.ones(B, S, dtype=torch.int64)
    begin, end = (torch.randint(0, most + 1, (B, 1), generator=generator) for most in (S // 2, (S - 1) // 2))
    places = torch.arange(S)
    if kind in ("left", "both"):
        mask[places < begin] = 0
    if kind in ("right", "both"):
        mask[places >= S - end] = 0
    if kind == "holes":
        mask[torch.rand(B, S, generator=generator) < 0.3] = 0
        mask[:, -1] = 1
    if kind == "pairs":
        visible = torch.rand(B, 1, S, S, generator=generator) > 0.4
        mask = visible & (places <= places[:, None]) | (places == places[:, None])
    position_ids = {
        "none": None,
        "row": places[None],
        "offset": places.expand(B, S) + 40,
        "steps": (1 + torch.randint(0, 3, (B, S), generator=generator)).cumsum(1),
    }[draw(st.sampled_from(("none", "none", "row", "offset", "steps")))]
    on_device = (x if x is None else x.to(DEVICE) for x in (ids, mask, position_ids))
    return Tokens(*on_device)


def logits_and_gradients(tokens: Tokens, embedded: bool, last: int, **arguments: Any) -> Run:
    """Run a model. embedded: it gets embeddings instead of token ids. last: of so many tokens alone; 0: of all."""
    _, mask, position_ids = tokens
    if not tokens.shown[:, -last:].any():
        last = 0

    def run(model: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        call = {"inputs_embeds": model.get_input_embeddings()(tokens.ids)} if embedded else {"input_ids": tokens.ids}
        given_mask = mask
        if mask is not None and mask.ndim == 4:
            dtype = next(model.parameters()).dtype
            given_mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            given_mask.masked_fill_(~mask, torch.finfo(dtype).min)
        out = model(attention_mask=given_mask, position_ids=position_ids, logits_to_keep=last, **call, **arguments)
        logits = out.logits[tokens.shown[:, -last:]]
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits)
        (logits * weight).sum().backward()
        results = {"logits": logits.detach(), **gradients(model)}
        model.zero_grad()
        return results

    return run


def logits_of_steps(tokens: Tokens, ends: list[int], cache: str, crops: bool) -> Run:
    """Run a model with a cache: a forward up to each of `ends`. crops: the last token of each is computed again."""
    ids, mask, position_ids = tokens

    @torch.no_grad()
    def run(model: Any) -> dict[str, torch.Tensor]:
        static = functools.partial(StaticCache, config=model.config, max_cache_len=ids.shape[1] + 3)
        keys = {"own": lambda: None, "dynamic": DynamicCache, "static": static}[cache]()
        logits, begin = [], 0

        def step(begin: int, end: int) -> None:
            nonlocal keys
            out = model(
                ids[:, begin:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=None if position_ids is None else position_ids[:, begin:end],
                use_cache=True,
                **{CACHE: keys},
            )
            keys = getattr(out, CACHE)
            logits.append(out.logits[tokens.shown[:, begin:end]])

        for end in ends:
            step(begin, end)
            if crops and end - begin > 1:
                keys.crop(end - 1)
                step(end - 1, end)
            begin = end
        return {"logits": torch.cat(logits)}

    return run


@functools.cache
def models(family: str) -> tuple[Any, Any]:
    model = stock(family)
    return model, patch(copy.deepcopy(model))


def check(family: str, run: Run) -> None:
    model, patched = models(family)
    try:
        run(copy.deepcopy(model))
    except Exception:  # stock refuses it
        assume(False)
    compare_with_stock(copy.deepcopy(patched), copy.deepcopy(model), run)


@drawn
@given(
    family=st.sampled_from(CALLED),
    tokens=tokens(masks=("none", "ones", "left", "right", "both", "holes", "pairs")),
    embedded=st.booleans(),
    last=st.sampled_from((0, 1, 3)),
    use_cache=st.booleans(),
)
def test_random_calls(family, tokens, embedded, last, use_cache):
    check(family, logits_and_gradients(tokens, embedded, last, use_cache=use_cache))


@drawn
@given(
    family=st.sampled_from(CALLED),
    tokens=tokens(masks=("none", "ones", "left", "holes")),
    ends=st.lists(st.integers(1, 33), max_size=4),
    cache=st.sampled_from(("own", "dynamic", "static")),
    crops=st.booleans(),
)
def test_random_steps(family, tokens, ends, cache, crops):
    S = tokens.ids.shape[1]
    check(family, logits_of_steps(tokens, sorted({end for end in ends if end < S} | {S}), cache, crops))
