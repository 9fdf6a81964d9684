"""Modules that run the ops. Their state_dicts are those of Hugging Face's Llama."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from llama_kernels.core.checks import check_count, check_dense, check_device, check_eps, check_offset, message
from llama_kernels.ops.rms_norm import add_rms_norm, rms_norm
from llama_kernels.rotary import angles_of, check_positions, original_length, rope_frequencies, rope_type_of


class RMSNorm(nn.Module):
    """`rms_norm` as a module, with its weight (hidden_size,).

    Args:
        hidden_size: the size of the last dimension of the input.
        eps: added to the mean of the squares. None: the epsilon of float32.
        offset: added to the weight. The weight starts at 1 - offset. Gemma has offset 1.0.
        device, dtype: of the weight.

    Raises:
        TypeError, ValueError: an argument is of another type or out of its range.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = 1e-6,
        *,
        offset: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "nn.RMSNorm"
        check_count(op, "hidden_size", hidden_size, "an int of at least 1")
        check_eps(op, eps)
        check_offset(op, offset)
        check_device(op, device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(message(op, "dtype", repr(dtype), "a floating-point torch.dtype, or None"))
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.eps = eps
        self.offset = offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1 - offset, as of a new module. For modules that were built on the meta device."""
        nn.init.constant_(self.weight, 1.0 - float(self.offset))

    @overload
    def forward(self, x: torch.Tensor, *, residual: None = None) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, *, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, *positional: Any, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalize x (..., hidden_size): returns y, or with a residual, which is added to x first, (y, residual_out).

        Raises:
            TypeError: the residual is not passed by keyword. It must be, since hooks such as that of torch's
                SequenceParallel keep the first positional argument only.
        """
        if positional:
            got = f"given {1 + len(positional)} positional arguments"
            raise TypeError(message("nn.RMSNorm", "forward", got, "x alone", "Pass the residual as residual=..."))
        if residual is None:
            return rms_norm(x, self.weight, self.eps, offset=self.offset)
        return add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset)

    if TYPE_CHECKING:
        __call__ = forward  # torch types the result of a call as Any

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}" + (f", offset={self.offset}" if self.offset else "")


class RotaryEmbedding(nn.Module):
    """cos and sin for `rope`, from `rope_frequencies`. Call it once in a forward, for all layers.

    It adds nothing to the state_dict. `.to(dtype)` of a model does not change the dtype of the frequencies. If built on
    the meta device, it computes them when it gets memory, by `to_empty` or in its first call.

    Args:
        head_dim, base, scaling, max_position_embeddings: those of `rope_frequencies`.
        device: the device of the frequencies.
        frequency_dtype: the dtype of frequencies and angles; cos and sin are always float32. float32 gives the numbers
            of Transformers. With float64, cos and sin are right to 1e-6 at position 10,000,000.
    """

    inv_freq: torch.Tensor
    long_inv_freq: torch.Tensor | None  # of longrope, for sequences longer than the original length

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        *,
        max_position_embeddings: int | None = None,
        device: torch.device | str | None = None,
        frequency_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._rule: dict[str, Any] = {
            "head_dim": head_dim, "base": base, "scaling": scaling, "max_position_embeddings": max_position_embeddings,
            "dtype": frequency_dtype,
        }  # fmt: skip
        self._kind = rope_type_of(scaling)
        self._compute(device)

    def _compute(self, device: torch.device | str | None) -> None:
        inv_freq, self.attention_factor = self._frequencies(device=device)
        long_inv_freq = None
        if self._kind == "longrope":
            scaling, longest = self._rule["scaling"], self._rule["max_position_embeddings"]
            self._original_length = math.floor(original_length(scaling, longest) or 0)  # None is refused above
            long_inv_freq, _ = self._frequencies(seq_len=self._original_length + 1, device=device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("long_inv_freq", long_inv_freq, persistent=False)

    def _frequencies(self, **options: Any) -> tuple[torch.Tensor, float]:
        return rope_frequencies(**self._rule, **options)

    def reset_parameters(self) -> None:
        """Compute the frequencies again. There are no parameters; FSDP calls this where buffers were on meta."""
        self._compute(self.inv_freq.device)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of position_ids, (*position_ids.shape, R/2) float32 each, on the device of `x`.

        `x` has no other effect.
        """
        check_dense("nn.RotaryEmbedding", "x", x)
        check_positions("nn.RotaryEmbedding", "position_ids", position_ids)
        if self.inv_freq.is_meta and not x.is_meta:
            self._compute(x.device)
        position_ids = position_ids.to(x.device)
        inv_freq = self.inv_freq.to(x.device)
        if self.long_inv_freq is not None and position_ids.numel():
            past = position_ids.max() >= self._original_length
            inv_freq = torch.where(past, self.long_inv_freq.to(x.device), inv_freq)
        elif self._kind == "dynamic" and position_ids.numel():
            inv_freq, _ = self._frequencies(seq_len=position_ids.max() + 1, device=x.device)
        return angles_of(position_ids, inv_freq, self.attention_factor)

    if TYPE_CHECKING:
        __call__ = forward

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryEmbedding:
        """What `.to` and the like call. The frequencies only move to another device.

        `fn` may change their dtype, or give memory without numbers, as that of `to_empty`. Frequencies on meta are
        computed on the CPU, so that they are those of a module that was moved from there.
        """
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        device = self.inv_freq.device
        if exact["inv_freq"].is_meta and device.type != "meta":
            self._compute("cpu")
            exact = dict(self.named_buffers())
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(device))
        return self
