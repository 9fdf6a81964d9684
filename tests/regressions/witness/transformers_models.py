"""Transformers' own tests of every model, for Llama, with our attention under it. None of their code is here.

    pip download --no-deps --no-binary :all: transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
    TRITON_INTERPRET=0 SUITE=transformers-5.23.0 python -m pytest -o addopts=
    tests/regressions/witness/transformers_models.py

SUITE is an unpacked source distribution, of the installed version: its tests/test_modeling_common.py is loaded as a
package of another name than our `tests`, and what a source distribution leaves out is stood in for. ATTENTION=sdpa runs
the same with the stock attention. docs/transformers.md says what passes.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

import llama_kernels.integrations.transformers  # noqa: F401  registers the attention

if "SUITE" not in os.environ:
    pytest.exit("SUITE: wanted the folder of an unpacked source distribution of transformers", returncode=2)

_PACKAGE = "transformers_tests"


class _StandIn(types.ModuleType):
    """A module that a source distribution leaves out: whatever is imported from it is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _suite() -> types.ModuleType:
    tests = Path(os.environ["SUITE"], "tests").resolve()
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[_PACKAGE] = package
    for name in ("exporters.test_export", "generation.test_utils", "distributed_testing_utils"):
        if not tests.joinpath(*name.split(".")).with_suffix(".py").exists():
            for part in (name.split(".")[0], name):
                sys.modules[f"{_PACKAGE}.{part}"] = _StandIn(f"{_PACKAGE}.{part}")
    return importlib.import_module(f"{_PACKAGE}.test_modeling_common")


_common = _suite()


class _Tester:
    """What the suite asks of a model's tester."""

    batch_size, seq_length, is_training = 13, 7, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def get_config(self) -> LlamaConfig:
        config = LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        config._attn_implementation = os.environ.get("ATTENTION", "llama_kernels")
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
        ids = _common.ids_tensor([self.batch_size, self.seq_length], 99)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class LlamaTest(_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification,
        LlamaForQuestionAnswering,
    )  # fmt: skip
    all_generative_model_classes = ()  # the generation suite is not in a source distribution
    _is_composite = False

    def setUp(self) -> None:
        self.model_tester = _Tester()

    @unittest.skip("asks for attention weights, which Transformers refuses for all but eager")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...
