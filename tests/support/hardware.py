"""The errors that a GPU's approximate float32 instructions may make, as the PTX ISA documents them.

On a GPU, Triton computes tl.exp2, tl.log2, tl.rsqrt and the division of float32 by approximate instructions. Its
interpreter computes them with NumPy, to the nearest float32. A bound that only NumPy keeps is no bound for a GPU, so

- the judge's ideal uses the functions below: no kernel can be expected to be more accurate than its instructions;
- `interpreted` makes the interpreter use them, which shows that the tests hold for such results.

    ex2.approx.ftz.f32      relative error up to 2^-22; exactly 1 for 0
    lg2.approx.ftz.f32      error up to 2^-22 where 0.5 < x < 2; elsewhere relative error up to 2^-22
    rsqrt.approx.ftz.f32    relative error up to 2^-22.9
    div.full.f32            up to 2 units in the last place

With .ftz, subnormal numbers count as 0, as inputs and as results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

_SMALLEST = torch.finfo(torch.float32).tiny  # smaller numbers are subnormal
_NEAR = 0.25  # from there on, (1 - e) / (1 + e) is accurate: below, it cancels


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """exp2, log2, rsqrt, division and tanh of float32 tensors.

    `error` says by how much they are off: "none" (rounded to nearest), "high" or "low" (the whole documented error,
    upwards or downwards; the other way in divisions, since errors of one sign cancel in 1 / sqrt(sum / N)), or "mixed"
    (the whole error, upwards or downwards as the bits of the number decide, in another way for each `seed`). As in
    hardware, the same input always gives the same result.

    `above` is no error. A softmax takes exp2 of scores less their peak, rounds, and divides by the sum: any peak gives
    the same quotient, but other roundings. A kernel has the peak of the blocks seen so far, which rises on the way; the
    ideal has the last one, raised by `above`, at least 0 and less than 1.

    Nor is `order`: in which order a product adds its terms up, if it adds one after another. 0 is that of memory.
    """

    error: str = "none"
    seed: int = 0
    above: float = 0.0
    order: int = 0

    def exp2(self, x: torch.Tensor) -> torch.Tensor:
        if self.error == "none":
            return torch.exp2(x)
        exact = torch.exp2(x.double())
        y = self._off(exact, exact * 2**-22, exact)
        return torch.where(x.abs() < _SMALLEST, torch.ones_like(x), _flushed(y))

    def log2(self, x: torch.Tensor) -> torch.Tensor:
        if self.error == "none":
            return torch.log2(x)
        exact = torch.log2(_flushed(x).double())
        near_one = (x > 0.5) & (x < 2)
        return self._off(exact, torch.where(near_one, torch.ones_like(exact), exact.abs()) * 2**-22, x)

    def rsqrt(self, x: torch.Tensor) -> torch.Tensor:
        if self.error == "none":
            return torch.rsqrt(x)
        exact = torch.rsqrt(_flushed(x).double())
        return self._off(exact, exact * 2**-22.9, exact)

    def inverse_root(self, x: torch.Tensor) -> torch.Tensor:
        """1 / sqrt(x) as the kernels take it (language.inverse_root): by rsqrt, of x scaled where it is small."""
        small = x < 2.0**-100
        root = self.rsqrt(torch.where(small, x * 2.0**48, x))
        return torch.where(small, root * 2.0**24, root)

    def divide(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.error == "none":
            return a / b
        exact = a.double() / b.double()
        _, exponent = torch.frexp(exact)
        two_ulps = torch.where(exact == 0, 0.0, torch.exp2(exponent.double() - 23))
        return self._off(exact, two_ulps, exact, up="low")

    def tanh(self, x: torch.Tensor) -> torch.Tensor:
        """By exp2 and a division: there is no accurate instruction for it."""
        if self.error == "none":
            return torch.tanh(x)
        e = self.exp2(x.abs() * (-2 * math.log2(math.e)))
        far = torch.copysign(self.divide(1 - e, 1 + e), x)
        return torch.where(x.abs() < _NEAR, torch.tanh(x), far)

    def _off(self, exact: torch.Tensor, error: torch.Tensor, by: torch.Tensor, up: str = "high") -> torch.Tensor:
        """The float32 that is furthest from the float64 `exact` of those within `error` on one side: above, if
        self.error is `up`. Where errors are mixed, the bits of `by` choose the side."""
        if self.error == "mixed":  # without the exponent, so that a power of two as a factor changes no error
            bits = by.float().contiguous().view(torch.int32).long() & 0x7FFFFF
            side = 1 - 2 * ((((bits + self.seed * 7919) * 2654435761) >> 17) & 1)
        else:
            side = 1 if self.error == up else -1
        limit = torch.where(exact.isfinite(), exact + side * error, exact)
        y = limit.float()
        return torch.where((y.double() - limit) * side > 0, torch.nextafter(y, exact.float()), y)


def _flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < _SMALLEST, torch.zeros_like(x), x)


EXACT = Arithmetic()
# What the kernels run with in `interpreted`, and what the ideal is drawn with: not the same mixed errors.
ERRORS = {error: Arithmetic(error, seed=1) for error in ("high", "low", "mixed")}
DRAWS = (
    EXACT,
    Arithmetic("high", above=0.25, order=1),
    Arithmetic("low", above=0.5, order=2),
    Arithmetic("mixed", seed=2, above=0.75, order=3),
)


def in_more_orders(draws: tuple[Arithmetic, ...]) -> tuple[Arithmetic, ...]:
    """Each of `draws` in two orders, for products that add one term after another.

    In the first row of causal attention, dq is the rounding error of one sum of D terms less another of the same terms.
    The largest of four such errors is close to zero by chance too often to bound a fifth.
    """
    return *draws, *(dataclasses.replace(draw, order=draw.order + len(draws)) for draw in draws)


@contextlib.contextmanager
def interpreted(arithmetic: Arithmetic) -> Iterator[None]:
    """Inside, Triton's interpreter computes by `arithmetic`."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def of_handles(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        def compute(_: Any, *handles: Any) -> Any:
            arrays = [np.asarray(handle.data) for handle in handles]
            assert all(array.dtype == np.float32 for array in arrays), "these instructions are of float32"
            result = function(*(torch.from_numpy(array.copy()) for array in arrays))
            return TensorHandle(result.numpy(), handles[0].dtype.scalar)

        return compute

    with mock.patch.multiple(
        InterpreterBuilder,
        create_exp2=of_handles(arithmetic.exp2),
        create_log2=of_handles(arithmetic.log2),
        create_rsqrt=of_handles(arithmetic.rsqrt),
        create_fdiv=of_handles(arithmetic.divide),
    ):
        yield
