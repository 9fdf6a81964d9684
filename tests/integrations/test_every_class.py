"""`patch` on every class of causal and of image-text model that Transformers has: it returns the model, or it raises a
ValueError or TypeError of its own. On the meta device, two layers each."""

from __future__ import annotations

import copy
import re

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from llama_kernels.integrations.transformers import patch, report, unpatch
from tests.integrations.families import FAMILIES, config_of

LAYERS = 2
MAPPINGS = (
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
)
NAMES = sorted(
    {
        (model_type, name)
        for names, _ in MAPPINGS
        for model_type, entry in names.items()
        for name in ((entry,) if isinstance(entry, str) else entry)
    }
)

CANNOT_BE_BUILT: dict[str, str] = {}


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` with two layers of each kind of stack, in each config inside it; lists that have an entry a layer are cut."""
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
    config_class = CONFIG_MAPPING[model_type]
    model_class = next(
        c
        for _, mapping in MAPPINGS
        if config_class in mapping
        for entry in [mapping[config_class]]
        for c in (entry if isinstance(entry, tuple) else (entry,))
        if c.__name__ == name
    )
    config = config_of(model_type) if model_type in FAMILIES else shrunk(config_class())
    with torch.device("meta"):
        return model_class._from_config(config)
