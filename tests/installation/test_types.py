"""Type annotations: `make typecheck` passes, and every public function is annotated."""

from __future__ import annotations

import importlib.util
import inspect

import pytest

import llama_kernels as lk
from tests.support.processes import python


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_the_package_and_a_users_code_pass_mypy():
    done = python("-m", "mypy")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in lk.__all__ if inspect.isfunction(getattr(lk, name))])
def test_every_public_function_is_annotated(name):
    """mypy does not ask for it in ops/, where kernels and launchers have no annotations."""
    function = getattr(lk, name)
    signature = inspect.signature(function)
    untyped = [str(x) for x in signature.parameters.values() if x.annotation is x.empty]
    assert not untyped and signature.return_annotation is not signature.empty
