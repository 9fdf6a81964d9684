"""Parity holds with the documented errors of a GPU's instructions, which the interpreter makes here.

`pytest --hardware-errors high` (or low, mixed) runs any test with them.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from tests.support import attention as attention_cases
from tests.support import decode as decode_cases
from tests.support import ideal
from tests.support import qk_norm_rope as qk_norm_rope_cases
from tests.support import rms_norm as rms_norm_cases
from tests.support import rope as rope_cases
from tests.support import rope_attention as rope_attention_cases
from tests.support.attention import Case, packed
from tests.support.hardware import DRAWS, ERRORS, EXACT, Arithmetic, in_more_orders, interpreted

CPU = torch.device("cpu")


# --- the errors themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ERRORS.values(), ids=ERRORS)
def test_errors_are_as_large_as_documented_and_no_larger(arithmetic):
    x, y = 20 * torch.randn(20_000), 3 * torch.rand(20_000) + 1e-3
    e = torch.exp2(x.double())
    ulp = torch.exp2(torch.frexp(x.double() / y.double())[1].double() - 24)
    log = torch.log2(y.double())
    relative = {
        "exp2": (arithmetic.exp2(x).double() - e) / e * 2**22,
        "log2": (arithmetic.log2(y).double() - log) / torch.where((y > 0.5) & (y < 2), 1, log.abs()) * 2**22,
        "rsqrt": (arithmetic.rsqrt(y).double() * y.double().sqrt() - 1) * 2**22.9,
        "divide": (arithmetic.divide(x, y).double() - x.double() / y.double()) / (2 * ulp),
    }
    for name, error in relative.items():
        assert 0.95 < error.abs().max() <= 1 + 1e-6, name
        sides = {"high": (True, False), "low": (False, True), "mixed": (True, True)}[arithmetic.error]
        assert (error.max() > 0.9, error.min() < -0.9) == (sides if name != "divide" else sides[::-1]), name


@pytest.mark.parametrize("arithmetic", DRAWS, ids=lambda a: a.error)
def test_values_that_are_documented_to_be_exact(arithmetic):
    inf, nan = torch.inf, torch.nan

    def agree(found: torch.Tensor, wanted: list[float]) -> None:
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=0, equal_nan=True)

    agree(arithmetic.exp2(torch.tensor([0.0, -0.0, -inf, inf, nan])), [1.0, 1.0, 0.0, inf, nan])
    agree(arithmetic.log2(torch.tensor([0.0, inf, -1.0])), [-inf, inf, nan])
    agree(arithmetic.rsqrt(torch.tensor([0.0, inf])), [inf, 0.0])
    agree(arithmetic.divide(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([3.0, 0.0, inf])), [0.0, inf, 0.0])
    if arithmetic is not EXACT:  # subnormal numbers count as 0
        agree(arithmetic.exp2(torch.tensor([1e-40, -140.0])), [1.0, 0.0])
        agree(arithmetic.log2(torch.tensor([1e-40])), [-inf])
        agree(arithmetic.rsqrt(torch.tensor([1e-40])), [inf])


# --- the kernels with them -------------------------------------------------------------------------------------------


def attention() -> None:
    attention_cases.check(Case(1, 2, 1, 40, 70, 32, 32, sinks=True), torch.float32, CPU)
    attention_cases.check(Case(1, 2, 1, 40, 70, 32, 32, softcap=3.0), torch.float32, CPU)
    attention_cases.check(packed((20, 30), (40, 20), 2, 1, 16, 16, window_size=(9, 3)), torch.bfloat16, CPU)


def attention_beside_eager() -> None:
    attention_cases.check_never_worse_than_eager(torch.float32, CPU)


def rope_attention() -> None:
    rope_attention_cases.check(rope_attention_cases.square(50, 32), torch.float32, CPU)


def decoding() -> None:
    for case in decode_cases.CASES[:2]:
        decode_cases.check(case, torch.float32, CPU)


def norm() -> None:
    for residual in (False, True):
        rms_norm_cases.check((70, 96), torch.float32, CPU, residual=residual, eager=not residual)
    rms_norm_cases.check((5, 1), torch.float32, CPU)


def norm_of_heads() -> None:
    for eager in (False, True):
        q, k = rope_cases.qk(2, 4, 2, 20, 64, torch.float32, CPU)
        given = (*qk_norm_rope_cases.weights(64, q.dtype, CPU), *rope_cases.tables(20, 64, CPU))
        qk_norm_rope_cases.check(q, k, *given, eager=eager)


CHECKS = (attention, attention_beside_eager, rope_attention, decoding, norm, norm_of_heads)


@pytest.mark.interpreter
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_parity_holds_with_the_errors_of_hardware(check: Callable[[], None], error):
    with interpreted(ERRORS[error]):
        check()


@pytest.mark.interpreter
def test_the_errors_reach_the_kernels():
    """The results of each op differ by them, but no more than by a few units in the last place."""
    x, (q, k, v) = torch.randn(8, 64), (torch.randn(1, 2, 20, 16) for _ in range(3))
    for op in (lambda: lk.rms_norm(x), lambda: lk.attention(q, k, v), lambda: lk.attention(q, k, v, softcap=2.0)):
        found = []
        for arithmetic in (EXACT, ERRORS["high"], ERRORS["mixed"]):
            with interpreted(arithmetic):
                found.append(op())
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("check", [decoding, norm, norm_of_heads], ids=lambda f: f.__name__)
def test_an_ideal_that_rounds_to_nearest_is_no_bound_for_hardware(check):
    """Without the errors in its ideal, the judge rejects kernels that are right."""
    rejected = pytest.raises(AssertionError, match=r"largest error|relative error")
    with interpreted(ERRORS["high"]), mock.patch.object(ideal, "DRAWS", [EXACT]), rejected:
        check()


def test_the_same_number_has_the_same_error():
    """As in hardware; and a factor of four, which changes no digit of 1 / sqrt(x), changes none of its error."""
    x, arithmetic = torch.rand(1000) + 0.1, Arithmetic("mixed")
    assert torch.equal(arithmetic.rsqrt(x), arithmetic.rsqrt(x.flip(0)).flip(0))
    assert torch.equal(arithmetic.rsqrt(16 * x) * 4, arithmetic.rsqrt(x))
    assert not torch.equal(arithmetic.exp2(x), Arithmetic("mixed", seed=1).exp2(x))


def test_sums_in_eight_orders_bound_a_sum_in_any_other_order():
    """Of the first row of causal attention: dp less delta, which are one sum of D terms in two orders."""
    do, v = torch.randn(2, 1000, 256).unbind()

    def error(order: int) -> torch.Tensor:
        dp = ideal.term_after_term(do[:, None], v[..., None], order).flatten()
        return (dp.double() - (do * v).sum(-1)).abs()

    def exceeded(draws: tuple[Arithmetic, ...]) -> int:
        bound = torch.stack([error(draw.order) for draw in draws]).amax(0)
        return int((error(order=100) > 4 * bound + 2 * torch.finfo(torch.float32).eps * 16).sum())

    draws = in_more_orders(DRAWS)
    assert [draw.order for draw in draws] == list(range(8))
    assert exceeded(draws) <= 2
    assert exceeded((EXACT,)) > 20  # one order, whose error may be close to zero
