"""Small models of a few families, in every supported release of Transformers, and a comparison with stock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from llama_kernels.core.language import INTERPRETED
from tests.integrations.checks import DoubleSoftmax, close
from tests.support.environment import DEVICE

# What these tests are about is what runs where; the kernels have their own tests, and interpreting takes minutes.
not_interpreted = pytest.mark.skipif(
    INTERPRETED, reason="runs on the reference path, or on a GPU, with compiled kernels"
)
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))

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


def small(family: str = "llama", attention: str = "eager", auto: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    """A small stock model of random weights, biases and norms among them."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **copy.deepcopy({**SIZES, **FAMILIES.get(family, {}), **changes}))
    model = auto.from_config(config, attn_implementation=attention).eval()
    model.config._experts_implementation = "eager"  # the grouped one has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(DEVICE)


def tokens(B: int = 2, S: int = 20) -> torch.Tensor:
    return torch.randint(3, 90, (B, S), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def padded(ids: torch.Tensor, side: str) -> torch.Tensor:
    """attention_mask: the first sequence is shorter by six tokens, or has a hole of three."""
    mask = torch.ones_like(ids)
    if side != "none":
        mask[0, {"left": slice(0, 6), "right": slice(-6, None), "hole": slice(4, 7)}[side]] = 0
    return mask


Run = Callable[[Any], dict[str, torch.Tensor]]  # of a model: logits by that name, and gradients


def logits_and_gradients(ids: torch.Tensor, mask: torch.Tensor | None = None, **how: Any) -> Run:
    """Logits of the tokens that are no padding; the gradients of their loss, parameter by parameter."""

    def run(model: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = model(ids, attention_mask=mask, **{"use_cache": False, **how}).logits[:, -ids.shape[1] :]
        there = torch.ones_like(ids).bool() if mask is None else mask.bool()
        last = there[:, 1:] & there[:, :-1]
        F.cross_entropy(logits[:, :-1][last], ids[:, 1:][last]).backward()
        gradients = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {"logits": logits.detach()[there], **gradients}

    return run


def logits_of(ids: torch.Tensor, **how: Any) -> Run:
    @torch.no_grad()
    def run(model: Any) -> dict[str, torch.Tensor]:
        return {"logits": model(ids, **how).logits}

    return run


def as_stock(ours: Any, stock: Any, run: Run, ours_runs: Run | None = None) -> None:
    """AssertionError where the model `ours` does not do as `stock` does: tests/integrations/checks.py has the rule."""
    theirs = run(stock)
    with DoubleSoftmax():
        truth = run(copy.deepcopy(stock).double())
    close((ours_runs or run)(ours), theirs, truth)


class Calls(TorchDispatchMode):
    """The operators that are called inside, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        self.made.append((func._schema.name, {**dict(zip(names, args, strict=False)), **(kwargs or {})}))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for op, arguments in self.made if op == f"llama_kernels::{name}"]


_READS_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique")


class WithoutWaiting(TorchDispatchMode):
    """Refuses operators whose result the host must wait for. What an operator of ours does inside is not looked at."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(_READS_VALUES):
            raise AssertionError(f"the host waits for {name}")
        if name == "index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError("the host waits for the size of an index")
        return func(*args, **(kwargs or {}))
