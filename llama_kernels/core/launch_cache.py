"""The launch cache: a repeated call reuses the launches that Triton bound for it.

Triton binds every argument of every launch anew, which costs the host more than the rest of a call. Here a launcher is
a plan: a generator of `Launch`es. From the second call with one cache key (shapes, strides, dtypes, alignments, device
and numbers) on, its launches are kept as Triton compiled and bound them. A later call only puts its tensors into them.
"""

from __future__ import annotations

import functools
import itertools
import operator
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from llama_kernels.core.device import on_device_of
from llama_kernels.core.kernel_hashes import settled
from llama_kernels.core.language import INTERPRETED

# AMD's compiler also asks how large a tensor's storage is, which is not in the cache key: there Triton binds every
# launch.
_CACHES = not INTERPRETED and torch.version.hip is None
# Multiply and add in one rounding, and one instruction: said, because from Triton 3.10 on silence means two.
_ALWAYS = {"enable_fp_fusion": True}
MAX_KEYS = 1024  # keys a plan; a cache that is full is emptied


class Launch(NamedTuple):
    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # its first parameters
    options: dict[str, Any]  # the others, by name, and num_warps and num_stages


class _Bound(NamedTuple):
    """A launch without its tensors."""

    run: Callable[..., None]
    args: list[Any]
    tensor_slots: tuple[tuple[int, int], ...]  # in args, and of the plan's argument that goes there
    descriptor_slots: tuple[tuple[int, int], ...]  # likewise, where a descriptor in args is to describe that argument


_caches: list[dict[Any, Any]] = []  # one a plan


def cached_launch(plan: Callable[..., Iterator[Launch]]) -> Callable[..., None]:
    """The launcher of `plan`: call it with the plan's arguments, positionally, the first of them a tensor.

    All tensors among the arguments are on one device. Other arguments are hashable; tuples hold no floats. What a plan
    yields depends on its arguments alone, and of a tensor on nothing but shape, strides, dtype, device and whether its
    address is a multiple of 16. Launches of tensors that are no arguments, such as views, are not cached, nor are
    tensors inside tuples; TensorDescriptors of arguments are.
    """
    cache: dict[tuple[Any, ...], list[_Bound] | None] = {}  # None: called once, as many keys are
    _caches.append(cache)

    @functools.wraps(plan)
    def launch(*args: Any) -> None:
        with on_device_of(args[0]):
            key = _cache_key(args) if _CACHES else None
            if found := cache.get(key):
                for run, filled, tensor_slots, descriptor_slots in found:
                    filled = filled.copy()
                    for place, source in tensor_slots:
                        filled[place] = args[source]
                    for place, source in descriptor_slots:
                        filled[place] = _describing(filled[place], args[source])
                    run(*filled)
                return
            launched = [
                (each, settled(each.kernel)[each.grid](*each.args, **each.options, **_ALWAYS)) for each in plan(*args)
            ]
            if key is None or any(map(_holds_tensor, args)):
                return
            if key in cache:
                bound = [_bind(each, compiled, args) for each, compiled in launched]
                cache[key] = None if None in bound else bound
            else:
                if len(cache) >= MAX_KEYS:
                    cache.clear()
                cache[key] = None

    return launch


def forget() -> None:
    """Empty the launch caches: Triton binds every launch anew. For after a change of its driver or of a knob that it
    compiles by, such as `triton.knobs.runtime.debug`."""
    for cache in _caches:
        cache.clear()


def _cache_key(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Calls of one key launch the same machine code with the same numbers, and with their tensors in the same places.

    1, 1.0 and True are equal but bound differently: types are in the key. So are floats as bytes, as 0.0 == -0.0.
    """
    types = tuple(map(type, args))
    number, tensors_of, others_of, float_bytes_of = _kinds_of_types.get(types) or _kinds(types)
    tensors = tensors_of(args)
    key = [number, others_of(args), float_bytes_of(args), args[0].get_device()]
    for x in tensors:
        key += (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)
    ids = [*map(id, tensors)]
    if len(set(ids)) < len(ids):  # which of them are one tensor
        key += map(ids.index, ids)
    return tuple(key)


class _Kinds(NamedTuple):
    """For arguments of certain types: functions that give the tensors, the others, and the floats as bytes."""

    number: int  # stands for the types
    tensors_of: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    others_of: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    float_bytes_of: Callable[[tuple[Any, ...]], bytes]


def _kinds(types: tuple[type, ...]) -> _Kinds:
    tensors = [i for i, t in enumerate(types) if issubclass(t, torch.Tensor)]
    floats = [i for i, t in enumerate(types) if issubclass(t, float)]
    others = [i for i in range(len(types)) if i not in tensors and i not in floats]
    pack, floats_of = struct.Struct(f"{len(floats)}d").pack, _items(floats)
    kinds = _Kinds(next(_numbers), _items(tensors), _items(others), lambda args: pack(*floats_of(args)))
    return _kinds_of_types.setdefault(types, kinds)


_kinds_of_types: dict[tuple[type, ...], _Kinds] = {}
_numbers = itertools.count()


def _items(indices: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What gives the items of a tuple at `indices`, as a tuple."""
    if len(indices) == 1:
        (index,) = indices
        return lambda items: (items[index],)
    return operator.itemgetter(*indices) if indices else lambda items: ()


def _bind(each: Launch, compiled: Any, args: tuple[Any, ...]) -> _Bound | None:
    """The launch that Triton made, without its tensors. None where it cannot be cached."""
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
    """Whether a tensor is inside of the tuple `x`: kept, it would be launched again in place of the next call's."""
    return isinstance(x, tuple) and any(isinstance(item, torch.Tensor) or _holds_tensor(item) for item in x)


def _describing(descriptor: Any, base: torch.Tensor | None) -> Any:
    """The TensorDescriptor, of another tensor of the same key: what it checked when it was made holds for that too."""
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__, base=base)
    return moved
