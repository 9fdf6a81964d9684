"""Launches that remember themselves.

Triton binds every argument of every launch anew, which costs the host more than the rest of a call. Here a launcher is
a plan, a generator of `Launch`es, and what it planned for arguments of one look (shapes, strides, dtypes, values) is
kept as Triton compiled and bound it, from the second call of that look on: later ones put their tensors into place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from llama_kernels.language import INTERPRETED
from llama_kernels.runtime import on_device_of

# AMD's compiler also asks how large a tensor's storage is, which no look holds: there Triton binds every launch.
_REMEMBERS = not INTERPRETED and torch.version.hip is None
# Multiply and add in one rounding, and one instruction: said, because from Triton 3.10 on silence means two.
_ALWAYS = {"enable_fp_fusion": True}
_MOST = 1024  # looks a plan; a program whose shapes never recur starts over there


class Launch(NamedTuple):
    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # its first parameters
    options: dict[str, Any]  # the others, by name, and num_warps and num_stages


class _Bound(NamedTuple):
    """A launch less its tensors."""

    run: Callable[..., None]
    args: list[Any]
    places: tuple[tuple[int, int], ...]  # in args, and of the plan's argument that goes there
    described: tuple[tuple[int, int], ...]  # likewise, where a descriptor in args is to lie on that argument


_looks_of_plans: list[dict[Any, Any]] = []


def remembered(plan: Callable[..., Iterator[Launch]]) -> Callable[..., None]:
    """The launcher of `plan`: call it with the plan's arguments, positionally, the first of them a tensor.

    All tensors among them are on one device. A plan looks at shapes, strides, dtypes, devices and what is no tensor,
    never at addresses. One that launches with tensors of its own making, or with views, is not remembered; with
    TensorDescriptors on its arguments it is.
    """
    looks: dict[tuple[Any, ...], list[_Bound] | None] = {}  # None: seen once, which many shapes are
    _looks_of_plans.append(looks)

    @functools.wraps(plan)
    def launch(*args: Any) -> None:
        with on_device_of(args[0]):
            look = _look(args) if _REMEMBERS else None
            if found := looks.get(look):
                for run, filled, places, described in found:
                    filled = filled.copy()
                    for place, source in places:
                        filled[place] = args[source]
                    for place, source in described:
                        filled[place] = _on(filled[place], args[source])
                    run(*filled)
                return
            launched = [(each, each.kernel[each.grid](*each.args, **each.options, **_ALWAYS)) for each in plan(*args)]
            if look is None:
                return
            if look in looks:
                bound = [_bind(each, compiled, args) for each, compiled in launched]
                looks[look] = None if None in bound else bound
            else:
                if len(looks) >= _MOST:
                    looks.clear()
                looks[look] = None

    return launch


def forget() -> None:
    """Let Triton bind every launch anew: after a change of what it compiles by, a driver or a knob."""
    for looks in _looks_of_plans:
        looks.clear()


def _look(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Calls of one look launch the same machine code with the same numbers, and tensors from the same places."""
    tensor = torch.Tensor
    look = [(x.shape, x.stride(), x.dtype, x.data_ptr() % 16) if isinstance(x, tensor) else x for x in args]
    look.append(args[0].get_device())
    seen = [id(x) for x in args if isinstance(x, tensor)]
    if len(set(seen)) < len(seen):  # which of them are one tensor
        look += map(seen.index, seen)
    return tuple(look)


def _bind(each: Launch, compiled: Any, args: tuple[Any, ...]) -> _Bound | None:
    """The launch that Triton made of it, less the tensors. None where there is nothing to keep."""
    if compiled is None:
        return None
    filled = [*each.args, *(each.options[name] for name in each.kernel.arg_names[len(each.args) :])]
    sources = {id(x): i for i, x in enumerate(args)}
    places: list[tuple[int, int]] = []
    described: list[tuple[int, int]] = []
    for place, x in enumerate(filled):
        tensor = getattr(x, "base", None) if hasattr(x, "block_shape") else x
        if isinstance(tensor, torch.Tensor):
            if id(tensor) not in sources:
                return None
            (places if tensor is x else described).append((place, sources[id(tensor)]))
            filled[place] = None if tensor is x else _on(x, None)  # no tensor is kept alive
    return _Bound(compiled[(*each.grid, 1, 1)[:3]], filled, tuple(places), tuple(described))


def _on(descriptor: Any, base: torch.Tensor | None) -> Any:
    """The TensorDescriptor, on another tensor of the same look: what it checked when it was made holds there too."""
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__, base=base)
    return moved
