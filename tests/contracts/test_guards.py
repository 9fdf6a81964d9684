"""The guards of tests/support/guards.py surround what the ops allocate, and show a write out of bounds."""

from __future__ import annotations

import pytest
import torch

import llama_kernels as lk
from tests.support.guards import guarded_allocations
from tests.support.launches import KERNELS_RUN
from tests.support.ops import OPS, Make, Shape


@pytest.mark.skipif(not KERNELS_RUN, reason="CPU tensors return what kernels of PyTorch have allocated")
@pytest.mark.parametrize("op", OPS)
def test_results_are_allocated_between_guards(op, device):
    with guarded_allocations():
        results = getattr(lk, op)(**OPS[op].arguments(Shape(), Make(device)))
    first = results if isinstance(results, torch.Tensor) else results[0]
    assert first.untyped_storage().size() // first.element_size() > first.numel()
    assert first.storage_offset() > 0


@pytest.mark.parametrize("allocate", [lambda x: x.new_empty(4), lambda x: x.new_empty_strided((4,), (1,))])
@pytest.mark.parametrize("outside", [-1, 4])
def test_a_write_outside_of_an_allocation_is_an_error(allocate, outside):
    with pytest.raises(AssertionError, match="written outside"), guarded_allocations():
        y = allocate(torch.zeros(1))
        y.as_strided((1,), (1,), y.storage_offset() + outside).fill_(1.0)
