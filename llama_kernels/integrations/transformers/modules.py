"""The base of patched modules, and their RMSNorm. rotaries.py has their `apply_rotary_pos_emb`.

A patched module is the same object with the same parameters. Its class becomes a subclass of its stock class. Each
operation runs stock code where the op would give another result: for tensor subclasses, for weights that are elsewhere
(ZeRO-3, offloading), and for dtypes that stock code promotes. Norms take DTensors whose rows are whole.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

from llama_kernels.core.checks import KERNEL_DTYPES
from llama_kernels.core.device import KERNEL_DEVICES
from llama_kernels.core.dtensors import is_dtensor
from llama_kernels.core.sharding import why_norms_gather
from llama_kernels.integrations.transformers.known_code import Norm
from llama_kernels.ops.rms_norm import add_rms_norm, rms_norm

PLAIN_TYPES = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_DEVICES = (*KERNEL_DEVICES, "meta")
logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object  # the stock class, which is the other base, is an nn.Module


def is_plain(x: Any) -> bool:
    """Whether x is a tensor without a subclass's behaviour, on a device that the ops support."""
    if type(x) not in PLAIN_TYPES:
        return False
    if x.device.type in _DEVICES:
        return True
    if not torch.compiler.is_compiling():
        _warn_of_device(x.device.type)
    return False


@functools.cache
def _warn_of_device(device_type: str) -> None:
    logger.warning(
        "llama_kernels: tensors on %s: stock code runs instead of the kernels, which take CUDA, HIP and CPU tensors",
        device_type,
    )


def takes(x: Any) -> bool:
    """Whether the ops take x: a plain tensor of one of their dtypes."""
    return is_plain(x) and x.dtype in KERNEL_DTYPES


def _takes_shards(x: Any, weight: Any) -> bool:
    """Whether x and weight, which may be None, are DTensors on whose shards `rms_norm` computes."""
    for tensor in (x,) if weight is None else (x, weight):
        if not is_dtensor(tensor) or tensor.dtype not in KERNEL_DTYPES or tensor.device.type not in _DEVICES:
            return False
    reason = why_norms_gather(x, weight)
    if reason is not None and not torch.compiler.is_compiling():
        _warn_of_placements(reason)
    return reason is None


@functools.cache
def _warn_of_placements(reason: str) -> None:
    logger.warning("llama_kernels: stock code computes RMSNorm of DTensors, because %s", reason)


def keeps_dtype(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the product of the two has the dtype of x. Under autocast it may have another: the next op casts it."""
    return torch.promote_types(x.dtype, other.dtype) == x.dtype or torch.is_autocast_enabled(x.device.type)


class Patched(_Module):
    """The base of the classes of patched modules. They are made at run time, so pickle stores their stock classes."""

    _kinds: tuple[str, ...]
    _found: dict[str, Any]  # what `found_in` said of the stock class when this class was made
    _stock_forward: Callable[..., Any]
    _our_forward: Callable[..., Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        from llama_kernels.integrations.transformers.classes import new_module

        kinds, stock = parts_of(self)
        return (new_module, (stock, kinds), *super().__reduce_ex__(2)[2:])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = module = type(self).__new__(type(self))
        module.__setstate__(copy.deepcopy(self.__dict__, memo))
        return module


def parts_of(module: Any) -> tuple[tuple[str, ...], type[nn.Module]]:
    """The kinds of operations that were patched in `module`, and its stock class.

    Its class may be a subclass of the one that `patch` made: fully_shard and torch.nn.utils.parametrize make one.
    """
    ours: Any = next(cls for cls in type(module).__mro__ if "_kinds" in vars(cls))
    return ours._kinds, ours.__bases__[-1]


# --- RMSNorm ---------------------------------------------------------------------------------------------------------


class RMSNorm(Patched):
    """`rms_norm` instead of the forward that `known` describes."""

    known: Norm
    weight: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        (x,) = (*args, *kwargs.values())
        weight = self.known_weight()
        if not norm_takes(self.known, x, weight):
            return self._stock_forward(*args, **kwargs)
        return rms_norm(x, weight, getattr(self, self.known.eps), offset=self.known.offset)

    def known_weight(self) -> torch.Tensor | None:
        return self.weight if self.known.weighted and getattr(self, "with_scale", True) else None


def norm_takes(known: Norm, x: Any, weight: Any) -> bool:
    """Whether `rms_norm` accepts x and weight, and returns what stock code does, in the same dtype."""
    plain = takes(x) and (weight is None or takes(weight))
    if not (plain or _takes_shards(x, weight)) or x.ndim == 0:
        return False
    if weight is None:
        return True
    return (
        weight.device == x.device
        and weight.shape == x.shape[-1:]
        and (not known.promotes or keeps_dtype(x, weight))
        and (not known.as_weight or x.dtype == weight.dtype)
    )


def may_be_skipped(norm: Any) -> TypeGuard[RMSNorm]:
    """Whether a fusion may compute this norm without calling it: it is ours, unwrapped, without hooks, not compiled."""
    return (
        isinstance(norm, RMSNorm)
        and "forward" not in norm.__dict__
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)
        and not torch_module._has_any_global_hook()
        and norm._compiled_call_impl is None
        and type(norm).__call__ is nn.Module.__call__
        and type(norm).forward is RMSNorm.forward  # not a subclass's own
    )


def add_and_norm(norm: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(residual + x) and the sum, in one kernel where the norm may be skipped."""
    if (
        may_be_skipped(norm)
        and takes(residual)
        and is_plain(x)
        and x.dtype == residual.dtype
        and x.shape == residual.shape
    ):
        weight = norm.known_weight()
        if norm_takes(norm.known, x, weight):
            return add_rms_norm(x, residual, weight, getattr(norm, norm.known.eps), offset=norm.known.offset)
    total = residual + x
    return norm(total), total
