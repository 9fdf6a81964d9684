"""Derivatives of gradients and tangents that a kernel computed, by plain PyTorch: of any order, in either mode.

A kernel computes the first derivative of an op. `with_derivatives_of` connects it to a function in plain PyTorch with
the same results, which autograd differentiates for the second derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama_kernels.core.autograd import is_differentiated_again, save


def with_derivatives_of(
    function: Callable[..., tuple[torch.Tensor | None, ...]],
    results: Sequence[torch.Tensor | None],
    inputs: Sequence[torch.Tensor | None],
    constants: Sequence[torch.Tensor | None] = (),
) -> tuple[torch.Tensor | None, ...]:
    """`results`, gradients or tangents that a kernel computed from `inputs`, with the derivatives of `function`.

    function: computes `results` in plain PyTorch. It takes `constants` as one tuple, then `inputs`.
    """
    if not is_differentiated_again():
        return tuple(results)
    given = [x is not None for x in inputs]
    wanted = [x is not None for x in results]

    def of_given(constants: tuple[torch.Tensor | None, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        each = iter(tensors)
        computed = function(constants, *(next(each) if there else None for there in given))
        return tuple(y for y, there in zip(computed, wanted, strict=True) if there and y is not None)

    kept_results, kept_inputs = ([x for x in tensors if x is not None] for tensors in (results, inputs))
    tied = iter(_DerivativesOf.apply(of_given, sum(wanted), len(constants), *kept_results, *constants, *kept_inputs))
    return tuple(next(tied) if there else None for there in wanted)


def results_and_pullback(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Callable[..., Any]]:
    """torch.func.vjp without has_aux, with a type that mypy can use."""
    made: Any = torch.func.vjp(function, *inputs)
    return made


def pushforward(
    function: Callable[..., tuple[torch.Tensor, ...]], inputs: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The tangents of `function(*inputs)`, as torch.func.jvp computes them.

    torch.func.jvp cannot run inside of a dual_level. This is the transpose of the pullback, a linear function.
    """
    results, pullback = results_and_pullback(function, *inputs)
    _, transpose = results_and_pullback(pullback, tuple(map(torch.zeros_like, results)))
    (pushed,) = transpose(tuple(tangents))
    return pushed


class _DerivativesOf(torch.autograd.Function):
    """The identity on results, with the derivatives of a function in plain PyTorch that gives the same results.

    It takes the function, the number of results and of constants, then results, constants and inputs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        function: Callable[..., Any], results: int, constants: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:results])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, ctx.results, ctx.constants, *tensors = inputs
        ctx.dtypes = [x.dtype for x in output]
        save(ctx, *tensors[ctx.results :])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        function, inputs = _DerivativesOf._of_inputs(ctx)
        results, pullback = results_and_pullback(function, *inputs)
        grads = pullback(tuple(g.to(y.dtype) for g, y in zip(cotangents, results, strict=True)))
        return *[None] * (3 + ctx.results + ctx.constants), *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        function, inputs = _DerivativesOf._of_inputs(ctx)
        results = pushforward(function, inputs, tangents[len(tangents) - len(inputs) :])
        return tuple(y.to(dtype) for y, dtype in zip(results, ctx.dtypes, strict=True))

    @staticmethod
    def _of_inputs(ctx: Any) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
        saved = ctx.saved_tensors
        return functools.partial(ctx.function, saved[: ctx.constants]), saved[ctx.constants :]
