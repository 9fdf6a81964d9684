"""Registration of ops with torch.library, and what their autograd functions share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad

from llama_kernels.core.checks import DEVICES_TAKEN, fix_for_device, message
from llama_kernels.core.device import KERNEL_DEVICES
from llama_kernels.core.dtensors import distribute_gradients, is_dtensor, register_rules_for, repeat_on_dtensors
from llama_kernels.core.language import INTERPRETED
from llama_kernels.core.tensors import last_dim_contiguous

LIBRARY = torch.library.Library("llama_kernels", "DEF")
# What runs on a GPU, by the name of the op. It takes the op's arguments by position.
KERNELS: dict[str, Callable[..., Any]] = {}


def register(
    schema: str,
    *,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    call: Any = None,
) -> Callable[..., Any]:
    """Define the op `llama_kernels::<schema>`, and return the function by which the package calls it.

    That function takes the op's arguments by position and runs it without autograd: the package puts a
    torch.autograd.Function of its own around it. A call from elsewhere, such as an exported graph, has the gradient
    that `register_gradient` gives the op, or raises. Under torch.func.vmap the op runs once for each example; an op
    that writes into its arguments has no vmap.

    Args:
        schema: the op's, as torch.library takes it.
        kernel: runs for CUDA and HIP tensors, and for CPU tensors in Triton's interpreter. It launches Triton kernels.
        reference: runs for CPU tensors otherwise. It gives the same results in plain PyTorch.
        fake: gives results of the right shape, dtype and strides while PyTorch traces.
        call: a NamedTuple whose fields, and their defaults, are the parameters of `schema`. The three functions above
            take one such tuple. None: they take the op's arguments by position.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.llama_kernels, name).default
    if call is not None:
        parameters, fields = tuple(argument.name for argument in op._schema.arguments), call._fields
        if fields != parameters:
            raise ValueError(f"{call.__name__} has the fields {fields}, but the op {name} takes {parameters}.")
        kernel, reference, fake = (_given_whole(call, function) for function in (kernel, reference, fake))
    if op._schema.is_mutable:
        kernel = _counting_writes(op, kernel)
        LIBRARY.impl(name, _with_values_stored(op), "Negative")
    KERNELS[name] = kernel
    LIBRARY.impl(name, kernel, "CUDA")
    LIBRARY.impl(name, kernel if INTERPRETED else _outside_autocast(reference), "CPU")
    torch.library.register_fake(f"llama_kernels::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, _refuse_device_of(op), "CompositeExplicitAutograd")  # every other device and layout
    if not op._schema.is_mutable:
        torch.library.register_vmap(f"llama_kernels::{name}", _example_by_example(op), lib=LIBRARY)
    LIBRARY.impl(name, _autograd_of(op), "Autograd", with_keyset=True)

    def run(*args: Any) -> Any:
        if _is_compiling():  # the guard cannot be traced
            register_rules_for(args)
            return op(*args)
        if _functorch_is_active():  # it would undo the guard
            token = _without_autograd.set(True)
            try:
                return op(*args)
            finally:
                _without_autograd.reset(token)
        try:
            with _below_autograd():  # half a microsecond, where the kernel of autograd takes three
                return op(*args)
        except RuntimeError as error:
            if not any(map(is_dtensor, args)):
                raise
            with _below_autograd():
                return repeat_on_dtensors(op, _public(name), args, error)

    return run


def _public(name: str) -> str:
    """The name of the public function that calls the op."""
    return re.sub("(_forward|_backward|_)$", "", name)


def _given_whole(call: Any, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function`, which takes a `call`, as a function of its fields. Arguments that the dispatcher leaves out at the
    end have their default values."""
    new, count, defaults = tuple.__new__, len(call._fields), tuple(call._field_defaults.values())

    def by_position(*args: Any) -> Any:
        return function(new(call, args if len(args) == count else args + defaults[len(args) - count :]))

    return by_position


def _counting_writes(op: torch._ops.OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, which also counts a new version of each tensor that `op` writes into.

    Autograd compares versions: it raises an error where a tensor that it saved for a backward has changed since.
    """
    written = _written(op)

    def counted(*args: Any) -> Any:
        results = kernel(*args)
        torch.autograd.graph.increment_version([args[i] for i in written if args[i] is not None])
        return results

    return counted


def _with_values_stored(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """What `op`, which writes into arguments, does where a tensor has the negative bit: its numbers in memory have the
    opposite sign, as those of the imaginary part of a complex conjugate. PyTorch does this itself for ops that write
    into nothing; for others it fails where a tensor is None."""

    def stored(*args: Any) -> Any:
        given = [x.resolve_neg() if isinstance(x, torch.Tensor) else x for x in args]
        results = op(*given)
        for i in _written(op):
            if given[i] is not args[i]:
                args[i].copy_(given[i])
        return results

    return stored


def _written(op: torch._ops.OpOverload) -> list[int]:
    """Which of its arguments `op` writes into."""
    infos = [argument.alias_info for argument in op._schema.arguments]
    return [i for i, info in enumerate(infos) if info is not None and info.is_write]


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return call


_is_compiling = torch.compiler.is_compiling

_below_autograd = torch._C._AutoDispatchBelowAutograd

_without_autograd: ContextVar[bool] = ContextVar("llama_kernels.without_autograd", default=False)

_after_autograd = torch._C._after_autograd_keyset

_any_requires_grad = torch._C._any_requires_grad

# Of an op: the arguments that have a gradient, and the function of the op's arguments that gives results which know it.
_gradients: dict[str, tuple[frozenset[str], Any]] = {}


def register_gradient(name: str, arguments: Sequence[str], by: Callable[..., Any]) -> None:
    """Give `llama_kernels::<name>` the gradient of `by`, which takes the op's arguments and returns its results.

    arguments: those that have a gradient. A call where another one requires grad raises.
    """
    _gradients[name] = frozenset(arguments), by


def _autograd_of(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """What `op` does where autograd is not left out, as it is by the package's own calls."""
    name, parameters = op._schema.name.split("::")[1], [argument.name for argument in op._schema.arguments]
    defaults = [argument.default_value for argument in op._schema.arguments]
    public = _public(name)

    def with_gradient(keyset: Any, *args: Any) -> Any:
        args = distribute_gradients(op, args)
        forward_mode = forward_ad._current_level >= 0
        differentiated = torch.is_grad_enabled() and _any_requires_grad(*args)
        if not (differentiated or forward_mode) or _without_autograd.get():
            return op.redispatch(keyset & _after_autograd, *args)
        if _functorch_is_active():
            fix = f"Call llama_kernels.{public}, which can be differentiated so."
            raise RuntimeError(f"torch.ops.llama_kernels.{name}: torch.func does not differentiate the op. {fix}")
        differentiable, by = _gradients.get(name, (frozenset[str](), None))
        if by is None:
            refuse_forward_mode(public, *args)
            if not differentiated:
                return op.redispatch(keyset & _after_autograd, *args)
        args = (*args, *defaults[len(args) :])  # the dispatcher leaves out what has its default value
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
    public = _public(name)

    def refuse(*args: Any) -> Any:
        for parameter, x in zip(parameters, args, strict=False):  # without arguments that have their default values
            if not isinstance(x, torch.Tensor):
                continue
            if x.layout != torch.strided:
                raise ValueError(message(name, parameter, f"of layout {x.layout}", "torch.strided, a dense tensor"))
            if x.device.type not in KERNEL_DEVICES:
                raise ValueError(message(name, parameter, f"on {x.device}", DEVICES_TAKEN, fix_for_device(public)))
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


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Make `tensors` the `ctx.saved_tensors` of backward and of jvp."""
    ctx.save_for_backward(*tensors)
    if transforms_are_active():  # outside of them there is no forward mode
        ctx.save_for_forward(*tensors)


def _zeros_of(x: Any) -> Callable[[], torch.Tensor | None]:
    """Makes zeros like x, without keeping x; None where x is not a tensor."""
    if not isinstance(x, torch.Tensor):
        return lambda: None
    return functools.partial(torch.zeros, x.shape, dtype=x.dtype, device=x.device)


class Differentiable(torch.autograd.Function):
    """An op and its derivatives, written as torch.func transforms it: `forward` without a context, and `setup_context`.

    The first input is the op's name, `ctx.op` in the backward. forward returns a tuple, the last KEPT of it for the
    backward alone; `call` returns the others. This form takes the host twice as long as the older `forward(ctx, ...)`,
    which `call` therefore makes of it for calls outside of transforms.

    A subclass with a `jvp(ctx, *tangents)` has a forward mode: from the tangents of its first DUAL inputs it returns
    those of what `call` returns. A tensor without a tangent has one of zeros; an input that is None has None. Tangents
    of other inputs are refused, and without `jvp` all are.
    Gradients and tangents that may be differentiated again come from `call` or from `with_derivatives_of`.
    """

    generate_vmap_rule = True
    KEPT = 0
    DUAL = 0
    call: Callable[..., tuple[torch.Tensor, ...]]

    def __init_subclass__(cls) -> None:
        compute, setup_context, backward, returned = cls.forward, cls.setup_context, cls.backward, -cls.KEPT or None
        jvp: Any = cls.__dict__.get("jvp")

        def forward(ctx: Any, *args: Any) -> Any:
            results = compute(*args)
            setup_context(ctx, args, results)
            return results[:returned]

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        older_form: Any = type(cls.__name__, (torch.autograd.Function,), methods)
        # A torch.compile around the transform sees only frames of Python here, and would trace the launchers.
        of_transforms: Any = cls
        of_transforms.forward = staticmethod(torch._disable_dynamo(compute))
        of_transforms.backward = staticmethod(torch._disable_dynamo(lambda ctx, *dy: backward(ctx, *dy[:returned])))
        if jvp is not None:

            def setup_both(ctx: Any, inputs: tuple[Any, ...], results: Any) -> None:
                setup_context(ctx, inputs, results)
                ctx.zeros_of_inputs = [_zeros_of(x) for x in inputs[1 : 1 + cls.DUAL]]
                ctx.zeros_of_kept = [_zeros_of(x) for x in results[len(results) - cls.KEPT :]]

            def tangents_of(ctx: Any, _: None, *tangents: Any) -> tuple[Any, ...]:
                given = (zeros() if t is None else t for t, zeros in zip(tangents, ctx.zeros_of_inputs, strict=False))
                return *jvp(ctx, *given), *(zeros() for zeros in ctx.zeros_of_kept)

            of_transforms.setup_context = staticmethod(setup_both)
            of_transforms.jvp = staticmethod(torch._disable_dynamo(tangents_of))

        def call(op: str, *args: Any) -> tuple[torch.Tensor, ...]:
            if forward_ad._current_level >= 0 or _functorch_is_active():
                if torch.compiler.is_dynamo_compiling():  # it would trace forward, and lose the gradient
                    torch._dynamo.graph_break()
                if jvp is None:
                    refuse_forward_mode(op, *args)
                else:
                    refuse_forward_mode(op, *args[cls.DUAL :], of=" of cos and sin")
                return cls.apply(op, *args)[:returned]
            if torch.compiler.is_dynamo_compiling():
                if torch.compiler.is_exporting():  # the graph would run forward without gradients, not know backward
                    return compute(op, *args)[:returned]
                args = _distinct(args)
            return older_form.apply(op, *args)

        cls.call = staticmethod(call)


def is_differentiated_again() -> bool:
    """Whether results of a backward or of a jvp may be differentiated. A compiled backward never is."""
    return (torch.is_grad_enabled() or transforms_are_active()) and not torch.compiler.is_compiling()


class _RefuseDerivatives(torch.autograd.Function):
    """The identity on gradients, tied to the tensors they depend on; differentiating it is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, of: str, count: int, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, ctx.of = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _RefuseDerivatives.error(ctx.op, "double backward")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _RefuseDerivatives.error(ctx.op, f"forward-mode differentiation{ctx.of}")

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
    if is_differentiated_again():
        return _RefuseDerivatives.apply(op, "", len(grads), *grads, *inputs)
    return tuple(grads)


def refuse_forward_mode(op: str, *args: Any, of: str = "") -> None:
    """Raise where one of the tensors among `args` has a tangent, which the op would not carry on to its result.

    of: what these tensors are, for the error.
    """
    if forward_ad._current_level >= 0:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if tensors:
            _RefuseDerivatives.apply(op, of, len(tensors), *tensors)
