"""A fixture that records what is launched, in a process without a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from llama_kernels.core import launch_cache
from llama_kernels.core.language import tl, triton
from llama_kernels.ops import qk_norm_rope, rms_norm, rope
from llama_kernels.ops.attention import decode, delta, dkdv, dq, forward
from llama_kernels.ops.attention.hopper import backward as hopper_backward
from llama_kernels.ops.attention.hopper import forward as hopper_forward
from llama_kernels.ops.attention.hopper import round_dq


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
    """Triton's own cache too: what it compiled launches by the driver of then."""
    launch_cache.forget()
    for module in (
        rope, rms_norm, qk_norm_rope, forward, delta, dkdv, dq, decode, hopper_forward, hopper_backward, round_dq
    ):  # fmt: skip
        for x in vars(module).values():
            if isinstance(x, triton.runtime.JITFunction):
                x.device_caches.clear()
    from llama_kernels.ops import partials

    partials._sum_partials_kernel.device_caches.clear()
    _twice_kernel.device_caches.clear()


# --- a kernel of the tests' own --------------------------------------------------------------------------------------


@triton.jit
def _twice_kernel(x_ptr, y_ptr, stride, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i * stride, 2 * scale * tl.load(x_ptr + i * stride))
