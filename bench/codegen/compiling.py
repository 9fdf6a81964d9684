"""Compiles calls for a target without a GPU, under a stand-in driver.

Triton specialises and compiles exactly what it would on the target, and nothing is launched.
"""

from __future__ import annotations

import dataclasses
import re
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
    full: bool = False  # compiled only with --full
    only: str | None = None  # the one target to compile for; None: all
    wide: bool = False  # heads wider than 256, of which warps compute some scores more than once
    ones: bool = False  # has sizes of 1: it must compile and fit into shared memory, and may be slow

    @property
    def plain(self) -> bool:
        """Whether the label names sizes alone: half precision, and no option but causal."""
        return bool(re.fullmatch(r"[DN]=[\d/]+( R=\d+)?( heads=\S+)?( \w*float16 causal)?", self.label))


class StandInDriver:
    """Answers what Triton asks a driver before it compiles for a family of GPUs, or for the `target` of a GPU.

    Triton's caches in memory take each pair of arguments for another device.
    """

    def __init__(self, name: str, target: GPUTarget | None = None) -> None:
        self._target, self._device = target or TARGETS[name], (name, target)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> tuple[str, GPUTarget | None]:
        return self._device

    def get_current_stream(self, device: tuple[str, GPUTarget | None]) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_case(name: str, case: Case) -> list[tuple[str, Any]]:
    """Compile the kernels that `case` launches on target `name`: (kernel name, triton.CompiledKernel)."""
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
