"""The launch cache over everything that may tell two calls apart, kernels being declared in place of compiled."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest

import llama_kernels as lk
from tests.launcher import cases
from tests.launcher.mutants import MUTANTS, check_found
from tests.launcher.scenarios import SCENARIOS
from tests.launcher.substitute import called, kernels

pytestmark = pytest.mark.usefixtures("declared")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_driver_receives_what_triton_would_send(scenario, comparisons):
    scenario(comparisons)
    comparisons.check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_fault_in_the_launch_cache_is_found(mutant):
    check_found(mutant)


def test_every_op_and_public_function_is_called(comparisons):
    called.clear()
    not_ops = {"checked", "hopper_attention", "nn", "reference", "rope_frequencies", "rope_tables"}
    with contextlib.ExitStack() as stack:
        functions = {name: mock.patch.object(lk, name, wraps=getattr(lk, name)) for name in set(lk.__all__) - not_ops}
        calls = {name: stack.enter_context(patched) for name, patched in functions.items()}
        for case in cases.PORTABLE:
            case()
    assert [name for name, call in calls.items() if not call.called] == []
    assert set(kernels) - called == set()
    launchers = {name for name in comparisons.launchers if "hopper" not in name}  # check_compiled.py has those
    assert launchers - {each.launcher for each in comparisons.made} == set()
