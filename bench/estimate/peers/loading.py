"""Modules of others, imported from a folder one by one, as on a machine with the GPU that is meant.

A peer's package is not imported: its __init__ would want a GPU, and packages that are not here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.codegen.compiling import StandInDriver

_PROPERTIES = types.SimpleNamespace(
    warp_size=32, max_threads_per_block=1024, multi_processor_count=132, name="NVIDIA H100", major=9, minor=0,
    total_memory=80 << 30, shared_memory_per_block_optin=227 * 1024, regs_per_multiprocessor=65536,
)  # fmt: skip


class Missing(Exception):
    """The folder has no such peer, or one that is not as these calls know it."""


def found(folder: Path, ending: str) -> Path:
    """The one file below `folder` whose path ends so; of several, the first.

    Raises:
        Missing: there is none.
    """
    name = ending.rpartition("/")[2]
    paths = sorted(path for path in folder.rglob(name) if path.as_posix().endswith(ending))
    if not paths:
        raise Missing(f"no {ending} below {folder}")
    return paths[0]


@functools.cache
def module(path: Path, name: str) -> types.ModuleType:
    """The module at `path`, as `name`. Packages above it are empty, and find their other modules in their folders.

    Raises:
        Missing: it cannot be imported here.
    """
    packages = name.split(".")[:-1]
    for depth in range(1, len(packages) + 1):
        package = ".".join(packages[:depth])
        if package not in sys.modules:
            empty = types.ModuleType(package)
            empty.__path__ = [str(path.parents[len(packages) - depth])]
            empty.__version__ = "0"  # type: ignore[attr-defined]
            sys.modules[package] = empty
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    with _a_gpu():
        try:
            spec.loader.exec_module(made)
        except Exception as error:
            del sys.modules[name]
            raise Missing(f"{path} cannot be imported here: {type(error).__name__}: {error}") from error
    return made


def stand_in(name: str, **attributes: Any) -> None:
    """A module with nothing but `attributes`, in place of one that cannot be imported here."""
    made = types.ModuleType(name)
    made.__path__ = []
    made.__dict__.update(attributes)
    sys.modules[name] = made


@contextmanager
def _a_gpu() -> Iterator[None]:
    driver.set_active(StandInDriver("sm_90"))
    with ExitStack() as stack:
        for where, value in (
            ("current_device", lambda: 0), ("get_device_properties", lambda *_: _PROPERTIES),
            ("get_device_capability", lambda *_: (9, 0)), ("device_count", lambda: 1),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, where, value))
        yield


def jitted(function: Any) -> JITFunction:
    """Without its autotuner and heuristics."""
    while not isinstance(function, JITFunction):
        function = function.fn
    return function
