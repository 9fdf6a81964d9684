"""Argument checks and their error messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from llama_kernels.core.device import KERNEL_DEVICES

_FLOAT32_EPS = torch.finfo(torch.float32).eps
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def message(op: str, argument: str, got: Any, wanted: Any, fix: str = "") -> str:
    """The text of an error: the op, the argument, what it got, what it takes, and how to fix it."""
    text = f"llama_kernels.{op}: {argument} is {got}; wanted {wanted}."
    return f"{text} {fix}" if fix else text


_checked: ContextVar[bool] = ContextVar("llama_kernels.checked", default=False)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """A context manager for debugging: calls inside also check the values of position_ids and cu_seqlens.

    A value out of range raises a ValueError. Without `checked` the kernels clamp such values: nothing is read or
    written out of bounds, but the results are wrong. Each check waits for the GPU. Calls that torch.compile traces are
    not checked. The setting holds for the current thread and the tasks that it starts.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def values_are_checked(x: torch.Tensor) -> bool:
    """Whether to check the values of `x`: inside `checked`, unless `x` has no data."""
    return not torch.compiler.is_compiling() and _checked.get() and not (x.is_meta or is_fake(x))


def check_eps(op: str, eps: float | None) -> float:
    """`eps` as a number. None: that of torch.float32, as in F.rms_norm, which computes in float32.

    Raises:
        TypeError: eps is not a number.
        ValueError: eps is negative or NaN.
    """
    if eps is None:
        return _FLOAT32_EPS
    check_number(op, "eps", eps, "a number that is not negative, or None", lambda eps: eps >= 0)
    return eps


def check_number(op: str, argument: str, x: Any, wanted: str, holds: Callable[[Any], bool]) -> None:
    """Raise a ValueError unless holds(x), and a TypeError if x is not a number. wanted: what holds(x) means."""
    try:
        if holds(x):
            return
    except TypeError:
        raise TypeError(message(op, argument, repr(x), wanted)) from None
    raise ValueError(message(op, argument, x, wanted))


DEVICES_TAKEN = "a CUDA, HIP or CPU tensor"


def fix_for_device(op: str) -> str:
    """For an error: what to call for tensors on a device that has no kernels."""
    from llama_kernels import reference  # which imports nothing of ours

    if op not in reference.__all__:
        return ""
    return f"llama_kernels.reference.{op} is the same in plain PyTorch, for any device."


def shape_of(x: torch.Tensor) -> str:
    """For an error: the shape of an argument."""
    return f"of shape {tuple(x.shape)}"


def check_tensors(
    op: str, dtypes: Sequence[torch.dtype] | None = KERNEL_DTYPES, **tensors: torch.Tensor | None
) -> None:
    """Raise unless each argument is None or a tensor of one of `dtypes`, on the device of the first.

    dtypes: None for any floating dtype.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a tensor is on another device than the first, or on a device without kernels.
    """
    device = None
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(message(op, name, f"a {type(x).__name__}", "a torch.Tensor"))
        if dtypes is None:
            if not x.dtype.is_floating_point:
                raise TypeError(message(op, name, x.dtype, "a floating-point tensor"))
        elif x.dtype not in dtypes:
            fix = f"llama_kernels.reference.{op} takes any floating dtype." if x.dtype == torch.float64 else ""
            if len(dtypes) == 1:
                fix = f"Pass {name}.to({dtypes[0]})."
            raise TypeError(message(op, name, x.dtype, " or ".join(map(str, dtypes)), fix))
        if device is None:
            first, device = name, x.device
            if device.type not in KERNEL_DEVICES and device.type != "meta":
                raise ValueError(message(op, name, f"on {device}", DEVICES_TAKEN, fix_for_device(op)))
        elif x.device != device:
            wanted, fix = f"the device of {first}, {device}", f"Pass {name}.to({first}.device)."
            raise ValueError(message(op, name, f"on {x.device}", wanted, fix))
