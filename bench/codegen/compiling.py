"""Calls compiled without a GPU, under a driver that stands in for that of a target.

Triton specialises and compiles just what it would on the target, and the launch is dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from llama_kernels.core import device
from llama_kernels.ops.attention import tables

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a launcher. `label` names the shape and the options."""

    op: str
    label: str
    launch: Callable[[], Any]
    full: bool = False  # only with --full
    only: str | None = None  # a target; None: all
    ones: bool = False  # with sizes of 1: it must compile and fit; how fast such code is does not matter


class StandInDriver:
    """What Triton asks of a driver before it compiles. Each target is a device of its own to Triton's caches."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._name]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_case(name: str, case: Case) -> list[tuple[str, Any]]:
    """The kernels that `case` launches on target `name`: (kernel name, triton's CompiledKernel)."""
    compiled = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.__name__.strip("_"), run(self, *args, grid=grid, warmup=True, **kwargs)))

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tables, "arch_of", lambda _: name),
        mock.patch.object(device, "arch_of", lambda _: name),
    ):
        driver.set_active(StandInDriver(name))
        case.launch()
    return compiled
