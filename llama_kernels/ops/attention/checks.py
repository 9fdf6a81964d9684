"""Checks the arguments of a call of attention, and builds the AttentionCall of them."""

from __future__ import annotations

import itertools
import operator
from typing import NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from llama_kernels.core.checks import (
    LARGEST,
    SMALLEST,
    check_flag,
    check_number,
    check_tensors,
    is_integer,
    message,
    shape_of,
    values_to_check,
)
from llama_kernels.core.tensors import autocast_dtype, last_dim_contiguous
from llama_kernels.ops.attention.call import AttentionCall

_WIDEST_HEAD_OF_Q, _WIDEST_HEAD_OF_V = 576, 512
# A window of this width hides no key. With a wider one, sums with positions would overflow 32 bits.
_WIDEST = 2**30
_LONGEST = 2**31 - 1  # tokens of a sequence. `Sizes.as_arguments` passes its length less 2^31, in 32 bits


class Packing(NamedTuple):
    """Arguments of `attention_varlen` that say where the sequences of a packed batch are."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def checked_call(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing | None = None,
    *,
    is_causal: bool,
    scale: float | None,
    window_size: tuple[int, int],
    softcap: float | None,
    sinks: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    kv_prefix: torch.Tensor | None = None,
    deterministic: bool | None,
) -> AttentionCall:
    """The call of these arguments, which are those of `attention`, as the registered ops take it.

    Raises:
        TypeError, ValueError: as `attention`, in the name of `op`.
    """
    q, k, v = _to_autocast(q, k, v)
    _check_qkv(op, q, k, v, packing is not None)
    check_flag(op, "is_causal", is_causal)
    _check_numbers(op, window_size, softcap, scale, deterministic)
    if sinks is not None:
        _check_sinks(op, q, sinks)
    if kv_start is not None:
        _check_bound(op, q, "kv_start", kv_start)
    if kv_end is not None:
        _check_bound(op, q, "kv_end", kv_end)
    if kv_prefix is not None:
        _check_bound(op, q, "kv_prefix", kv_prefix)
    if packing is not None:
        _check_packing(op, q, k, packing)
    left, right = window_size
    return AttentionCall(  # by position: keywords would take every call 0.8 us
        last_dim_contiguous(q),
        last_dim_contiguous(k),
        last_dim_contiguous(v),
        None if sinks is None else sinks.contiguous(),
        kv_start,
        kv_end,
        None if packing is None else packing.cu_seqlens_q.contiguous(),
        None if packing is None else packing.cu_seqlens_k.contiguous(),
        q.shape[2] if packing is None else _capped(packing.max_seqlen_q),
        k.shape[2] if packing is None else _capped(packing.max_seqlen_k),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap or None,
        None if left < 0 else min(left, _WIDEST),
        0 if is_causal else (None if right < 0 else min(right, _WIDEST)),
        kv_prefix=kv_prefix,
    )


def _capped(longest: int) -> int:
    """At most _LONGEST; a size that has no value while torch.compile traces is taken for that."""
    longest = _plain(longest)
    return _LONGEST if guard_or_false(longest > _LONGEST) else longest


def _plain(n: int) -> int:
    """An integer of NumPy as one of Python."""
    return n if isinstance(n, (int, torch.SymInt)) else operator.index(n)


def _to_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v in the dtype of autocast where it is on, as in PyTorch's own attention."""
    if not isinstance(tensors[0], torch.Tensor):
        return tensors
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and _is_cast(x.dtype) else x for x in tensors)


def _is_cast(dtype: torch.dtype) -> bool:
    """Whether PyTorch's autocast changes this dtype. It leaves float64, which the checks then refuse."""
    return dtype.is_floating_point and dtype != torch.float64


