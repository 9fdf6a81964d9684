"""Registration of ops with torch.library.

An op of `llama_kernels` has an implementation for each dispatch key of PyTorch that it needs:

    CUDA                            the launcher of its kernels; HIP tensors have this key too
    CPU                             the reference, or the launcher where Triton interprets kernels
    Meta and fake tensors           shapes, dtypes and strides
    Autograd                        the gradient of a call from elsewhere, such as an exported graph
    Negative                        of ops that write into arguments: tensors that PyTorch stores negated
    vmap                            one call for each example
    CompositeExplicitAutograd       an error, for every other device and layout

autograd.py has the autograd.Functions that the package itself puts around its ops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad

from llama_kernels.core.autograd import functorch_is_active, refuse_forward_mode
from llama_kernels.core.checks import DEVICES_TAKEN, check_dense, fix_for_device, message
from llama_kernels.core.device import KERNEL_DEVICES
from llama_kernels.core.dtensors import distribute_gradients, is_dtensor, register_rules_for, repeat_on_dtensors
from llama_kernels.core.language import INTERPRETED
from llama_kernels.core.tensors import NotContiguous, last_dim_contiguous

LIBRARY = torch.library.Library("llama_kernels", "DEF")
# By the name of the op: the function that launches its kernels. It takes the op's arguments by position.
KERNELS: dict[str, Callable[..., Any]] = {}

# Functions of torch, looked up once: every call of an op needs them.
_is_compiling = torch.compiler.is_compiling
_below_autograd = torch._C._AutoDispatchBelowAutograd
_after_autograd = torch._C._after_autograd_keyset
_any_requires_grad = torch._C._any_requires_grad

# Whether the call under way is the package's own, which skips the op's Autograd key.
_without_autograd: ContextVar[bool] = ContextVar("llama_kernels.without_autograd", default=False)


# --- registration ----------------------------------------------------------------------------------------------------


def register(
    schema: str,
    *,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    call: Any = None,
) -> Callable[..., Any]:
    """Define the op `llama_kernels::<schema>`, and return the function by which the package calls it.

    That function takes the op's arguments by position and runs the op without autograd, since the package puts a
    torch.autograd.Function of its own around it. A call from elsewhere, such as an exported graph, has the gradient
    that `register_gradient` gives the op; without one it raises an error. Under torch.func.vmap the op runs once for
    each example. An op that writes into its arguments has no vmap.

    Args:
        schema: the op's, as torch.library takes it.
        kernel: runs for CUDA and HIP tensors, and for CPU tensors in Triton's interpreter. It launches Triton kernels.
        reference: runs for CPU tensors otherwise. It gives the same results in plain PyTorch.
        fake: gives results of the right shape, dtype and strides while PyTorch traces.
        call: a NamedTuple whose fields, and their defaults, are the parameters of `schema`. The three functions above
            take one such tuple. None: they take the op's arguments by position.

    Raises:
        ValueError: the fields of `call` are not the parameters of `schema`.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.llama_kernels, name).default
    if call is not None:
        parameters, fields = tuple(argument.name for argument in op._schema.arguments), call._fields
        if fields != parameters:
            raise ValueError(f"{call.__name__} has the fields {fields}, but the op {name} takes {parameters}.")
        kernel, reference, fake = (_by_position(call, function) for function in (kernel, reference, fake))
    kernel = _on_contiguous(op, kernel)
    if op._schema.is_mutable:
        kernel = _counting_writes(op, kernel)
        LIBRARY.impl(name, _with_values_stored(op), "Negative")
    KERNELS[name] = kernel
    LIBRARY.impl(name, kernel, "CUDA")
    LIBRARY.impl(name, kernel if INTERPRETED else _outside_autocast(reference), "CPU")
    torch.library.register_fake(f"llama_kernels::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, _refuse_device_of(op), "CompositeExplicitAutograd")
    if not op._schema.is_mutable:
        torch.library.register_vmap(f"llama_kernels::{name}", _example_by_example(op), lib=LIBRARY)
    LIBRARY.impl(name, _autograd_of(op), "Autograd", with_keyset=True)
    return _caller_of(op)


def _by_position(call: Any, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function`, which takes a NamedTuple `call`, as a function of its fields by position.

    The dispatcher leaves out trailing arguments that have their default values. They are filled in.
    """
    new, count, defaults = tuple.__new__, len(call._fields), tuple(call._field_defaults.values())

    def by_position(*args: Any) -> Any:
        return function(new(call, args if len(args) == count else args + defaults[len(args) - count :]))

    return by_position


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):  # entering a context would take a small call several microseconds
            return function(*args)
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return call


def _public(name: str) -> str:
    """The name of the public function that calls the op `name`."""
    return re.sub("(_forward|_backward|_)$", "", name)


def _on_contiguous(op: torch._ops.OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, which runs on copies if it finds a tensor whose last dimension is not contiguous.

    The public functions pass no such tensor. An exported graph may, since it has the copies that the tensors of its
    trace needed, and checks no strides.
    """

    def run(*args: Any) -> Any:
        try:
            return kernel(*args)
        except NotContiguous:
            given = [last_dim_contiguous(x) if isinstance(x, torch.Tensor) and x.ndim else x for x in args]
            return _and_copy_back(op, kernel, args, given)

    return run


# --- ops that write into their arguments -----------------------------------------------------------------------------


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
    """The implementation of `op`, which writes into arguments, for tensors with the negative bit.

    Their numbers in memory have the opposite sign, as in the imaginary part of a complex conjugate. For ops that write
    into no argument PyTorch does this itself; for others its own implementation fails where a tensor is None.
    """

    def stored(*args: Any) -> Any:
        given = [x.resolve_neg() if isinstance(x, torch.Tensor) else x for x in args]
        return _and_copy_back(op, op, args, given)

    return stored


def _and_copy_back(
    op: torch._ops.OpOverload, run: Callable[..., Any], args: Sequence[Any], given: Sequence[Any]
) -> Any:
    """The results of `run` on `given`, some of which are copies of `args`. What `op` writes into is copied back."""
    results = run(*given)
    for i in _written(op):
        if given[i] is not args[i]:
            args[i].copy_(given[i])
    return results


def _written(op: torch._ops.OpOverload) -> list[int]:
    """Which of its arguments `op` writes into."""
    infos = [argument.alias_info for argument in op._schema.arguments]
    return [i for i, info in enumerate(infos) if info is not None and info.is_write]


# --- calls of the package itself -------------------------------------------------------------------------------------


def _caller_of(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The function by which the package calls `op`, without autograd."""
    public = _public(op._schema.name.split("::")[1])

    def run(*args: Any) -> Any:
        if _is_compiling():  # Dynamo does not trace the guard `_below_autograd`
            register_rules_for(args)
            return op(*args)
        if functorch_is_active():  # functorch undoes the guard
            token = _without_autograd.set(True)
            try:
                return op(*args)
            finally:
                _without_autograd.reset(token)
        try:
            with _below_autograd():  # takes half a microsecond, where the implementation for Autograd takes three
                return op(*args)
        except RuntimeError as error:
            if not any(map(is_dtensor, args)):
                raise
            with _below_autograd():
                return repeat_on_dtensors(op, public, args, error)

    return run


# --- calls from elsewhere --------------------------------------------------------------------------------------------

# By the name of the op: the arguments that have a gradient, and a function with the op's arguments and results that
# autograd can differentiate.
_gradients: dict[str, tuple[frozenset[str], Any]] = {}


def register_gradient(name: str, arguments: Sequence[str], by: Callable[..., Any]) -> None:
    """Give `llama_kernels::<name>` the gradient of `by`, a function with the op's arguments and results.

    arguments: those that have a gradient. A call in which another argument requires grad raises a ValueError.
    """
    _gradients[name] = frozenset(arguments), by


def _autograd_of(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The implementation of `op` for the Autograd key, which the package's own calls skip."""
    name, parameters = op._schema.name.split("::")[1], [argument.name for argument in op._schema.arguments]
    defaults = [argument.default_value for argument in op._schema.arguments]
    public = _public(name)

    def with_gradient(keyset: Any, *args: Any) -> Any:
        args = distribute_gradients(op, args)
        forward_mode = forward_ad._current_level >= 0
        differentiated = torch.is_grad_enabled() and _any_requires_grad(*args)
        if not (differentiated or forward_mode) or _without_autograd.get():
            return op.redispatch(keyset & _after_autograd, *args)
        if functorch_is_active():
            fix = f"Call llama_kernels.{public}, which torch.func differentiates."
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


def _example_by_example(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The vmap rule of `op`: a call for each example, on tensors with a contiguous last dimension; the results are
    stacked."""

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


def _refuse_device_of(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The implementation of `op` for tensors on a device, or of a layout, that has no kernel. It raises an error.

    Public functions check their arguments before. This is for calls of torch.ops.llama_kernels and exported graphs.
    """
    name, parameters = op._schema.name.split("::")[1], [argument.name for argument in op._schema.arguments]
    public = _public(name)

    def refuse(*args: Any) -> Any:
        for parameter, x in zip(parameters, args, strict=False):  # without arguments that have their default values
            if not isinstance(x, torch.Tensor):
                continue
            check_dense(name, parameter, x)
            if x.device.type not in KERNEL_DEVICES:
                raise ValueError(message(name, parameter, f"on {x.device}", DEVICES_TAKEN, fix_for_device(public)))
        raise RuntimeError(f"llama_kernels.{name}: there is no kernel for these tensors.")

    return refuse
