"""The recorder of launches sees what is launched, by Triton and by its interpreter, and by the launch cache too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import llama_kernels as lk
from bench.attention_options import attention_options
from bench.measuring.kernels import has_tile, kernels_of
from llama_kernels.core import launch_cache
from llama_kernels.core.language import triton
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops import rms_norm
from llama_kernels.ops.attention import delta, dispatch, dkdv, dq, forward, hopper, rounding, tables
from tests.support.environment import compiles
from tests.support.launches import kernels_launched, names


@pytest.fixture
def driver_that_announces() -> Iterator[None]:
    """Launches do nothing but what Triton's launcher does first: call launch_enter_hook with the kernel's metadata."""
    from triton.runtime import driver

    from bench.host import LaunchingNothing

    class Announcing(LaunchingNothing):
        def launcher_cls(self, *_: Any) -> Callable[..., None]:
            return lambda x, y, z, stream, function, packed, metadata, enter, leave, *args: enter(metadata)

    def forget() -> None:
        """What Triton compiled for another driver."""
        launch_cache.clear()
        for module in (rms_norm, forward, delta, dkdv, dq, hopper.forward, hopper.backward, rounding):
            for kernel in vars(module).values():
                if isinstance(kernel, triton.runtime.JITFunction):
                    kernel.device_caches.clear()

    before = driver._active
    forget()
    driver.set_active(Announcing("sm_90"))
    yield
    driver._active = before
    forget()


@compiles
def test_compiled_kernels_are_recorded(driver_that_announces):
    """The third launch of one cache key is the launch cache's."""
    x, tile = torch.zeros(40, 256, dtype=torch.float16), rms_norm.row_tile("forward", 256)
    with kernels_launched() as launches:
        for _ in range(3):
            KERNELS["rms_norm_forward"](x, None, None, 1e-6, 0.0)
    assert [launched.name for launched in launches] == ["_rms_norm_forward_kernel"] * 3
    for launched in launches:
        options = launched.options
        assert (options["BLOCK_R"], options["BLOCK_N"], options["num_warps"]) == (tile.BLOCK_R, tile.BLOCK_N, 4)
    KERNELS["rms_norm_forward"](x, None, None, 1e-6, 0.0)
    assert len(launches) == 3  # nothing is recorded afterwards


@compiles
def test_a_record_names_each_kernel_with_its_tile(driver_that_announces):
    x, tile = torch.zeros(40, 256, dtype=torch.float16), rms_norm.row_tile("forward", 256)
    options = tile.options(256, x.device)
    (kernel,) = kernels_of(lambda: KERNELS["rms_norm_forward"](x, None, None, 1e-6, 0.0))
    assert kernel == "rms_norm_forward_kernel: BLOCK_R 16, BLOCK_N 256, 4 warps, 3 stages"
    del options["N"]
    assert has_tile(kernel, {**options, "num_stages": 3})
    assert not any(has_tile(kernel, {**options, "num_stages": 3, name: 2}) for name in (*options, "num_stages"))


@compiles
def test_the_hopper_kernels_are_recorded_where_they_are_launched(driver_that_announces, monkeypatch):
    """And the portable ones where those are launched in their place."""
    for module in (dispatch, tables):
        monkeypatch.setattr(module, "arch_of", lambda _: "sm_90")
    q, k, v = (torch.zeros(2, 32, H, 64, dtype=torch.bfloat16).transpose(1, 2) for H in (4, 2, 2))
    call = attention_options(32, 32, 0.125)
    ran = {}
    with lk.hopper_attention():
        for deterministic in (False, True):
            with kernels_launched() as launches:
                out, lse = KERNELS["attention_forward"](q, k, v, *call)
                KERNELS["attention_backward"](q, None, q, k, v, out, lse, *call, True, True, True, False, deterministic)
            ran[deterministic] = names(launches)
    assert ran[False] == ["_hopper_forward_kernel", "_delta_kernel", "_hopper_backward_kernel", "_round_sum_kernel"]
    assert ran[True] == ["_hopper_forward_kernel", "_dq_kernel", "_dkdv_kernel"]


@pytest.mark.interpreter
def test_interpreted_kernels_are_recorded():
    q, k, v = (torch.randn(1, H, S, 16).half() for H, S in ((2, 3), (1, 300), (1, 300)))
    with kernels_launched() as outer:
        lk.attention(q, k, v)
        with kernels_launched() as inner:
            lk.rms_norm(q)
    assert names(outer) == ["_decode_kernel", "_combine_kernel", "_rms_norm_forward_kernel"]
    assert [launched.name for launched in inner] == names(outer)[2:]
    assert outer[0].options["num_warps"] == 4 and outer[0].options["D"] == 16
