"""Argument checks and their error messages."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from llama_kernels.core.autograd import is_differentiated
from llama_kernels.core.device import KERNEL_DEVICES

_STRIDED = torch.strided
_FLOAT32 = torch.finfo(torch.float32)
LARGEST, SMALLEST = _FLOAT32.max, _FLOAT32.tiny  # positive numbers of float32. A GPU takes smaller ones for 0
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def message(op: str, argument: str, got: Any, wanted: Any, fix: str = "") -> str:
    """The text of an error: the op, the argument, what it got, what it takes, and how to fix it."""
    text = f"llama_kernels.{op}: {argument} is {got}; wanted {wanted}."
    return f"{text} {fix}" if fix else text


_checked: ContextVar[bool] = ContextVar("llama_kernels.checked", default=False)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """A context manager for debugging: calls inside also check the values of integer tensors.

    These are position_ids, axes, cache_position, cu_seqlens and doc_start. A value out of range raises a ValueError.
    Without `checked` the kernels clamp such values, and drop tokens whose cache_position is outside the cache: nothing
    is read or written out of bounds, but the results are wrong. Each check waits for the GPU. Calls that torch.compile
    traces are not checked. The setting holds for the current thread and the tasks that it starts.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def values_to_check(x: torch.Tensor) -> torch.Tensor | None:
    """The integers `x` as int64 if the call is inside `checked` and x has data, otherwise None.

    Under torch.func.vmap they are those of all examples, (examples, ...).
    """
    if torch.compiler.is_compiling() or not _checked.get() or x.is_meta or is_fake(x):
        return None
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        example = functorch.maybe_get_bdim(x)
        x = functorch.get_unwrapped(x)
        x = x if example < 0 else x.movedim(example, 0)
    return x.long()


def check_eps(op: str, eps: float | None) -> float:
    """`eps` as a number. None: that of torch.float32, as in F.rms_norm, which computes in float32.

    Raises:
        TypeError: eps is not a number.
        ValueError: eps is negative, infinite or NaN.
    """
    if eps is None:
        return _FLOAT32.eps
    check_number(op, "eps", eps, 0, "a finite number that is not negative, or None")
    return eps


def check_offset(op: str, offset: float) -> None:
    """Raise unless `offset`, which is added to a weight, is a finite number."""
    check_number(op, "offset", offset, -LARGEST, "a finite number")


def check_number(op: str, name: str, value: Any, least: float, wanted: str) -> None:
    """Raise unless `value` is a number from `least` to the largest of float32, in which the kernels compute.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of this range, or NaN, or a tensor that requires grad.
    """
    if isinstance(value, torch.Tensor) and torch.is_grad_enabled() and is_differentiated(value):
        fix = _fix_by_reference(op, f"differentiates {name} too.") or f"Pass float({name})."
        raise ValueError(message(op, name, "a tensor that requires grad", "a constant", fix))
    try:
        fits = least <= value <= LARGEST
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise TypeError(message(op, name, repr(value), wanted)) from None
    if value is True or value is False:
        raise TypeError(message(op, name, value, wanted))
    if not fits:
        raise ValueError(message(op, name, value, wanted))


def check_flag(op: str, name: str, value: Any) -> None:
    """Raise a TypeError unless `value` is True or False."""
    if value is not True and value is not False:
        raise TypeError(message(op, name, repr(value), "True or False"))


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python, of NumPy or of torch.compile."""
    if isinstance(value, (int, torch.SymInt)):  # torch.compile does not trace hasattr of a size without a value
        return not isinstance(value, bool)
    return hasattr(value, "__index__") and not isinstance(value, torch.Tensor)


def check_count(op: str, name: str, value: Any, wanted: str, least: int = 1) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if not is_integer(value):
        raise TypeError(message(op, name, repr(value), wanted))
    if value < least:
        raise ValueError(message(op, name, value, wanted))


def check_device(op: str, device: Any) -> None:
    """Raise a TypeError or a ValueError unless `device` is None or torch.device takes it."""
    try:
        torch.device("cpu" if device is None else device)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(message(op, "device", repr(device), "a device of PyTorch, or None")) from error


DEVICES_TAKEN = "a CUDA, HIP or CPU tensor"


def _fix_by_reference(op: str, what: str) -> str:
    from llama_kernels import reference  # which imports nothing of ours

    return f"llama_kernels.reference.{op} {what}" if op in reference.__all__ else ""


def fix_for_device(op: str) -> str:
    """For an error: what to call for tensors on a device that has no kernels."""
    return _fix_by_reference(op, "is the same in plain PyTorch, for any device.")


def shape_of(x: torch.Tensor) -> str:
    """For an error: the shape of an argument."""
    return f"of shape {tuple(x.shape)}"


def check_dense(op: str, name: str, x: Any) -> None:
    """Raise a TypeError unless `x` is a dense tensor: not nested, sparse or of MKL-DNN."""
    if not isinstance(x, torch.Tensor) or x.layout is not _STRIDED or x.is_nested:
        raise _not_dense(op, name, x)


def _not_dense(op: str, name: str, x: Any) -> TypeError:
    if not isinstance(x, torch.Tensor):
        return TypeError(message(op, name, "None" if x is None else f"a {type(x).__name__}", "a torch.Tensor"))
    if x.is_nested:
        fix = f"Pass {name}.values(), its tokens one after another."
        if op == "attention":
            fix = f"llama_kernels.attention_varlen takes {name}.values() and {name}.offsets().int()."
        return TypeError(message(op, name, "a nested tensor", "a dense one", fix))
    return TypeError(message(op, name, f"of layout {x.layout}", "a dense tensor", f"Pass {name}.to_dense()."))


def check_tensors(
    op: str,
    dtypes: Sequence[torch.dtype] | None = KERNEL_DTYPES,
    optional: Container[str] = (),
    **tensors: torch.Tensor | None,
) -> None:
    """Raise unless each argument is a dense tensor of one of `dtypes`, on the device of the first.

    dtypes: None for any floating dtype. optional: names of the arguments that may be None.

    Raises:
        TypeError: an argument is not a tensor, is sparse or nested, or has another dtype.
        ValueError: a tensor is on another device than the first, or on a device without kernels.
    """
    device = None
    for name, x in tensors.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, torch.Tensor) or x.layout is not _STRIDED or x.is_nested:
            raise _not_dense(op, name, x)
        if dtypes is None:
            if not x.dtype.is_floating_point:
                raise TypeError(message(op, name, x.dtype, "a floating-point tensor"))
        elif x.dtype not in dtypes:
            fix = _fix_by_reference(op, "takes any floating dtype.") if x.dtype == torch.float64 else ""
            if len(dtypes) == 1:
                fix = f"Pass {name}.to({dtypes[0]})."
            raise TypeError(message(op, name, x.dtype, " or ".join(map(str, dtypes)), fix))
        if device is None:
            first, device = name, x.device
            if device.type not in KERNEL_DEVICES and device.type != "meta":
                raise ValueError(message(op, name, f"on {device}", DEVICES_TAKEN, fix_for_device(op)))
        elif x.device != device:
            if device.type == "meta":  # the tensor without data is the wrong one
                raise ValueError(message(op, first, "on meta", f"the device of {name}, {x.device}"))
            wanted, fix = f"the device of {first}, {device}", f"Pass {name}.to({first}.device)."
            raise ValueError(message(op, name, f"on {x.device}", wanted, fix))
