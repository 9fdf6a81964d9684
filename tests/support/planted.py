"""Mutants: a function of a kernel is replaced by a wrong one, and a check must fail. In Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

_passed: set[Callable[[], None]] = set()  # checks that pass without a mutant, so far in this process


def check_catches(check: Callable[[], None], modules: tuple[Any, ...], name: str, mutant: Any) -> None:
    """Raise unless `check` passes, and fails while `mutant` stands for the function `name` of `modules`.

    Both runs have the same random numbers. Mutants that share a check share the run without a mutant.
    """
    if check not in _passed:
        torch.manual_seed(0)
        check()
        _passed.add(check)
    torch.manual_seed(0)
    with planted(modules, name, mutant), pytest.raises(AssertionError):
        check()


@contextlib.contextmanager
def planted(modules: tuple[Any, ...], name: str, mutant: Any) -> Iterator[None]:
    """Inside, `mutant` stands for the function `name` of `modules`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, name, mutant)
        yield
