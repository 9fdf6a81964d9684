"""The types of the package: `make typecheck` passes, and every public function has its types."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import llama_kernels as lk

ROOT = Path(lk.__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_the_package_and_the_code_of_a_user_type_check():
    done = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in lk.__all__ if inspect.isfunction(getattr(lk, name))])
def test_every_public_function_has_its_types(name):
    """Those of ops/ too, where mypy allows functions without types: kernels and their launchers."""
    function = getattr(lk, name)
    signature = inspect.signature(function)
    untyped = [str(x) for x in signature.parameters.values() if x.annotation is x.empty]
    assert not untyped and signature.return_annotation is not signature.empty
