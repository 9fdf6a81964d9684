"""The launch cache: a repeated call reuses the launches that Triton bound for it.

Triton binds every argument of every launch anew, which costs the host more than the rest of a call. So a launcher is a
function that lists its launches, and `cached_launch` makes and caches them. A second call with the same cache key
(shapes, strides, dtypes, alignments, device and numbers) stores its launches as Triton compiled and bound them. Every
later call with that key only puts its own tensors into them.
"""

from __future__ import annotations

import functools
import itertools
import operator
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, cast

import torch

from llama_kernels.core.device import on_device_of
from llama_kernels.core.kernel_hashes import settled
from llama_kernels.core.language import INTERPRETED

# AMD's compiler also asks how large a tensor's storage is, which is not in the cache key: there Triton binds every
# launch.
_CACHES = not INTERPRETED and torch.version.hip is None
# Fuses a product and a sum into one instruction, which rounds once. Triton 3.10 and newer do so only where asked to.
_ALWAYS = {"enable_fp_fusion": True}
MAX_KEYS = 1024  # keys of one launcher; a cache that is full is emptied

_P = ParamSpec("_P")


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # the kernel's first parameters, in order
    options: dict[str, Any]  # its other parameters by name, with num_warps and num_stages


class _Bound(NamedTuple):
    """A bound launch: what Triton compiled, and its arguments with a gap for each tensor."""

    run: Callable[..., None]
    args: list[Any]
    tensor_slots: tuple[tuple[int, int], ...]  # (gap in args, which leaf of the launcher's arguments fills it)
    descriptor_slots: tuple[tuple[int, int], ...]  # likewise, where a descriptor in args describes that leaf


_caches: list[dict[Any, Any]] = []  # one for each launcher


def cached_launch(launcher: Callable[_P, list[Launch]]) -> Callable[_P, None]:
    """A function that makes the launches `launcher` lists. It takes the launcher's arguments, by position.

    Arguments are tensors, numbers and other hashable values, and named tuples of such, nested or not. Their leaves are
    what is left once every named tuple is replaced by its fields. The first leaf is a tensor, and all tensors are on
    its device. Tuples without names hold no floats.

    The list may depend on the arguments alone, and of a tensor on nothing but its shape, strides, dtype, device and
    whether its address is a multiple of 16. A launch is cached if all its tensors, and the tensors that its descriptors
    describe, are leaves. It is not cached if it has other tensors, such as views, or tensors inside a tuple.
    """
    cache: dict[tuple[Any, ...], list[_Bound] | None] = {}  # None: this key was seen once
    _caches.append(cache)

    @functools.wraps(launcher)
    def launch(*given: Any) -> None:
        args, signature = _leaves(given)
        with on_device_of(args[0]):
            key = _cache_key(args, signature) if _CACHES else None
            if key is not None and (found := cache.get(key)):
                for run, filled, tensor_slots, descriptor_slots in found:
                    filled = filled.copy()
                    for place, source in tensor_slots:
                        filled[place] = args[source]
                    for place, source in descriptor_slots:
                        filled[place] = _describing(filled[place], args[source])
                    run(*filled)
                return
            launched = [
                (each, settled(each.kernel)[each.grid](*each.args, **each.options, **_ALWAYS))
                for each in launcher(*given)  # type: ignore[call-arg]
            ]
            if key is None or any(map(_holds_tensor, args)):
                return
            if key in cache:
                bound = [_bind(each, compiled, args) for each, compiled in launched]
                cache[key] = None if None in bound else cast("list[_Bound]", bound)
            else:
                if len(cache) >= MAX_KEYS:
                    cache.clear()
                cache[key] = None

    return cast("Callable[_P, None]", launch)


def clear() -> None:
    """Empty the launch caches, so that Triton binds every launch anew.

    Call it after a change of Triton's driver, or of a knob that Triton compiles by, such as
    `triton.knobs.runtime.debug`.
    """
    for cache in _caches:
        cache.clear()


class _Signature(NamedTuple):
    """The types of arguments, and what follows: how to expand named tuples, or else what the cache key is made of."""

    number: int  # stands for the types, and for those of the arguments that these were expanded from
    expand: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None  # None: there are no named tuples
    expanded: dict[tuple[type, ...], _Signature]  # those of the expanded arguments, by their types
    tensors_of: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    others_of: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # neither tensors nor floats
    float_bytes_of: Callable[[tuple[Any, ...]], bytes]


_signatures: dict[tuple[type, ...], _Signature] = {}
_numbers = itertools.count()


