"""Planted mistakes: a function of a kernel is replaced by a wrong one, which a check must catch. In the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def check_catches(check: Callable[[], None], modules: tuple[Any, ...], name: str, mutant: Any) -> None:
    """`check` passes, fails where `mutant` stands for the function `name` of `modules`, and passes again."""
    check()
    with planted(modules, name, mutant), pytest.raises(AssertionError):
        check()
    check()


@contextlib.contextmanager
def planted(modules: tuple[Any, ...], name: str, mutant: Any) -> Iterator[None]:
    """The interpreter resolves a kernel's names once and remembers: forget before and after."""
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, name, mutant)
        InterpretedFunction.rewritten_fn.clear()
        yield
    InterpretedFunction.rewritten_fn.clear()
