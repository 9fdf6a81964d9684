"""Checks of heads, tables and positions, for the public functions that rotate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import is_fake

from llama_kernels.core.autograd import is_differentiated, needs_grad, refuse_forward_mode, transforms_are_active
from llama_kernels.core.checks import KERNEL_DTYPES, check_dense, check_tensors, message, shape_of, values_to_check
from llama_kernels.core.overlap import shares_with_itself, sharing_pair
from llama_kernels.core.tensors import sizes_of
from llama_kernels.ops.rotation import full_width

TABLE_DTYPES = (*KERNEL_DTYPES, torch.float64)
# Of position_ids, axes and cache_position.
_INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor | None, **others: torch.Tensor) -> None:
    """Check that q and k are heads of the same tokens.

    others: further tensors, of which only dtype and device are checked. If there are any, k may not be None.
    """
    check_tensors(op, KERNEL_DTYPES, () if others else ("k",), q=q, k=k, **others)
    if q.ndim not in (3, 4):
        raise ValueError(message(op, "q", shape_of(q), "(B, Hq, S, D), or (T, Hq, D) where tokens are packed"))
    if k is None:
        return
    if k.ndim != q.ndim or sizes_of(k)[::2] != sizes_of(q)[::2] or k.shape[-1] != q.shape[-1]:
        wanted = f"of q's shape {tuple(q.shape)} but for the number of heads"
        raise ValueError(message(op, "k", shape_of(k), wanted))
    if k.dtype != q.dtype:
        raise TypeError(message(op, "k", k.dtype, f"the dtype of q, {q.dtype}"))


def tokens_of(q: torch.Tensor) -> tuple[int | None, int]:
    """The batch size and the number of tokens of q; None for the batch size of packed tokens."""
    return (q.shape[0], q.shape[2]) if q.ndim == 4 else (None, q.shape[0])


def check_angles(
    op: str,
    name: str,
    x: torch.Tensor,
    tokens: tuple[int | None, int],
    head_dim: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    axes: torch.Tensor | None = None,
) -> None:
    """Check that cos, sin, position_ids and axes fit the heads of x, the argument `name`, which are `head_dim` wide.

    tokens: batch and tokens of x, from `tokens_of`.
    """
    check_tensors(op, None, **{name: x, "cos": cos, "sin": sin})
    B, S = tokens
    per_token = cos.ndim == 3
    if sin.shape != cos.shape:
        raise ValueError(message(op, "sin", shape_of(sin), f"the shape of cos, {tuple(cos.shape)}"))
    if cos.dtype not in TABLE_DTYPES:
        raise TypeError(message(op, "cos", cos.dtype, " or ".join(map(str, TABLE_DTYPES))))
    if sin.dtype != cos.dtype:
        raise TypeError(message(op, "sin", sin.dtype, f"the dtype of cos, {cos.dtype}"))
    if cos.ndim not in (2, 3) or (per_token and (B is None or cos.shape[0] not in (1, B) or cos.shape[1] != S)):
        rows = "(positions, R/2)" if B is None else f"(positions, R/2), or one row per token, ({B}, {S}, R/2)"
        raise ValueError(message(op, "cos", shape_of(cos), f"{rows}; R in place of R/2 for one angle per element"))
    width = cos.shape[-1]
    if not 0 < width <= head_dim or (full_width(cos, head_dim) and width % 2):
        wanted = f"one angle per pair, 1 to D/2 = {head_dim // 2} of them in the last dimension, or one per element, "
        wanted += f"an even number of them up to D = {head_dim}"
        raise ValueError(message(op, "cos", shape_of(cos), wanted))
    for table, angles in (("cos", cos), ("sin", sin)):
        if torch.is_grad_enabled() and is_differentiated(angles):
            fix = f"Pass {table}.detach(), or use llama_kernels.reference.{op} to train the angles."
            raise ValueError(message(op, table, "a tensor that requires grad", "a constant table", fix))

    if axes is not None:
        _check_axes(op, axes, cos, position_ids)
    if position_ids is None:
        if not per_token and cos.shape[0] < S:
            fix = f"llama_kernels.rope_tables(inv_freq, {S}) makes tables of {S} positions."
            raise ValueError(
                message(op, "cos", shape_of(cos), f"a table of at least {S} positions, one per token", fix)
            )
        return
    if per_token:
        fix = "Tables with one row per token already give each token its angles."
        raise ValueError(message(op, "position_ids", "given beside cos with one row per token", "None", fix))
    if not cos.shape[0] and S:
        raise ValueError(message(op, "cos", shape_of(cos), "a table of at least one position"))
    check_rows(op, "position_ids", position_ids, name, x, tokens, cos.shape[0], "rows of the table", axes)


def _check_axes(op: str, axes: torch.Tensor, cos: torch.Tensor, position_ids: torch.Tensor | None) -> None:
    """Check that axes names an axis of position_ids for each column of cos, whose rows are positions."""
    check_integers(op, "axes", axes, "cos", cos)
    if axes.shape != cos.shape[-1:]:
        raise ValueError(message(op, "axes", shape_of(axes), f"({cos.shape[-1]},), one element per column of cos"))
    if cos.ndim != 2:
        fix = "Tables with one row per token already give each token its angles."
        raise ValueError(message(op, "axes", "given beside cos with one row per token", "None", fix))
    if position_ids is None:
        fix = "Pass the positions of each axis, (A, B, S), or leave axes out."
        raise ValueError(message(op, "position_ids", "None beside axes", "several positions per token", fix))
    check_integers(op, "position_ids", position_ids, "cos", cos)
    if position_ids.ndim and (values := values_to_check(axes)) is not None:
        first, last = (int(axis) for axis in values.aminmax())
        if first < 0 or last >= position_ids.shape[0]:
            wanted = f"axes of position_ids, 0 to {position_ids.shape[0] - 1}"
            raise ValueError(message(op, "axes", f"from {first} to {last}", wanted))


def check_integers(op: str, name: str, x: torch.Tensor, of: str, other: torch.Tensor) -> None:
    """Check that x, the argument `name`, is a tensor of integers on the device of `other`, the argument `of`."""
    check_dense(op, name, x)
    if x.dtype not in _INTEGERS:
        raise TypeError(message(op, name, x.dtype, "a tensor of integers"))
    if x.device != other.device:
        wanted, fix = f"the device of {of}, {other.device}", f"Pass {name}.to({of}.device)."
        raise ValueError(message(op, name, f"on {x.device}", wanted, fix))


def check_rows(
    op: str,
    name: str,
    rows: torch.Tensor,
    of: str,
    x: torch.Tensor,
    tokens: tuple[int | None, int],
    count: int,
    what: str,
    axes: torch.Tensor | None = None,
) -> None:
    """Check that `rows`, the argument `name`, has one integer per token of x, the argument `of`.

    With axes, one per axis and token. Where values are checked, each is from 0 to count - 1. what: their name in the
    error.
    """
    B, S = tokens
    check_integers(op, name, rows, of, x)
    shapes: tuple[tuple[int | str, ...], ...] = ((S,),) if B is None else ((S,), (1, S), (B, S))
    given: tuple[int | str, ...] = tuple(rows.shape)
    if axes is not None:
        shapes = tuple(("A", *shape) for shape in shapes if B is None or len(shape) == 2)
        given = ("A", *given[1:]) if given and given[0] else given
    if given not in shapes:
        wanted = " or ".join(str(shape).replace("'", "") for shape in shapes)
        raise ValueError(message(op, name, shape_of(rows), wanted))
    if (values := values_to_check(rows)) is not None and values.numel():
        first, last = (int(row) for row in values.aminmax())
        if first < 0 or last >= count:
            raise ValueError(message(op, name, f"from {first} to {last}", f"{what}, 0 to {count - 1}"))


def check_writable(op: str, **heads: torch.Tensor | None) -> None:
    """Check that each of `heads` can be rotated in place."""
    _check_apart(op, heads)
    for name, x in heads.items():
        if x is None:
            continue
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            fix = "Rotate a view or the result of an op, or leave inplace off."
            raise ValueError(message(op, name, "a leaf that requires grad", "no leaf where inplace=True", fix))
        if x.stride(-1) != 1 or _overlaps_itself(x):
            wanted = "a contiguous last dimension and no two elements in the same memory, where inplace=True"
            raise ValueError(message(op, name, f"of strides {x.stride()}", wanted, "Leave inplace off."))


def _overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements of x are in the same memory, as those of an expanded tensor."""
    if not torch.compiler.is_compiling():
        try:
            return shares_with_itself(x.shape, x.stride())
        except TypeError:  # sizes that are symbols, while tracing, have no hash
            pass
    return any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))


