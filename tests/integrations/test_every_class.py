"""`patch` for every causal and image-text model class of Transformers, on the meta device with two layers each.

It returns the model, or raises a ValueError or TypeError with a message of this package.
"""

from __future__ import annotations

import copy
import importlib.util
import re

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from llama_kernels.integrations.transformers import patch, report, unpatch
from tests.integrations import families_table
from tests.integrations.families import FAMILIES, config_of

pytestmark = pytest.mark.once

LAYERS = 2
CLASSES = sorted(
    {
        (model_type, name)
        for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
        for model_type, entry in names.items()
        for name in ((entry,) if isinstance(entry, str) else entry)
    }
)

# Settings without which the default config of a family builds no model.
COMPLETED: dict[str, dict[str, object]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass": {"text_config": {"model_type": "cohere_compass_text", **copy.deepcopy(
        {**FAMILIES["cohere_compass_text"], "num_hidden_layers": LAYERS})}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": LAYERS}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                         "vocab_size_per_layer_input": 0}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "reformer": {"is_decoder": True},
}  # fmt: skip
# Families that need a package which the test suite does not install.
NOT_INSTALLED = {"fast_vlm": "timm", "gemma3n": "timm", "perception_lm": "timm", "inkling_mm_model": "scipy"}


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` with two layers in each stack, also in its sub-configs. Lists with an entry a layer become as short."""
    values = vars(config)
    counts = {
        name: value
        for name, value in values.items()
        if isinstance(value, int) and value > LAYERS and re.search(r"(layers?|depth|blocks)$", name)
    }
    for name, value in list(values.items()):
        if isinstance(value, PreTrainedConfig):
            shrunk(value)
        elif name in counts:
            setattr(config, name, LAYERS)
        elif isinstance(value, (list, tuple)) and len(value) in counts.values():
            setattr(config, name, value[:LAYERS])
    return config


def build(model_type: str, name: str) -> torch.nn.Module:
    model_class = getattr(transformers, name)
    config_class = CONFIG_MAPPING[model_type]
    if config_class.sub_configs and not issubclass(config_class, model_class.config_class):
        config_class, model_type = model_class.config_class, model_class.config_class.model_type  # only the text model
    if model_type in FAMILIES:
        config = config_of(model_type)
    else:
        config = shrunk(config_class(**copy.deepcopy(COMPLETED.get(model_type, {}))))
    with torch.device("meta"):
        return model_class._from_config(config)


@pytest.mark.parametrize(("model_type", "name"), CLASSES, ids=["-".join(entry) for entry in CLASSES])
def test_patch_returns_the_model_or_raises_an_error_of_this_package(model_type, name):
    if model_type in NOT_INSTALLED and importlib.util.find_spec(NOT_INSTALLED[model_type]) is None:
        pytest.skip(f"needs {NOT_INSTALLED[model_type]}")
    try:
        model = build(model_type, name)
    except Exception as error:
        if transformers.__version__ == families_table.committed()[0]:
            raise
        pytest.skip(f"the config is for another version: {error!r}")
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        assert patch(model) is model
    except (ValueError, TypeError) as refusal:
        assert str(refusal).startswith("llama_kernels."), f"not an error of this package: {refusal!r}"
    else:
        assert all(isinstance(row.ours, bool) and (row.ours or row.why) for row in report(model).rows)
        unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
