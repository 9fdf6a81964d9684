"""What every op shares on the host: the op library, the one place that knows the device, error messages, allocation."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

from llama_kernels.language import HAS_TRITON, INTERPRETED

LIBRARY = torch.library.Library("llama_kernels", "DEF")

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def register(
    schema: str, *, kernel: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define `llama_kernels::<schema>` and say what it runs. Returns how the package calls it: without autograd.

    kernel: launches Triton, for CUDA and HIP tensors, and for CPU tensors in Triton's interpreter.
    reference: the same results from plain PyTorch, for CPU tensors otherwise.
    fake: only shapes, dtypes and strides, for tracing.

    Under torch.func.vmap the op runs once an example, unless it writes into its arguments: then it has no vmap.

    The package puts its own torch.autograd.Function around the op, so it needs no gradient of the op itself. A call
    from elsewhere, an exported graph for one, has the gradient that `register_gradient` gives the op, or else an error.
    """

    def outside_autocast(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return reference(*args)

    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CUDA")
    LIBRARY.impl(name, kernel if INTERPRETED else outside_autocast, "CPU")
    torch.library.register_fake(f"llama_kernels::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.llama_kernels, name).default
    LIBRARY.impl(name, _refuse_device_of(op), "CompositeExplicitAutograd")  # every other device and layout
    if not op._schema.is_mutable:
        torch.library.register_vmap(f"llama_kernels::{name}", _example_by_example(op), lib=LIBRARY)
    LIBRARY.impl(name, _autograd_of(op), "Autograd", with_keyset=True)

    def call(*args: Any) -> Any:
        if _is_compiling():  # the guard cannot be traced
            return op(*args)
        if _functorch_is_active():  # it would undo the guard
            token = _without_autograd.set(True)
            try:
                return op(*args)
            finally:
                _without_autograd.reset(token)
        with _below_autograd():  # half a microsecond, where the kernel of autograd takes three
            return op(*args)

    return call


_is_compiling = torch.compiler.is_compiling
_below_autograd = torch._C._AutoDispatchBelowAutograd
_without_autograd: ContextVar[bool] = ContextVar("llama_kernels.without_autograd", default=False)
_after_autograd = torch._C._after_autograd_keyset
_any_requires_grad = torch._C._any_requires_grad

# Of an op: the arguments that have a gradient, and the function of the op's arguments that gives results which know it.
_gradients: dict[str, tuple[frozenset[str], Callable[..., Any]]] = {}


def register_gradient(name: str, arguments: Sequence[str], by: Callable[..., Any]) -> None:
    """Give `llama_kernels::<name>` the gradient of `by`, which takes the op's arguments and returns its results.

    arguments: those that have a gradient. A call where another one requires grad raises.
    """
    _gradients[name] = frozenset(arguments), by


def _autograd_of(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """What `op` does where autograd is not left out, as it is by the package's own calls."""
    name, parameters = op._schema.name.split("::")[1], [argument.name for argument in op._schema.arguments]
    public = re.sub("(_forward|_backward|_)$", "", name)

    def with_gradient(keyset: Any, *args: Any) -> Any:
        forward_mode = forward_ad._current_level >= 0
        wanted = torch.is_grad_enabled() and _any_requires_grad(*args)
        if not (wanted or forward_mode) or _without_autograd.get():
            return op.redispatch(keyset & _after_autograd, *args)
        if _functorch_is_active():
            fix = f"Call llama_kernels.{public}, which can be differentiated so."
            raise RuntimeError(f"torch.ops.llama_kernels.{name}: torch.func does not differentiate the op. {fix}")
        refuse_forward_mode(public, *args)
        if not wanted:
            return op.redispatch(keyset & _after_autograd, *args)
        differentiable, by = _gradients.get(name, (frozenset(), None))
        for parameter, x in zip(parameters, args, strict=True):
            if isinstance(x, torch.Tensor) and x.requires_grad and parameter not in differentiable:
                got, wanted = "a tensor that requires grad", "one without: the op has no gradient of it"
                fix = f"Call torch.ops.llama_kernels.{name} under torch.no_grad(), or detach the tensor."
                raise ValueError(message(name, parameter, got, wanted, fix))
        return by(*args)

    return with_gradient


def _refuse_device_of(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """What `op` does with tensors on a device, or of a layout, that has no kernel: a ValueError. Public functions check
    their arguments before; this is for calls of torch.ops.llama_kernels and exported graphs."""
    name, parameters = op._schema.name.split("::")[1], [argument.name for argument in op._schema.arguments]
    public = re.sub("(_forward|_backward|_)$", "", name)

    def refuse(*args: Any) -> Any:
        for parameter, x in zip(parameters, args, strict=True):
            if not isinstance(x, torch.Tensor):
                continue
            if x.layout != torch.strided:
                raise ValueError(message(name, parameter, f"of layout {x.layout}", "torch.strided, a dense tensor"))
            if x.device.type not in KERNEL_DEVICES:
                raise ValueError(message(name, parameter, f"on {x.device}", _DEVICES_TAKEN, _elsewhere(public)))
        raise RuntimeError(f"llama_kernels.{name}: there is no kernel for these tensors.")

    return refuse


def _example_by_example(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The vmap rule of `op`: a call for each example, each tensor as the launchers take it, the results stacked."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def example(i: int) -> list[Any]:
            pairs = zip(args, in_dims, strict=True)
            return [x if dim is None else last_dim_contiguous(x.select(dim, i)) for x, dim in pairs]

        if not info.batch_size:
            raise ValueError(f"{op}: vmap over a dimension of size 0 has no result; wanted at least one example.")
        results = [op(*example(i)) for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)

    return rule


# --- the device ------------------------------------------------------------------------------------------------------


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch inside this: Triton launches on the current device, which need not be the one that holds `x`."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE  # nearly always, and every launch asks
    return torch.cuda.device(x.device)


_HERE = contextlib.nullcontext()


# KiB of shared memory that one program may use, by family of GPUs.
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}

# Kernels run there. On the meta device, and while tracing, only shapes are computed.
KERNEL_DEVICES = ("cuda", "cpu")


@functools.cache
def arch_of(device: torch.device) -> str:
    """The family whose tile table rows serve `device`: sm_80, sm_86, sm_90, sm_100 or gfx942.

    Every launcher asks before it compiles a kernel, and no launch that is in the launch cache does.

    Raises:
        ValueError: no kernel can be compiled for `device`.
    """
    if device.type != "cuda" or INTERPRETED:
        return "sm_80"  # the interpreter runs any tile
    gpu = gpu_of(device)
    if reason := why_not_compiled(gpu):
        fix = "llama_kernels.reference has every op in plain PyTorch, under the same name, for any device."
        patched = "A patched Transformers model runs stock code after unpatch(model)."
        raise ValueError(f"llama_kernels: no kernel can be compiled for {device}: {reason}. {fix} {patched}")
    return family_of(gpu)


class GPU(NamedTuple):
    """What decides which tiles a GPU takes, and how wide its warps are."""

    name: str
    arch: tuple[int, int] | str  # compute capability, or on AMD the name of the architecture, gfx942 say
    shared_bytes: int | None  # that one program may use; None: this torch does not say
    lanes: int  # threads in a warp


@functools.cache
def gpu_of(device: torch.device) -> GPU:
    """The CUDA or HIP GPU `device`, as its driver describes it."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return GPU(properties.name, arch, properties.shared_memory_per_block, properties.warp_size)
    arch = (properties.major, properties.minor)
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    return GPU(properties.name, arch, shared, properties.warp_size)


def family_of(gpu: GPU) -> str:
    """The family of tiles for `gpu`, a key of SHARED_KIB. `why_not_compiled` tells whether it can run them."""
    if isinstance(gpu.arch, str):
        return "gfx942"
    if gpu.arch == (8, 0):
        return "sm_80"
    # Consumer chips (8.6, 8.9, 12.x), 11.0, which Triton gives the tensor-core instructions of those, and the unknown
    # share the rows that ask for the least shared memory.
    return {9: "sm_90", 10: "sm_100"}.get(gpu.arch[0], "sm_86")


# AMD's GCN and RDNA 1 and 2. There Triton writes products out, which takes minutes to compile and spills kilobytes.
_WITHOUT_MATRIX_INSTRUCTIONS = re.compile("gfx([78]|90[02469c]|10)")


def why_not_compiled(gpu: GPU) -> str | None:
    """What keeps kernels from being compiled for `gpu`. None: nothing does."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if isinstance(gpu.arch, str):
        if _WITHOUT_MATRIX_INSTRUCTIONS.match(gpu.arch):
            return f"{gpu.name} is a {gpu.arch}; wanted an AMD GPU with matrix instructions, CDNA or RDNA 3 or newer"
    elif gpu.arch < (8, 0):
        return f"{gpu.name} has compute capability {gpu.arch[0]}.{gpu.arch[1]}; Triton compiles for 8.0 and newer"
    needed = SHARED_KIB[family_of(gpu)]
    if gpu.shared_bytes is not None and gpu.shared_bytes < 1024 * needed:
        has = f"{gpu.shared_bytes // 1024} KiB of shared memory a program"
        return f"{gpu.name} has {has}; the kernels for such a GPU need {needed} KiB"
    return None


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors (compute units) of `device`."""
    if device.type != "cuda":
        return 2  # the interpreter runs programs one after another; two still exercise the sum over programs
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_bytes_of(device: torch.device) -> int:
    """Shared memory that one program may use on every GPU of the family of `device`."""
    return 1024 * SHARED_KIB[arch_of(device)]


def lanes_of(device: torch.device) -> int:
    """Threads in a warp of `device`: 32, and 64 on AMD's CDNA."""
    if arch_of(device) != "gfx942":
        return 32
    return gpu_of(device).lanes if device.type == "cuda" else 64  # a CPU tensor stands for gfx942 in the compile gate


# --- sizes -----------------------------------------------------------------------------------------------------------

# Triton's own cost 4 microseconds a call on the host, where every launch needs some.


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is not under `n`, from 1 on."""
    return 1 << max(n - 1, 0).bit_length()


# --- allocation ------------------------------------------------------------------------------------------------------


def empty_in_order_of(
    x: torch.Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Uninitialised and dense, its dimensions nested in memory as those of `x` are, the last one innermost."""
    shape = tuple(x.shape if shape is None else shape)
    try:
        strides = _dense_strides(shape, x.stride())
    except TypeError:  # sizes that are symbols, while tracing, have no hash
        strides = _dense_strides.__wrapped__(shape, x.stride())
    return torch.empty_strided(shape, strides, dtype=dtype or x.dtype, device=x.device)


@functools.lru_cache(maxsize=1024)
def _dense_strides(shape: tuple[int, ...], like: tuple[int, ...]) -> tuple[int, ...]:
    outer_to_inner = sorted(range(len(shape) - 1), key=lambda d: like[d] or math.inf, reverse=True)
    strides = [1] * len(shape)
    step = max(shape[-1], 1)
    for d in reversed(outer_to_inner):
        strides[d] = step
        step = step * max(shape[d], 1)
    return tuple(strides)


def sizes_of(x: torch.Tensor) -> tuple[int, int, int]:
    """B, H, S of dense (B, H, S, D); packed (T, H, D) is one batch of T tokens."""
    shape = x.shape
    return (shape[0], shape[1], shape[2]) if len(shape) == 4 else (1, shape[1], shape[0])


def strides_of(x: torch.Tensor) -> tuple[int, int, int]:
    """Of batch, head and token, dense or packed."""
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, strides[1], strides[0])


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` itself when its last dimension is contiguous, else a copy: kernels take any other strides as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on `device`, or None where it is off."""
    if device.type not in KERNEL_DEVICES:  # for some torch has no autocast, and would raise
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


# --- autograd --------------------------------------------------------------------------------------------------------


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on `tensors` goes through autograd: where a gradient is wanted, or a transform is active."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return transforms_are_active()


def transforms_are_active() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is: tensors that carry a gradient or a tangent
    for it need not require grad."""
    return forward_ad._current_level >= 0 or _functorch_is_active()


_functorch_is_active = torch._C._are_functorch_transforms_active


def is_differentiated(x: torch.Tensor) -> bool:
    """Whether `x` requires grad, or is an example of a torch.func.vmap of what does."""
    if x.requires_grad or not _functorch_is_active():
        return x.requires_grad
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) and is_differentiated(functorch.get_unwrapped(x))


def _distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args`, no two tensors among them the same object: torch.compile does not trace a Function given one twice."""
    tensor = torch.Tensor
    return tuple(
        x.view_as(x) if isinstance(x, tensor) and any(x is y for y in args[:i]) else x for i, x in enumerate(args)
    )


class Differentiable(torch.autograd.Function):
    """An op and its gradient, written as torch.func transforms it: `forward` without a context, and `setup_context`.

    The first input is the op's name, `ctx.op` in the backward. forward returns a tuple, the last KEPT of it for the
    backward alone; `call` returns the others. This form takes the host twice as long as the older `forward(ctx, ...)`,
    which `call` therefore makes of it for calls outside of transforms.
    """

    generate_vmap_rule = True
    KEPT = 0
    call: Callable[..., tuple[torch.Tensor, ...]]

    def __init_subclass__(cls) -> None:
        compute, setup_context, backward, returned = cls.forward, cls.setup_context, cls.backward, -cls.KEPT or None

        def forward(ctx, *args):
            results = compute(*args)
            setup_context(ctx, args, results)
            return results[:returned]

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        older_form = type(cls.__name__, (torch.autograd.Function,), methods)
        # A torch.compile around the transform sees only frames of Python here, and would trace the launchers.
        cls.forward = staticmethod(torch._disable_dynamo(compute))
        cls.backward = staticmethod(torch._disable_dynamo(lambda ctx, *grads: backward(ctx, *grads[:returned])))

        def call(op: str, *args: Any) -> tuple[torch.Tensor, ...]:
            if forward_ad._current_level >= 0 or _functorch_is_active():
                if torch.compiler.is_dynamo_compiling():  # it would trace forward, and lose the gradient
                    torch._dynamo.graph_break()
                refuse_forward_mode(op, *args)
                return cls.apply(op, *args)[:returned]
            if torch.compiler.is_dynamo_compiling():
                if torch.compiler.is_exporting():  # the graph would run forward without gradients, not know backward
                    return compute(op, *args)[:returned]
                args = _distinct(args)
            return older_form.apply(op, *args)

        cls.call = staticmethod(call)


class _RefuseDerivatives(torch.autograd.Function):
    """The identity on gradients, tied to the tensors they depend on; differentiating it is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: torch.Tensor | None):
        return tuple(None if g is None else g.view_as(g) for g in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise _RefuseDerivatives.error(ctx.op, "double backward")

    @staticmethod
    def jvp(ctx, *_):
        raise _RefuseDerivatives.error(ctx.op, "forward-mode differentiation")

    @staticmethod
    def error(op: str, kind: str) -> RuntimeError:
        from llama_kernels import reference  # which imports nothing of ours

        other = f"llama_kernels.reference.{op} can be differentiated any number of times, in either mode."
        if op not in reference.__all__:
            other = "It is for inference."
        return RuntimeError(f"llama_kernels.{op}: {kind} is not supported. {other}")


def refuse_double_backward(
    op: str, grads: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients, made to raise if someone differentiates them with respect to `inputs`.

    `once_differentiable` is not enough: where grad_output needs no gradient (y.sum()), it lets the second derivative
    go missing in silence.
    """
    if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and not torch.compiler.is_compiling():
        return _RefuseDerivatives.apply(op, len(grads), *grads, *inputs)
    return tuple(grads)


def refuse_forward_mode(op: str, *args: Any) -> None:
    """Raise where one of the tensors among `args` has a tangent, which no op would carry on to its result."""
    if forward_ad._current_level >= 0:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        _RefuseDerivatives.apply(op, len(tensors), *tensors)


# --- arguments -------------------------------------------------------------------------------------------------------


def message(op: str, argument: str, got: Any, wanted: Any, fix: str = "") -> str:
    """Every error of the package reads alike: op, argument, what it got, what it takes, how to mend it."""
    text = f"llama_kernels.{op}: {argument} is {got}; wanted {wanted}."
    return f"{text} {fix}" if fix else text


_checked: ContextVar[bool] = ContextVar("llama_kernels.checked", default=False)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Inside, the values of position_ids and cu_seqlens are checked too, and what is wrong raises a ValueError.

    Outside they are never trusted either: the kernels clamp them, so that nothing is read or written out of bounds, but
    a mistake gives wrong numbers without a word. To check is to wait for the GPU at every call: for debugging. What
    torch.compile traces is not checked. Holds for this thread and the tasks that it starts.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def values_are_checked(x: torch.Tensor) -> bool:
    """Whether the values of `x` are to be read: inside `checked`, where it has any."""
    return not torch.compiler.is_compiling() and _checked.get() and not (x.is_meta or is_fake(x))


def check_eps(op: str, eps: float | None) -> float:
    """`eps` as a number: None is F.rms_norm's own, that of the float32 in which it computes."""
    if eps is None:
        return _FLOAT32_EPS
    if not eps >= 0:
        raise ValueError(message(op, "eps", eps, "a number that is not negative, or None"))
    return eps


_FLOAT32_EPS = torch.finfo(torch.float32).eps


_DEVICES_TAKEN = "a CUDA, HIP or CPU tensor"


def _elsewhere(op: str) -> str:
    """What to call on a device that the kernels do not run on."""
    from llama_kernels import reference  # which imports nothing of ours

    if op not in reference.__all__:
        return ""
    return f"llama_kernels.reference.{op} is the same in plain PyTorch, for any device."


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
            if device.type not in KERNEL_DEVICES and device.type != "meta":
                raise ValueError(message(op, name, f"on {device}", _DEVICES_TAKEN, _elsewhere(op)))
        elif x.device != device:
            raise ValueError(message(op, name, f"on {x.device}", f"the device of {first}, {device}"))
