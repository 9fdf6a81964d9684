"""A training step of one variation, and whether its gradients are right."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from bench.providers.provider import NOT_INSTALLED, Unsupported
from bench.training.scale import Scale
from bench.training.variations import Variation
from bench.works.errors import UNIT, relative_errors


def llama(scale: Scale, device: str, dtype: torch.dtype) -> nn.Module:
    """The stock model of `scale` with random weights. Raises Unsupported without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise Unsupported(f"{NOT_INSTALLED} (pip install transformers)") from None
    m = scale.model
    config = LlamaConfig(
        vocab_size=m.vocab, hidden_size=m.hidden, intermediate_size=m.mlp, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim,
        max_position_embeddings=max(scale.S, 8192), rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).train()


class Step:
    """A training step of one variation, on random tokens or, for a decoder layer, on random hidden states."""

    def __init__(self, scale: Scale, variation: Variation, device: str, dtype: torch.dtype, stock: nn.Module) -> None:
        self.scale, self.variation = scale, variation
        if device == "cpu" and not variation.cpu:
            raise Unsupported("needs a GPU")
        self.model = variation.change(copy.deepcopy(stock).to(dtype))
        module = self.model if scale.whole else self.model.model.layers[0]
        self.module = torch.compile(module, dynamic=False) if variation.compiled else module
        self.parameters = list(module.parameters())
        torch.manual_seed(1)
        if scale.whole:
            self.tokens = torch.randint(scale.model.vocab, (scale.B, scale.S), device=device)
            fused = device == "cuda"
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=fused)
        else:
            shape = (scale.B, scale.S, scale.model.hidden)
            self.x = torch.randn(shape, device=device).to(dtype).requires_grad_()
            self.dy = torch.randn(shape, device=device).to(dtype)
            positions = torch.arange(scale.S, device=device)[None]
            self.angles = self.model.model.rotary_emb(self.x.detach(), positions)

    def forward(self) -> torch.Tensor:
        if self.scale.whole:
            return self.module(input_ids=self.tokens, labels=self.tokens).loss
        y = self.module(self.x, attention_mask=None, position_embeddings=self.angles)
        return y[0] if isinstance(y, tuple) else y

    def backward(self, y: torch.Tensor) -> None:
        y.backward(None if self.scale.whole else self.dy)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients of all parameters, and first that of a decoder layer's input."""
        with self.variation.active():
            self.backward(self.forward())
        leaves = self.parameters if self.scale.whole else [self.x, *self.parameters]
        grads = [p.grad for p in leaves]
        self.forget()
        return grads

    def forget(self) -> None:
        for p in (*self.parameters, *(() if self.scale.whole else (self.x,))):
            p.grad = None

    def __call__(self) -> None:
        with self.variation.active():
            self.backward(self.forward())
            if self.scale.whole:
                self.optimizer.step()
        self.forget()


def disparity(step: Step, truth: list[torch.Tensor], plain: list[float]) -> tuple[float | None, str | None]:
    """The largest relative error of a gradient if it is finite, and the reason why it is wrong, or None.

    The limit is that of bench.works.errors.disparity. `plain` are the errors of the stock model.
    """
    worst, reason = 0.0, None
    for grad, exact, stock in zip(step.gradients(), truth, plain, strict=True):
        error, _ = relative_errors(grad, exact)
        limit = 2 * stock + 2 * UNIT[step.scale.dtype]
        worst = max(worst, error, key=lambda e: (e != e, e))
        if not error <= limit:
            shape = tuple(exact.shape)
            reason = f"wrong numbers: a gradient of shape {shape} is off by {error:.1e}, allowed {limit:.1e}"
    return worst if math.isfinite(worst) else None, reason
