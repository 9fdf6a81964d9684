"""The launch cache with calls that differ in whatever may matter. Kernels are declared, not compiled."""

from __future__ import annotations

import contextlib
import struct
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from tests.contracts.launcher import cases, scenarios
from tests.contracts.launcher.mutants import MUTANTS, check_found
from tests.contracts.launcher.scenarios import SCENARIOS
from tests.contracts.launcher.substitute import called, kernels, on_stream, tensors_on

pytestmark = pytest.mark.usefixtures("declared")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_driver_receives_what_triton_would_send(scenario, comparisons):
    scenario(comparisons)
    comparisons.check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_fault_in_the_launch_cache_is_found(mutant):
    check_found(mutant)


def test_the_driver_records_the_call(comparisons):
    """All other checks compare such records."""
    x, z = scenarios.tensor(3, 4, dtype=torch.bfloat16), scenarios.tensor(4)
    with tensors_on(2), on_stream(2) as stream:
        scenarios.launcher(comparisons)(x, None, z, -0.5, 0)
    ((launched,),) = (each.cached for each in comparisons.made)
    where = (launched.device, launched.stream, launched.grid, launched.block, launched.name)
    assert where == (2, stream, "3,1,1", "32,1,1", "_kernel")
    # A stride of 1 is no parameter. The last two are scratch buffers, of which there are none.
    sent = [struct.pack("<Q", x.data_ptr()), struct.pack("<Q", z.data_ptr()), struct.pack("<i", 4)]
    sent += [struct.pack("<f", -0.5), bytes(8), bytes(8)]
    assert launched.parameters == tuple(each.hex() for each in sent)


def test_every_op_and_public_function_is_called(comparisons):
    called.clear()
    not_ops = {
        *("checked", "hopper_attention", "nn", "reference"),
        *("merge_attention", "rope_axes", "rope_frequencies", "rope_tables"),
    }
    with contextlib.ExitStack() as stack:
        functions = {name: mock.patch.object(lk, name, wraps=getattr(lk, name)) for name in set(lk.__all__) - not_ops}
        calls = {name: stack.enter_context(patched) for name, patched in functions.items()}
        for case in cases.PORTABLE.values():
            case()
    assert [name for name, call in calls.items() if not call.called] == []
    assert set(kernels) - called == set()
    launchers = {name for name in comparisons.launchers if "hopper" not in name}  # check_compiled.py has those
    assert launchers - {each.launcher for each in comparisons.made} == set()


def test_tuples_among_the_leaves_of_arguments_hold_integers(comparisons):
    """In a cache key 1, 1.0 and True are told apart, but not inside of tuples."""
    for case in cases.PORTABLE.values():
        case()
    inside = {(each.launcher, type(item)) for each in comparisons.made for item in _items_of_tuples(each.numbers)}
    assert {kind for _, kind in inside} <= {int, bool, type(None)}, inside


def _items_of_tuples(numbers):
    for x in numbers:
        if isinstance(x, tuple):
            yield from (item for item in x if not isinstance(item, tuple))
            yield from _items_of_tuples(x)
