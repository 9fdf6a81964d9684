"""Small models of a few families, in every supported release of Transformers, and what their tests share."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from llama_kernels.core.language import INTERPRETED
from llama_kernels.integrations.transformers import patch, report
from tests.support.environment import DEVICE

# These tests are about which code runs in a model. The kernels have tests of their own, and interpreting takes minutes.
not_interpreted = pytest.mark.skipif(
    INTERPRETED, reason="runs on the reference path, or on a GPU with compiled kernels"
)
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# Before Transformers 5.4, a mask gets the positions of the queries as a tensor, which the host does not read.
HOST_KNOWS_POSITIONS = "q_offset" in inspect.signature(masking_utils.sdpa_mask).parameters
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"  # the name of this argument and output

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "rms_norm_eps": 1e-2,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16, "layer_types": ALTERNATING},
    "gpt_oss": {"head_dim": 16, "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 4,
                "layer_types": ALTERNATING},
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)


def small(family: str = "llama", attention: str = "eager", auto: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    """A small stock model with random weights."""
    if family == "phimoe" and VERSION == (5, 4):
        pytest.skip("Transformers 5.4 refuses its own default config of Phi MoE")
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **copy.deepcopy({**SIZES, **FAMILIES.get(family, {}), **changes}))
    model = auto.from_config(config, attn_implementation=attention)
    model.config._experts_implementation = "eager"  # the grouped one has no float64
    return randomized(model)


def randomized(model: Any) -> Any:
    """`model` with noise added to all parameters, since biases and norms start as constants; in eval mode on DEVICE."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().to(DEVICE)


def patched(model: Any, **options: Any) -> Any:
    """A patched copy of `model`."""
    return patch(copy.deepcopy(model), **options)


def as_kernels_wraps(func: Any) -> nn.Module:
    """Wraps a function as use_kernel_forward_from_hub of kernels 0.17 does."""

    class Func(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

    return Func()


def stock_rows(model: Any) -> dict[tuple[str, str], str]:
    """Why operations stay stock, by kind and class of their module."""
    return {(row.kind, row.cls): row.why for row in report(model).rows if not row.ours}


def needs_our_attention(model: Any) -> None:
    """Skip a test where this release of Transformers does not call AttentionInterface in the model."""
    if not any(row.kind == "attention" for row in report(model).rows):
        pytest.skip(f"{type(model).__name__} of Transformers {transformers.__version__} has attention of its own")


def ops_of(model: Any) -> set[str]:
    """The names of our operators that a forward calls."""
    with Calls() as calls, torch.no_grad():
        model(tokens(), use_cache=False)
    return calls.ours()


def tokens(B: int = 2, S: int = 20) -> torch.Tensor:
    return torch.randint(3, 90, (B, S), generator=torch.Generator().manual_seed(2)).to(DEVICE)


class Calls(TorchDispatchMode):
    """Records the operators that are called in the context, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        self.made.append((func._schema.name, {**dict(zip(names, args, strict=False)), **(kwargs or {})}))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[dict[str, Any]]:
        """The arguments of each call of one of our operators."""
        return [arguments for op, arguments in self.made if op == f"llama_kernels::{name}"]

    def ours(self) -> set[str]:
        """The names of our operators that were called."""
        return {name.removeprefix("llama_kernels::") for name, _ in self.made if name.startswith("llama_kernels::")}


_READS_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique")


class WithoutWaiting(TorchDispatchMode):
    """Raises for operators whose result the host waits for. What our operators call inside is not checked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(_READS_VALUES):
            raise AssertionError(f"the host waits for {name}")
        if name == "index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError("the host waits for the size of an index")
        return func(*args, **(kwargs or {}))
