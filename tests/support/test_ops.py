"""The table of ops has every op."""

from __future__ import annotations

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core.registry import KERNELS
from tests.support.bad_inputs import TYPE_ERRORS, VALUE_ERRORS
from tests.support.ops import OPS, Make, Shape, registered_calls

pytestmark = pytest.mark.once


def test_every_public_op_has_a_row():
    assert set(OPS) == set(lk.reference.__all__), "each op of the reference needs a row of OPS in tests/support/ops.py"


def test_every_registered_op_has_a_call():
    assert {op for op, _ in registered_calls(Shape(), Make()).values()} == set(KERNELS), (
        "each registered op needs a call in registered_calls of tests/support/ops.py"
    )


def test_every_op_has_bad_inputs():
    assert {op for op, *_ in (*VALUE_ERRORS, *TYPE_ERRORS)} == set(OPS), "tests/support/bad_inputs.py"


@pytest.mark.parametrize("op", OPS)
def test_the_reference_takes_the_sample_arguments(op):
    row = OPS[op]
    arguments = row.arguments(Shape(), Make())
    getattr(lk.reference, op)(**{**arguments, **row.options(Shape(), Make())})
    assert all(isinstance(arguments[name], torch.Tensor) for name in (*row.tensors, *row.written))
