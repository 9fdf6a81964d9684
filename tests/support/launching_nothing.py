"""A fixture that records what is launched, in a process without a GPU."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest

from llama_kernels import ops
from llama_kernels.core import launch_cache
from llama_kernels.core.language import tl, triton


@pytest.fixture
def launched() -> Iterator[list[tuple[Any, ...]]]:
    """What reaches Triton's launcher: grid, stream, function, metadata, hooks, arguments. Nothing is cached before."""
    from triton.runtime import driver

    from bench.host import LaunchingNothing

    class Recording(LaunchingNothing):
        def launcher_cls(self, *_: Any) -> Any:
            return lambda *args: reached.append(args)

    reached: list[tuple[Any, ...]] = []
    before = driver._active
    driver.set_active(Recording("sm_90"))
    _forget_kernels()
    try:
        yield reached
    finally:
        _forget_kernels()
        gc.collect()  # the kernels, whose driver is asked to unload them
        driver._active = before


def _forget_kernels() -> None:
    """Triton's cache too, whose kernels are launched by the driver that they were compiled for."""
    launch_cache.clear()
    for kernel in (*kernels(), _twice_kernel):
        kernel.device_caches.clear()


def kernels() -> list[Any]:
    """Every kernel of the ops: the functions of their modules whose names end in _kernel."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(ops.__path__, "llama_kernels.ops.")]
    return [x for module in modules for name, x in vars(module).items() if re.fullmatch(r"_\w+_kernel", name)]


# --- a kernel of the tests' own --------------------------------------------------------------------------------------


@triton.jit
def _twice_kernel(x_ptr, y_ptr, stride, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i * stride, 2 * scale * tl.load(x_ptr + i * stride))
