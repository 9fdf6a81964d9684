"""The operations of patched modules: RMSNorm, apply_rotary_pos_emb, and their fusions.

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
from llama_kernels.integrations.transformers.known_rotaries import Rotary
from llama_kernels.integrations.transformers.source import called_by
from llama_kernels.ops.qk_norm_rope import qk_norm_rope
from llama_kernels.ops.rms_norm import add_rms_norm, rms_norm
from llama_kernels.ops.rope import rope

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


def _takes(x: Any) -> bool:
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


def _keeps_dtype(x: torch.Tensor, other: torch.Tensor) -> bool:
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
    plain = _takes(x) and (weight is None or _takes(weight))
    if not (plain or _takes_shards(x, weight)) or x.ndim == 0:
        return False
    if weight is None:
        return True
    return (
        weight.device == x.device
        and weight.shape == x.shape[-1:]
        and (not known.promotes or _keeps_dtype(x, weight))
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
        and _takes(residual)
        and is_plain(x)
        and x.dtype == residual.dtype
        and x.shape == residual.shape
    ):
        weight = norm.known_weight()
        if norm_takes(norm.known, x, weight):
            return add_rms_norm(x, residual, weight, getattr(norm, norm.known.eps), offset=norm.known.offset)
    total = residual + x
    return norm(total), total


# --- RoPE ------------------------------------------------------------------------------------------------------------


def rotary_like(replaced: Callable[..., Any], known: Rotary, interleaved: bool) -> Callable[..., Any]:
    """A function with the arguments of `replaced`, which `known` describes, that runs `rope`."""
    stock = called_by(replaced)

    def of_complex(xq: Any, xk: Any, freqs_cis: Any) -> Any:
        cos, sin = freqs_cis.real, freqs_cis.imag
        if not _can_rotate(known, xq, xk, cos, sin, known.heads):
            return stock(xq, xk, freqs_cis)
        return _rotate(known, True, xq, xk, cos, sin, known.heads)

    def of_complex_grid(query: Any, key: Any, freqs_ci: Any) -> Any:
        cos, sin = freqs_ci.real.squeeze(1)[None], freqs_ci.imag.squeeze(1)[None]  # (1, S, pairs)
        if not _can_rotate(known, query, key, cos, sin, known.heads):
            return stock(query, key, freqs_ci)
        return _rotate(known, True, query, key, cos, sin, known.heads)

    def of_one(x: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if not _can_rotate(known, x, x, cos, sin, unsqueeze_dim):
            return stock(x, cos, sin, unsqueeze_dim)
        return _rotate(known, interleaved, x, None, cos, sin, unsqueeze_dim)[0]

    def of_one_sin_first(tensor: Any, sin: Any, cos: Any) -> Any:
        if not _can_rotate(known, tensor, tensor, cos, sin, known.heads):
            return stock(tensor, sin, cos)
        return _rotate(known, interleaved, tensor, None, cos, sin, known.heads)[0]

    def of_sections(q: Any, k: Any, cos: Any, sin: Any, mrope_section: Any, unsqueeze_dim: int = 1) -> Any:
        c, s = (torch.cat([m[i % 3] for i, m in enumerate(x.split(mrope_section * 2, dim=-1))], dim=-1)
                for x in (cos, sin))  # fmt: skip
        if not _can_rotate(known, q, k, c, s, unsqueeze_dim):
            return stock(q, k, cos, sin, mrope_section, unsqueeze_dim)
        return _rotate(known, interleaved, q, k, c, s, unsqueeze_dim)

    def of_rows(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        heads = kwargs.get("unsqueeze_dim", 1) if known.heads is None else known.heads
        if args or not _can_rotate(known, q, k, cos, sin, heads):
            return stock(q, k, cos, sin, *args, **kwargs)
        return _rotate(known, interleaved, q, k, cos, sin, heads)

    kinds: dict[str, Callable[..., Any]] = {
        "complex": of_complex, "complex grid": of_complex_grid, "sections": of_sections, "x, cos, sin": of_one,
        "x, sin, cos": of_one_sin_first,
    }  # fmt: skip
    ours = functools.wraps(stock)(kinds.get(known.arguments or known.tables, of_rows))
    if stock is replaced:
        return ours
    return lambda *args, **kwargs: (replaced if is_kernelized(replaced) else ours)(*args, **kwargs)


def is_kernelized(replaced: Any) -> bool:
    """Whether `replaced` is an object of the package kernels with a forward from kernelize."""
    return isinstance(replaced, nn.Module) and "forward" in replaced.__dict__


def _can_rotate(known: Rotary, q: Any, k: Any, cos: Any, sin: Any, heads: Any) -> bool:
    """Whether `rope` returns what stock code does for these arguments.

    q and k are (B, H, S, D) if heads is 1, (B, S, H, D) if it is 2, and (S, H, D), as in vision towers, if it is -2.
    cos and sin have a row for each token. If heads is 0, q and k are (B, H, S, D) and all sequences have the same rows.
    """
    if not (_takes(q) and _takes(k) and is_plain(cos) and is_plain(sin)):
        return False
    packed, shared = q.ndim == 3 and heads == -2, q.ndim == 4 and heads == 0
    if not (packed or shared) and (q.ndim != 4 or heads not in (1, 2)):
        return False
    H = 1 if packed or shared else heads
    tokens = q.shape[:1] if packed else q.shape[2:3] if shared else (q.shape[0], q.shape[3 - heads])
    R = _rotated_width(known, cos)
    return (
        k.ndim == q.ndim
        and k.dtype == q.dtype
        and [n for d, n in enumerate(k.shape) if d != H] == [n for d, n in enumerate(q.shape) if d != H]
        and cos.ndim == len(tokens) + 1
        and sin.shape == cos.shape
        and sin.dtype == cos.dtype
        and cos.dtype.is_floating_point
        and q.device == k.device == cos.device == sin.device
        and (cos.shape[:-1] == tokens or (len(tokens) == 2 and cos.shape[:-1] == (1, tokens[1])))
        and R % 2 == 0
        and 0 < R <= q.shape[-1]
        and not (known.sorted_first and q.shape[-1] != R)
        and not (cos.requires_grad or sin.requires_grad)
        and (not known.promotes or _keeps_dtype(q, cos))
    )


def _rotated_width(known: Rotary, cos: torch.Tensor) -> int:
    """R, the number of rotated elements of a head."""
    return cos.shape[-1] * (2 if known.tables in ("pairs", "complex", "complex grid") else 1)


def _rotate(known: Rotary, interleaved: bool, q: Any, k: Any, cos: Any, sin: Any, heads: Any) -> Any:
    cos, sin, R = _tables(known, cos, sin)
    given = [x if heads != 2 else x.transpose(1, 2) for x in (q, k) if x is not None]
    if known.sorted_first:
        given = [x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in given]
        interleaved = False
    parts = given
    separate = cos.shape[-1] == R and q.shape[-1] >= 2 * R  # `rope` would read such tables as an angle for each pair
    if separate:
        parts = [x[..., :R] for x in given]
    first, second = (*parts, None)[:2]
    rotated: Any = rope(first, second, cos, sin, interleaved=interleaved)
    if separate:
        rotated = [torch.cat((y, x[..., R:]), -1) for x, y in zip(given, rotated, strict=False)]
    q, k = (*rotated, None)[:2]
    return tuple(x.transpose(1, 2) if heads == 2 and x is not None else x for x in (q, k))


def _tables(known: Rotary, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """cos and sin for `rope`, and R, the number of rotated elements of a head."""
    if torch.compiler.is_exporting():  # a stage of an exported pipeline gets them as tensors that require grad
        cos, sin = cos.detach(), sin.detach()
    if known.tables == "first half":
        R = cos.shape[-1]
        return cos[..., : R // 2], sin[..., : R // 2], R
    return cos, sin, _rotated_width(known, cos)


def norm_and_rotary(stock: Callable[..., Any], known: Rotary, interleaved: bool) -> Callable[..., Any]:
    """The fusion of q_norm, k_norm and `apply_rotary_pos_emb`, for q and k (B, H, S, D) before their norms."""
    rotary = rotary_like(stock, known, interleaved)

    def apply(q_norm: Any, k_norm: Any, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        weights = (q_norm.known_weight(), k_norm.known_weight())
        if (
            _norms_agree(q_norm, k_norm, weights)
            and all(norm_takes(q_norm.known, x, w) for x, w in zip((q, k), weights, strict=True))
            and _can_rotate(known, q, k, cos, sin, 1)
            and not is_kernelized(stock)
        ):
            tables = _tables(known, cos, sin)
            if not (tables[0].shape[-1] == tables[2] and 2 * tables[2] <= q.shape[-1]):
                eps, offset = getattr(q_norm, q_norm.known.eps), q_norm.known.offset
                return qk_norm_rope(q, k, *weights, *tables[:2], eps=eps, offset=offset, interleaved=interleaved)
        return rotary(q_norm(q), k_norm(k), cos, sin)

    return apply


def _norms_agree(q_norm: Any, k_norm: Any, weights: tuple[Any, Any]) -> bool:
    """Whether one call can compute both norms: they differ in their weights only."""
    known, other = q_norm.known, k_norm.known
    same_eps = getattr(q_norm, known.eps) == getattr(k_norm, other.eps)
    return known == other and same_eps and (weights[0] is None) == (weights[1] is None)
