"""The ops as modules, whose state_dicts are those of Hugging Face's Llama."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from llama_kernels.ops.rms_norm import add_rms_norm, rms_norm
from llama_kernels.rotary import angles_of, rope_frequencies


class RMSNorm(nn.Module):
    """`rms_norm` with its weight, (hidden_size,). offset=1.0 is Gemma's, whose weights start at zero."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - offset, device=device, dtype=dtype))
        self.eps = eps
        self.offset = offset

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """y; with a residual, added first, (y, residual_out)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, offset=self.offset)
        return add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}" + (f", offset={self.offset}" if self.offset else "")


class RotaryEmbedding(nn.Module):
    """The angles of `rope_frequencies`, for `rope`: call it once a model forward and rotate in every layer.

    Nothing of it is in the state_dict. The frequencies stay float32 whatever `.to(dtype)` makes of the model.
    """

    inv_freq: torch.Tensor

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        *,
        max_position_embeddings: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._rule = (head_dim, base, scaling)
        self._longest_trained = max_position_embeddings
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
        self._follows_length = kind in ("dynamic", "longrope")
        inv_freq, self.attention_factor = self._frequencies(device=device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _frequencies(self, **length: Any) -> tuple[torch.Tensor, float]:
        return rope_frequencies(*self._rule, max_position_embeddings=self._longest_trained, **length)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, (*position_ids.shape, R/2) float32, on the device of `x`. Its values do not matter."""
        position_ids = position_ids.to(x.device)
        inv_freq = self.inv_freq.to(x.device)
        if self._follows_length and position_ids.numel():
            inv_freq, _ = self._frequencies(seq_len=position_ids.max() + 1, device=x.device)
        return angles_of(position_ids, inv_freq, self.attention_factor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryEmbedding:
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self
