"""What every op shares on the host: the op library, the one place that knows the device, error messages, allocation."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama_kernels.language import INTERPRETED

LIBRARY = torch.library.Library("llama_kernels", "DEF")

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def register(
    schema: str, *, kernel: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Define `llama_kernels::<schema>` and say what it runs.

    kernel: launches Triton, for CUDA and HIP tensors, and for CPU tensors in Triton's interpreter.
    reference: the same results from plain PyTorch, for CPU tensors otherwise.
    fake: only shapes, dtypes and strides, for tracing.
    """

    def outside_autocast(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return reference(*args)

    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CUDA")
    LIBRARY.impl(name, kernel if INTERPRETED else outside_autocast, "CPU")
    torch.library.register_fake(f"llama_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.llama_kernels, name).default


# --- the device ------------------------------------------------------------------------------------------------------


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch inside this: Triton launches on the current device, which need not be the one that holds `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def arch_of(device: torch.device) -> str:
    """The family whose tile table rows serve `device`: sm_80, sm_86, sm_90, sm_100 or gfx942."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter runs any tile
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return "sm_80"
    # Consumer chips (8.6, 8.9, 12.x) and the unknown share the row that asks for the least shared memory.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86")


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors (compute units) of `device`."""
    if device.type != "cuda":
        return 2  # the interpreter runs programs one after another; two still exercise the sum over programs
    return torch.cuda.get_device_properties(device).multi_processor_count


def lanes_of(device: torch.device) -> int:
    """Threads in a warp of `device`."""
    return 64 if device.type == "cuda" and torch.version.hip else 32


# --- allocation ------------------------------------------------------------------------------------------------------


def empty_in_order_of(
    x: torch.Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Uninitialised and dense, its dimensions nested in memory as those of `x` are, the last one innermost."""
    shape = x.shape if shape is None else shape
    outer_to_inner = sorted(range(x.ndim - 1), key=lambda d: x.stride(d) or math.inf, reverse=True)
    strides = [1] * x.ndim
    step = max(shape[-1], 1)
    for d in reversed(outer_to_inner):
        strides[d] = step
        step = step * max(shape[d], 1)
    return torch.empty_strided(shape, strides, dtype=dtype or x.dtype, device=x.device)


def sizes_of(x: torch.Tensor) -> tuple[int, int, int]:
    """B, H, S of dense (B, H, S, D); packed (T, H, D) is one batch of T tokens."""
    return (x.shape[0], x.shape[1], x.shape[2]) if x.ndim == 4 else (1, x.shape[1], x.shape[0])


def strides_of(x: torch.Tensor) -> tuple[int, int, int]:
    """Of batch, head and token, dense or packed."""
    return (x.stride(0), x.stride(1), x.stride(2)) if x.ndim == 4 else (0, x.stride(1), x.stride(0))


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` itself when its last dimension is contiguous, else a copy: kernels take any other strides as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on `device`, or None where it is off."""
    if device.type == "meta":  # torch has no autocast for it, and would raise
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


# --- autograd --------------------------------------------------------------------------------------------------------


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def distinct(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """`tensors`, no two of them the same object: torch.compile does not trace a Function that is given one twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        x.view_as(x) if x is not None and any(x is y for y in tensors[:i]) else x for i, x in enumerate(tensors)
    )


class _RefuseDoubleBackward(torch.autograd.Function):
    """The identity on gradients, tied to the tensors they depend on; differentiating it is an error."""

    @staticmethod
    def forward(ctx, op: str, count: int, *tensors: torch.Tensor | None):
        ctx.op = op
        return tuple(None if g is None else g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"llama_kernels.{ctx.op}: double backward is not supported. "
            f"llama_kernels.reference.{ctx.op} can be differentiated any number of times."
        )


def refuse_double_backward(
    op: str, grads: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients, made to raise if someone differentiates them with respect to `inputs`.

    `once_differentiable` is not enough: where grad_output needs no gradient (y.sum()), it lets the second derivative
    go missing in silence.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RefuseDoubleBackward.apply(op, len(grads), *grads, *inputs)
    return tuple(grads)


# --- arguments -------------------------------------------------------------------------------------------------------


def message(op: str, argument: str, got: Any, wanted: Any, fix: str = "") -> str:
    """Every error of the package reads alike: op, argument, what it got, what it takes, how to mend it."""
    text = f"llama_kernels.{op}: {argument} is {got}; wanted {wanted}."
    return f"{text} {fix}" if fix else text


def shape_of(x: torch.Tensor) -> str:
    return f"of shape {tuple(x.shape)}"


def check_tensors(
    op: str, dtypes: Sequence[torch.dtype] | None = KERNEL_DTYPES, **tensors: torch.Tensor | None
) -> None:
    """Each is a tensor of one of `dtypes` (None: any floating dtype), on the device of the first. None passes."""
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
            raise TypeError(message(op, name, x.dtype, " or ".join(map(str, dtypes)), fix))
        if device is None:
            first, device = name, x.device
            if device.type not in ("cuda", "cpu", "meta"):
                raise ValueError(message(op, name, f"on {device}", "a CUDA, HIP or CPU tensor"))
        elif x.device != device:
            raise ValueError(message(op, name, f"on {x.device}", f"the device of {first}, {device}"))
