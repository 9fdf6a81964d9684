"""What the autograd.Functions of the ops share: forward mode, torch.func transforms, and derivatives that are refused.

`Differentiable` is the base class of the ops' Functions. `needs_grad` says whether a call goes through one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

# --- what a call needs -----------------------------------------------------------------------------------------------

functorch_is_active = torch._C._are_functorch_transforms_active


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on `tensors` goes through autograd: a gradient is wanted, or a transform is active."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return transforms_are_active()


def transforms_are_active() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active.

    Inside one, a tensor may carry a gradient or a tangent although it does not require grad.
    """
    return forward_ad._current_level >= 0 or functorch_is_active()


def is_differentiated(x: torch.Tensor) -> bool:
    """Whether `x` requires grad, or is an example of a torch.func.vmap over a tensor that does."""
    if x.requires_grad or not functorch_is_active():
        return x.requires_grad
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) and is_differentiated(functorch.get_unwrapped(x))


def is_differentiated_again() -> bool:
    """Whether the results of a backward or of a jvp may be differentiated. Those of a compiled backward never are."""
    return (torch.is_grad_enabled() or transforms_are_active()) and not torch.compiler.is_compiling()


# --- the Functions of the ops ----------------------------------------------------------------------------------------


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Make `tensors` the `ctx.saved_tensors` of backward and of jvp."""
    ctx.save_for_backward(*tensors)
    if transforms_are_active():  # elsewhere there is no forward mode
        ctx.save_for_forward(*tensors)


class Differentiable(torch.autograd.Function):
    """Base class for an op with derivatives, in the form that torch.func needs: `forward` has no ctx.

    A subclass defines `forward(op, *args)`, `setup_context` and `backward`, and may define `jvp(ctx, *tangents)`. `op`
    is the name of the op, for error messages. `forward` returns a tuple. Use `call(op, *args)` instead of `apply`.

    Outside of transforms, `call` runs the same code in the older form `forward(ctx, *args)`, which costs the host half
    the time.

    With `jvp`, the op has forward mode. It maps the tangents of the first TANGENT_INPUTS inputs after `op` to the
    tangents of what `call` returns. The tangent of a tensor that has none is zeros; that of an input that is None is
    None. A tangent of any other input raises an error. Without `jvp`, every tangent does.

    Gradients and tangents that may be differentiated again must come from `call`, `with_derivatives_of` or
    `refuse_double_backward`.

    Attributes:
        HIDDEN_RESULTS: how many of the last results of `forward` are for the backward alone: `call` does not return
            them.
        TANGENT_INPUTS: how many of the first inputs after `op` may have a tangent.
    """

    generate_vmap_rule = True
    HIDDEN_RESULTS = 0
    TANGENT_INPUTS = 0
    call: Callable[..., tuple[torch.Tensor, ...]]

    def __init_subclass__(cls) -> None:
        compute, setup_context, backward = cls.forward, cls.setup_context, cls.backward
        returned = -cls.HIDDEN_RESULTS or None
        jvp: Any = cls.__dict__.get("jvp")

        def forward(ctx: Any, *args: Any) -> Any:
            results = compute(*args)
            setup_context(ctx, args, results)
            return results[:returned]

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        form_with_ctx: Any = type(cls.__name__, (torch.autograd.Function,), methods)
        # A torch.compile around the transform sees only frames of Python here, and would trace the launchers.
        of_transforms: Any = cls
        of_transforms.forward = staticmethod(torch._disable_dynamo(compute))
        of_transforms.backward = staticmethod(torch._disable_dynamo(lambda ctx, *dy: backward(ctx, *dy[:returned])))
        if jvp is not None:

            def setup_both(ctx: Any, inputs: tuple[Any, ...], results: Any) -> None:
                setup_context(ctx, inputs, results)
                ctx.zeros_of_inputs = [_zeros_of(x) for x in inputs[1 : 1 + cls.TANGENT_INPUTS]]
                ctx.zeros_of_hidden = [_zeros_of(x) for x in results[len(results) - cls.HIDDEN_RESULTS :]]

            def tangents_of(ctx: Any, _: None, *tangents: Any) -> tuple[Any, ...]:
                given = (zeros() if t is None else t for t, zeros in zip(tangents, ctx.zeros_of_inputs, strict=False))
                return *jvp(ctx, *given), *(zeros() for zeros in ctx.zeros_of_hidden)

            of_transforms.setup_context = staticmethod(setup_both)
            of_transforms.jvp = staticmethod(torch._disable_dynamo(tangents_of))

        def call(op: str, *args: Any) -> tuple[torch.Tensor, ...]:
            if forward_ad._current_level >= 0 or functorch_is_active():
                if torch.compiler.is_dynamo_compiling():  # it would trace forward, and lose the gradient
                    torch._dynamo.graph_break()
                if jvp is None:
                    refuse_forward_mode(op, *args)
                else:
                    refuse_forward_mode(op, *args[cls.TANGENT_INPUTS :], of=" of cos and sin")
                return cls.apply(op, *args)[:returned]
            if torch.compiler.is_dynamo_compiling():
                if torch.compiler.is_exporting():  # the graph would call forward without gradients, and lose backward
                    return compute(op, *args)[:returned]
                args = _distinct(args)
            return form_with_ctx.apply(op, *args)

        cls.call = staticmethod(call)


def _zeros_of(x: Any) -> Callable[[], torch.Tensor | None]:
    """A function that makes zeros like x without keeping x alive. It returns None if x is not a tensor."""
    if not isinstance(x, torch.Tensor):
        return lambda: None
    return functools.partial(torch.zeros, x.shape, dtype=x.dtype, device=x.device)


def _distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args`, where a view replaces a tensor that comes a second time: torch.compile does not trace such a Function."""
    tensor = torch.Tensor
    return tuple(
        x.view_as(x) if isinstance(x, tensor) and any(x is y for y in args[:i]) else x for i, x in enumerate(args)
    )


# --- derivatives that are refused ------------------------------------------------------------------------------------


class _RefuseDerivatives(torch.autograd.Function):
    """The identity on gradients, connected to the tensors that they depend on. Differentiating it raises an error."""

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
    """The gradients `grads`. Differentiating them with respect to `inputs` raises a RuntimeError.

    torch's `once_differentiable` is not enough: where grad_output needs no gradient, as in y.sum(), the second
    derivative would be missing without an error.
    """
    if is_differentiated_again():
        return _RefuseDerivatives.apply(op, "", len(grads), *grads, *inputs)
    return tuple(grads)


def refuse_forward_mode(op: str, *args: Any, of: str = "") -> None:
    """Raise a RuntimeError if a tensor among `args` has a tangent: the op would not carry it on to its result.

    of: what these tensors are, for the error.
    """
    if forward_ad._current_level >= 0:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if tensors:
            _RefuseDerivatives.apply(op, of, len(tensors), *tensors)
