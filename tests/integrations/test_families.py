"""Patched models of every decoder family of Transformers pass the checks; docs/transformers.md has the table."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.integrations import families_table
from tests.integrations.checks import Baseline
from tests.integrations.families import EVERY_FAMILY, FAMILIES, MULTIMODAL, NO_ROW, decoder_families
from tests.integrations.small import VERSION
from tests.support.environment import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs on the reference path, or on a GPU with compiled kernels")

# Families in which attention, norms and rotary embeddings are all replaced.
FULLY_REPLACED = (
    "arcee", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "glm4_moe", "gpt_oss", "granite", "helium", "hunyuan_v1_dense", "llama", "llama4_text", "ministral3", "mistral",
    "mixtral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "starcoder2",
)  # fmt: skip


def skip_what_cannot_be_built(family: str) -> None:
    """The configs are for the release of the table. Another release may raise for one."""
    try:
        Baseline(family)
    except Exception as error:
        pytest.skip(f"Transformers {transformers.__version__} refuses this config: {error}")


def stock_agrees_with_itself(family: str, name: str) -> bool:
    """Whether stock with SDPA passes the check. In some releases SDPA differs from eager attention, or raises."""
    baseline = Baseline(family)
    other = copy.deepcopy(baseline.model)
    try:
        other.set_attn_implementation("sdpa")
        baseline.check(name, other)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_patched_family_passes_every_check(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {family}")
    version, lines = families_table.committed()
    if family in ("bamba", "falcon_h1", "stablelm") and VERSION < (5, 2):
        pytest.skip("up to Transformers 5.1, its mask has one key too many for attention other than eager and SDPA")
    if version != transformers.__version__:
        skip_what_cannot_be_built(family)
    line, failed, rows = families_table.families_row(family)
    if version != transformers.__version__:
        failed = {name: why for name, why in failed.items() if stock_agrees_with_itself(family, name)}
    assert not failed, "; ".join(f"{name}: {why}" for name, why in failed.items())
    if family in FULLY_REPLACED:
        assert rows
        theirs = [row for row in rows if row.kind in families_table.KINDS and not row.ours]
        assert not theirs, f"stock: {theirs}"
    if family in MULTIMODAL:
        assert all(row.ours for row in rows if row.kind == "attention" and "Vision" not in row.cls), rows
    if version == transformers.__version__:
        assert line in lines, f"docs/transformers.md is out of date, see tests/integrations/families_table.py: {line}"


def test_the_table_has_a_row_for_each_family():
    version, lines = families_table.committed()
    if version != transformers.__version__:
        pytest.skip(f"the table is of Transformers {version}")
    assert lines[:2] == families_table.header()
    assert [line.split("|")[1].strip() for line in lines[2:]] == families_table.installed()


def test_every_installed_decoder_family_is_tested():
    if families_table.committed()[0] != transformers.__version__:
        pytest.skip("other versions have other families")
    assert decoder_families() <= FAMILIES.keys() | NO_ROW.keys()
    assert not FAMILIES.keys() & NO_ROW.keys()


# --- tests of the checks ---------------------------------------------------------------------------------------------


def wrong_window(model):
    model.config.sliding_window += 1


def wrong_scale(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1 + 1e-4


def wrong_norm(model):
    model.model.norm.variance_epsilon *= 2


def no_dropout(model):
    for layer in model.model.layers:
        layer.resid_attn_dropout.p = 0.0


def one_random_number_more(model):
    def draw(module, args):
        torch.rand(1)

    model.register_forward_pre_hook(draw)


def rotary_without_scaling(model):
    model.model.rotary_emb.rope_type = "default"


def queries_without_scaling(model):
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.0


def no_gradient(model):
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: out.detach())


@pytest.mark.parametrize(
    ("family", "change", "caught"),
    [
        ("mistral", wrong_window, {"no padding", "left", "right", "training", "far positions", "cache", "generate"}),
        ("llama", wrong_scale, {"no padding", "left", "right", "training", "far positions", "cache"}),
        ("llama", wrong_norm, {"no padding", "left", "right", "training", "far positions", "cache"}),
        ("phi3", no_dropout, {"training"}),
        ("llama", one_random_number_more, {"training"}),
        ("phi3", rotary_without_scaling, {"far positions"}),
        ("ministral3", queries_without_scaling, {"far positions"}),
        ("llama", no_gradient, {"no padding", "left", "right", "training"}),
    ],
)
def test_the_checks_find_a_model_that_differs_from_stock(family, change, caught):
    baseline = Baseline(family)
    other = copy.deepcopy(baseline.model)
    change(other)
    found = set()
    for name in baseline.checks:
        try:
            baseline.check(name, other)
        except AssertionError:
            found.add(name)
    assert caught <= found, f"not found by {sorted(caught - found)}"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "llama4_text", "qwen2_5_vl"])
def test_the_checks_pass_for_stock_with_sdpa(family):
    """SDPA adds in another order than eager attention."""
    if family == "qwen2_5_vl" and VERSION < (5, 3):
        pytest.skip("its generate does not take mm_token_type_ids, which the batches of the table have")
    baseline = Baseline(family)
    other = copy.deepcopy(baseline.model)
    other.set_attn_implementation("sdpa")
    for name in baseline.checks:
        baseline.check(name, other)