def _check_apart(
    op: str, written: Mapping[str, torch.Tensor | None], read: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Check that a tensor that is written shares no element with another one, written or read.

    All are on one device. While PyTorch traces, it is known only whether two arguments are one tensor.
    """
    tensors = {name: x for name, x in {**written, **(read or {})}.items() if x is not None}
    names, values, count = [*tensors], [*tensors.values()], sum(x is not None for x in written.values())
    first, pair = values[0], None
    if torch.compiler.is_compiling() or transforms_are_active() or first.is_meta or is_fake(first):
        for i in range(count):
            for j in range(i + 1, len(values)):
                if values[i] is values[j]:
                    pair = i, j
    else:
        pair = sharing_pair(values, count)
    if pair is not None:
        (name, other), both = (names[i] for i in pair), pair[1] < count
        wanted = f"other memory than {name}: {'both are' if both else f'{name} is'} written"
        raise ValueError(message(op, other, f"in the memory of {name}", wanted, f"Pass {other}.clone()."))


def check_caches(
    op: str, *, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> None:
    """Check that k and v fit their caches, and that no gradient of these tensors is wanted."""
    tensors = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    check_heads(op, q, k, v=v, k_cache=k_cache, v_cache=v_cache)
    if q.ndim != 4:
        fix = "Add a batch dimension of 1 to packed tokens."
        raise ValueError(message(op, "q", shape_of(q), "(B, Hq, S, D)", fix))
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(message(op, "v", shape_of(v), f"of k's shape {tuple(k.shape)} but for the last dimension"))
    if v.dtype != k.dtype:
        raise TypeError(message(op, "v", v.dtype, f"the dtype of k, {k.dtype}"))
    length = k_cache.shape[2] if k_cache.ndim == 4 else None
    for name, cache, x in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        B, H, _, D = x.shape
        if cache.shape != (B, H, length, D):
            raise ValueError(message(op, name, shape_of(cache), f"({B}, {H}, L, {D}), both caches of one length L"))
        if cache.dtype != x.dtype:
            raise TypeError(message(op, name, cache.dtype, f"the dtype of {name[0]}, {x.dtype}"))
        if (cache.stride(-1) != 1 and D > 1) or _overlaps_itself(cache):
            wanted = "a contiguous last dimension and no two elements in the same memory: it is written in place"
            raise ValueError(message(op, name, f"of strides {cache.stride()}", wanted))
    _check_apart(op, {"k_cache": k_cache, "v_cache": v_cache}, {"q": q, "k": k, "v": v})
    if transforms_are_active():
        refuse_forward_mode(op, *tensors.values())
        if torch._C._are_functorch_transforms_active():
            wanted, fix = "a tensor outside of them: caches are written in place", "Use llama_kernels.rope."
            raise ValueError(message(op, "q", "inside of a torch.func transform", wanted, fix))
    if needs_grad(*tensors.values()) and any(x.requires_grad for x in tensors.values()):
        name = next(name for name, x in tensors.items() if x.requires_grad)
        fix = "Call it under torch.no_grad(), or use llama_kernels.rope."
        raise ValueError(message(op, name, "a tensor that requires grad", "one without: it is for inference", fix))