def _check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: bool) -> None:
    """Check the dtypes, devices and shapes of q, k and v."""
    check_tensors(op, q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        name, x = ("v", v) if k.dtype == q.dtype else ("k", k)
        fix = "Cast q, k and v to one dtype, or call under torch.autocast, which does it."
        raise TypeError(message(op, name, x.dtype, f"the dtype of q, {q.dtype}", fix))
    of_q, of_k, of_v, ndim = q.shape, k.shape, v.shape, 3 if packed else 4
    if not len(of_q) == len(of_k) == len(of_v) == ndim:
        name, x = next(pair for pair in (("q", q), ("k", k), ("v", v)) if pair[1].ndim != ndim)
        wanted = "(tokens, H, D)" if packed else "(B, H, S, D)"
        fix = "" if packed else "For packed sequences (tokens, H, D) call llama_kernels.attention_varlen."
        raise ValueError(message(op, name, shape_of(x), wanted, fix))
    if not packed and of_k[0] != of_q[0]:
        raise ValueError(message(op, "k", shape_of(k), f"a batch of {of_q[0]}, as q of shape {tuple(of_q)} has"))
    if of_k[-1] != of_q[-1]:
        wanted = f"heads of width {of_q[-1]}, as q of shape {tuple(of_q)} has"
        raise ValueError(message(op, "k", shape_of(k), wanted))
    if of_v[:-1] != of_k[:-1]:
        raise ValueError(message(op, "v", shape_of(v), f"the shape of k, {tuple(of_k)}, but for the last dimension"))
    Hq, Hkv = of_q[1], of_k[1]
    if Hq != 0 if Hkv == 0 else Hq % Hkv:
        got = f"of {Hkv} heads, of shape {tuple(of_k)}"
        wanted = f"a number of heads that divides the {Hq} of q, of shape {tuple(of_q)}"
        raise ValueError(message(op, "k", got, wanted))
    for name, x, widest in (("q", q, _WIDEST_HEAD_OF_Q), ("v", v, _WIDEST_HEAD_OF_V)):
        if not 1 <= x.shape[-1] <= widest:
            raise ValueError(message(op, name, shape_of(x), f"heads of width 1 to {widest}"))


def _check_numbers(
    op: str, window_size: tuple[int, int], softcap: float | None, scale: float | None, deterministic: bool | None
) -> None:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        fix = "For n earlier keys and the query's own pass window_size=(n, 0)."
        raise TypeError(message(op, "window_size", repr(window_size), "(left, right)", fix))
    for side in window_size:
        if not is_integer(side) or side < -1:
            raise ValueError(message(op, "window_size", tuple(window_size), "two integers, each -1 (no limit) or more"))
    if softcap is not None and (isinstance(softcap, (torch.Tensor, bool)) or softcap != 0):
        check_number(op, "softcap", softcap, SMALLEST, "a positive finite number, or 0 or None for none")
    if scale is not None:
        check_number(op, "scale", scale, -LARGEST, "a finite number, or None")
    if deterministic is not None and deterministic is not True and deterministic is not False:
        raise TypeError(message(op, "deterministic", repr(deterministic), "True, False or None"))


def _check_sinks(op: str, q: torch.Tensor, sinks: torch.Tensor) -> None:
    check_tensors(op, q=q, sinks=sinks)
    if sinks.shape != (q.shape[1],):
        raise ValueError(message(op, "sinks", shape_of(sinks), f"({q.shape[1]},), one for each query head"))


def _check_bound(op: str, q: torch.Tensor, name: str, bound: torch.Tensor) -> None:
    """Check that `bound` has one integer per query row. name: kv_start, kv_end or kv_prefix."""
    rows = (q.shape[0], q.shape[2]) if q.ndim == 4 else (q.shape[0],)
    check_tensors(op, (torch.int32,), **{name: bound})
    if bound.shape != rows:
        raise ValueError(message(op, name, shape_of(bound), f"{rows}, one for each query row"))
    if bound.device != q.device:
        raise ValueError(
            message(op, name, f"on {bound.device}", f"the device of q, {q.device}", f"Pass {name}.to(q.device).")
        )


def _check_packing(op: str, q: torch.Tensor, k: torch.Tensor, packing: Packing) -> None:
    """Check cu_seqlens and max_seqlen; the values of cu_seqlens only inside `llama_kernels.checked`."""
    names = ("cu_seqlens_q", "cu_seqlens_k")
    for name in names[:1] if packing.cu_seqlens_k is packing.cu_seqlens_q else names:
        cu_seqlens = getattr(packing, name)
        check_tensors(op, (torch.int32,), **{name: cu_seqlens})
        if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0] or cu_seqlens.shape != packing.cu_seqlens_q.shape:
            wanted = "(batch + 1,), the same for queries and keys"
            raise ValueError(message(op, name, shape_of(cu_seqlens), wanted))
        if cu_seqlens.device != q.device:
            wanted, fix = f"the device of q, {q.device}", f"Pass {name}.to(q.device)."
            raise ValueError(message(op, name, f"on {cu_seqlens.device}", wanted, fix))
    for name in ("max_seqlen_q", "max_seqlen_k"):
        longest = getattr(packing, name)
        if not is_integer(longest):
            wanted, fix = "an int", "int() of a tensor waits for the GPU, so compute the length on the CPU."
            raise TypeError(message(op, name, f"a {type(longest).__name__}", wanted, fix))
        # A size that has no value while torch.compile traces is not negative.
        if guard_or_false(_plain(longest) < 0):
            raise ValueError(message(op, name, longest, "a length, 0 or more"))
    sides = (("q", packing.cu_seqlens_q, packing.max_seqlen_q, q), ("k", packing.cu_seqlens_k, packing.max_seqlen_k, k))
    for side, cu_seqlens, longest, x in sides:
        if (values := values_to_check(cu_seqlens)) is not None:
            for bounds in values.flatten(0, -2).tolist() if values.ndim > 1 else [values.tolist()]:
                _check_sequences(op, side, bounds, longest, x.shape[0])


def _check_sequences(op: str, name: str, bounds: list[int], longest: int, tokens: int) -> None:
    """Refuse `bounds` that the kernels would clamp or cut off. name: q or k."""
    if bounds[0] < 0:
        raise ValueError(message(op, f"cu_seqlens_{name}", f"{bounds[0]} at its start", "0 or more"))
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            got = f"{end} at index {i + 1}, after {start}"
            raise ValueError(message(op, f"cu_seqlens_{name}", got, "bounds that never decrease"))
        if end - start > longest:
            wanted = f"at least {end - start}, the length of sequence {i}"
            raise ValueError(message(op, f"max_seqlen_{name}", longest, wanted))
    if bounds[-1] > tokens:
        got, wanted = f"{bounds[-1]} at its end", f"at most the {tokens} tokens of {name}"
        raise ValueError(message(op, f"cu_seqlens_{name}", got, wanted))