def _leaves(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], _Signature]:
    """The leaves of `args`, and their signature."""
    types = tuple(map(type, args))
    signature = _signatures.get(types) or _signature_of(types, _signatures)
    while signature.expand:
        args = signature.expand(args)
        types = tuple(map(type, args))
        signature = signature.expanded.get(types) or _signature_of(types, signature.expanded)
    return args, signature


def _signature_of(types: tuple[type, ...], known: dict[tuple[type, ...], _Signature]) -> _Signature:
    """The signature of arguments of these types, which is added to `known`."""
    named_tuples = [i for i, t in enumerate(types) if hasattr(t, "_fields")]
    tensors = [i for i, t in enumerate(types) if issubclass(t, torch.Tensor)]
    floats = [i for i, t in enumerate(types) if issubclass(t, float)]
    others = [i for i in range(len(types)) if i not in tensors and i not in floats]
    pack, floats_of = struct.Struct(f"{len(floats)}d").pack, _items(floats)
    float_bytes_of = lambda args: pack(*floats_of(args))  # noqa: E731
    expand = _expanding(named_tuples)
    signature = _Signature(next(_numbers), expand, {}, _items(tensors), _items(others), float_bytes_of)
    return known.setdefault(types, signature)


def _expanding(named_tuples: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]] | None:
    """A function that replaces the named tuples at these places by their fields."""
    if not named_tuples:
        return None
    if named_tuples == [0]:  # the usual cases, which every call waits for
        return lambda args: args[0] + args[1:]
    if named_tuples == [0, 1]:
        return lambda args: args[0] + args[1] + args[2:]
    count = len(named_tuples)
    if named_tuples == list(range(count)):
        return lambda args: sum(args[:count], ()) + args[count:]

    last_first = named_tuples[::-1]

    def expand(args: tuple[Any, ...]) -> tuple[Any, ...]:
        for i in last_first:
            args = args[:i] + args[i] + args[i + 1 :]
        return args

    return expand


def _cache_key(args: tuple[Any, ...], signature: _Signature) -> tuple[Any, ...]:
    """The cache key of a call. Calls with one key launch the same machine code with the same numbers, and with their
    tensors in the same places.

    Types are in the key, since 1, 1.0 and True are equal and are bound differently. Floats are in it as bytes, since
    0.0 and -0.0 are equal.
    """
    number, _, _, tensors_of, others_of, float_bytes_of = signature
    tensors = tensors_of(args)
    key = [number, others_of(args), float_bytes_of(args), args[0].get_device()]
    for x in tensors:
        key += (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)
    if len({*map(id, tensors)}) < len(tensors):  # some are one tensor: which ones
        ids = [*map(id, tensors)]
        key += map(ids.index, ids)
    return tuple(key)


def _items(indices: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that gives the items of a tuple at `indices`, as a tuple."""
    if len(indices) == 1:
        (index,) = indices
        return lambda items: (items[index],)
    return operator.itemgetter(*indices) if indices else lambda items: ()


def _bind(each: Launch, compiled: Any, args: tuple[Any, ...]) -> _Bound | None:
    """The launch `each` as a bound launch, or None where it cannot be cached. compiled: what Triton compiled it to."""
    if compiled is None:
        return None
    filled = [*each.args, *(each.options[name] for name in each.kernel.arg_names[len(each.args) :])]
    sources = {id(x): i for i, x in enumerate(args)}
    tensor_slots: list[tuple[int, int]] = []
    descriptor_slots: list[tuple[int, int]] = []
    for place, x in enumerate(filled):
        tensor = getattr(x, "base", None) if hasattr(x, "block_shape") else x
        if _holds_tensor(x):
            return None
        if isinstance(tensor, torch.Tensor):
            if id(tensor) not in sources:
                return None
            (tensor_slots if tensor is x else descriptor_slots).append((place, sources[id(tensor)]))
            filled[place] = None if tensor is x else _describing(x, None)  # no tensor is kept alive
    return _Bound(compiled[(*each.grid, 1, 1)[:3]], filled, tuple(tensor_slots), tuple(descriptor_slots))


def _holds_tensor(x: Any) -> bool:
    """Whether a tensor is inside the tuple `x`. If cached, it would be launched again in place of the next call's."""
    return isinstance(x, tuple) and any(isinstance(item, torch.Tensor) or _holds_tensor(item) for item in x)


def _describing(descriptor: Any, base: torch.Tensor | None) -> Any:
    """A copy of a TensorDescriptor that describes `base`, a tensor with the same cache key.

    The constructor's checks are not repeated: they hold for every tensor of that key.
    """
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__, base=base)
    return moved
