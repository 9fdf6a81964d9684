"""Layers for the package `kernels` of Hugging Face, whose `kernelize` puts their forwards into a model's own modules.

A layer has no state: its forward reads the attributes of the module that it is put into. `metadata.json` at the root of
the repository lets `kernels.get_local_kernel` load this package from there. docs/transformers.md has an example.

`llama_kernels.integrations.transformers.patch` replaces more, and only code that is known to compute the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llama_kernels.core.checks import check_dense, message, shape_of
from llama_kernels.ops.rms_norm import rms_norm
from llama_kernels.ops.rope import rope

__all__ = ["ApplyRotaryPosEmb", "RMSNorm"]


class RMSNorm(nn.Module):
    """For Transformers' layer "RMSNorm", with a weight (hidden_size,) and variance_epsilon, as Llama's."""

    can_torch_compile = True
    has_backward = True

    if TYPE_CHECKING:
        weight: torch.Tensor
        variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize hidden_states (..., hidden_size). Returns its shape and dtype."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class ApplyRotaryPosEmb(nn.Module):
    """For Transformers' function "rotary_pos_emb", as Llama's: it rotates q and k by pairs of elements D/2 apart.

    Not for openai_privacy_filter, whose function of this name rotates pairs of neighbours, nor before Transformers 5.24
    for nanochat, whose function rotates by negative angles. The arguments do not tell.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate q (B, Hq, S, D) and k (B, Hkv, S, D) by cos and sin (B, S, D), or, as in GPT-OSS, (B, S, D/2).

        With unsqueeze_dim=2, q and k are (B, S, H, D).

        Raises:
            TypeError, ValueError: as `llama_kernels.rope`; also if unsqueeze_dim is neither 1 nor 2.
        """
        op = "layers.ApplyRotaryPosEmb"
        for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
            check_dense(op, name, x)
            if x.ndim < 3:
                raise ValueError(message(op, name, shape_of(x), "heads (B, H, S, D), or one row of angles per token"))
        if not isinstance(unsqueeze_dim, int) or unsqueeze_dim not in (1, 2):
            raise ValueError(message(op, "unsqueeze_dim", repr(unsqueeze_dim), "1 or 2"))
        half = q.shape[-1] // 2
        if unsqueeze_dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = rope(q, k, cos[..., :half], sin[..., :half])
        return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 2 else (q, k)
