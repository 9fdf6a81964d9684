"""Fixtures of the checks, which run in a process of their own (see test_launcher.py)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.contracts.launcher.scenarios")


@pytest.fixture
def comparisons() -> Iterator[Any]:
    """Every launch of the package is made twice, and what the driver received compared."""
    from tests.contracts.launcher.compare import Comparisons

    comparing = Comparisons()
    comparing.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that a kernel failed and another one was taken
        yield comparing
    comparing.remove()
    comparing.check()


@pytest.fixture
def declared() -> Iterator[None]:
    """Kernels are declared in place of compiled."""
    from tests.contracts.launcher.declared import declared_kernels

    with declared_kernels():
        yield
