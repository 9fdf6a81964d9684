"""Any Triton kernel compiled for a GPU that is not there, with what the models need of it.

`compiled(family, call)` runs `call` under the driver of the compile gate: each launch is specialised and compiled just
as on a GPU of that family, and dropped. It takes our launchers and anybody else's (call the JITFunction, not its
autotuner). Attention takes the portable kernels unless the caller asks for the Hopper kernels, whichever of them the
installed release of Triton uses by default.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.codegen import sass
from bench.codegen.compiling import StandInDriver
from bench.estimate.constants import Gpu, gpu_of
from bench.estimate.sm.code import Code, parsed
from llama_kernels import hopper_attention
from llama_kernels.core import device, launch_cache
from llama_kernels.ops import qk_norm_rope, rms_norm
from llama_kernels.ops.attention import dispatch, tables
from llama_kernels.ops.attention.hopper import switch

_SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # of an SM; a program has 1 KiB more than it asks for
_WARPS, _PROGRAMS = 64, 32  # that fit on an SM at most


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """One compiled launch."""

    name: str  # of the function, without leading underscores
    family: str
    grid: tuple[int, ...]
    warps: int
    registers: int  # a thread
    spill: int  # bytes a thread
    shared: int  # bytes a program
    constants: dict[str, Any]  # compile-time arguments by name
    code: Code

    @property
    def launched(self) -> int:
        """Programs."""
        return math.prod(self.grid)

    @property
    def resident(self) -> int:
        """Programs that fit on an SM."""
        a_warp = math.ceil(max(self.registers, 24) * 32 / 256) * 256
        by_registers = 65536 // 4 // a_warp * 4 // self.warps
        by_shared = _SHARED_KIB[self.family] * 1024 // (self.shared + 1024)
        return max(min(by_registers, by_shared, _WARPS // self.warps, _PROGRAMS), 1)

    @property
    def specialised(self) -> bool:
        """Whether warp groups have code of their own: two that multiply, and warps that copy."""
        return self.name.startswith("hopper_")

    @property
    def tile(self) -> tuple[int, int]:
        """BLOCK_M and BLOCK_N of an attention kernel. The Hopper kernels fix one of them."""
        fixed = {"hopper_forward_kernel": {"BLOCK_M": 128}, "hopper_backward_kernel": {"BLOCK_M": 64, "BLOCK_N": 128}}
        known = fixed.get(self.name, {}) | self.constants
        return known["BLOCK_M"], known["BLOCK_N"]


def compiled(family: str, call: Callable[[], Any], gpu: Gpu | None = None, hopper: bool = False) -> list[Kernel]:
    """The kernels that `call` launches, in order. hopper: attention takes the Hopper kernels, where they compute it."""
    found: list[Kernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made = run(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        found.append(_kernel(self.__name__.strip("_"), family, grid(given) if callable(grid) else grid, made))

    with _on(gpu or gpu_of(family)), _attention_kernels(hopper), mock.patch.object(JITFunction, "run", compile_only):
        call()
    return found


@contextmanager
def _on(gpu: Gpu) -> Iterator[None]:
    """Our launchers choose their tiles, and how many programs they launch, as on `gpu`."""
    with ExitStack() as stack:
        for module in (tables, device, dispatch):
            stack.enter_context(mock.patch.object(module, "arch_of", lambda _: gpu.family))
        for module in (rms_norm, qk_norm_rope):
            stack.enter_context(mock.patch.object(module, "processors_of", lambda _: gpu.sms))
        driver.set_active(StandInDriver(gpu.family))
        launch_cache.clear()
        yield
        launch_cache.clear()


@contextmanager
def _attention_kernels(hopper: bool) -> Iterator[None]:
    """Attention takes all Hopper kernels, or none."""
    with ExitStack() as stack:
        if hopper:
            stack.enter_context(hopper_attention())
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("error", "llama_kernels: ")  # a kernel that does not compile
        else:
            stack.enter_context(mock.patch.object(switch, "may_run", lambda pass_: False))
        yield


def _kernel(name: str, family: str, grid: tuple[int, ...], made: Any) -> Kernel:
    registers, spill = map(int, re.search(r"REG:(\d+) STACK:(\d+)", sass.usage(made.asm["cubin"])).groups())
    constants = {made.src.fn.arg_names[at[0]]: x for at, x in made.src.constants.items() if len(at) == 1}
    warps, shared = made.metadata.num_warps, made.metadata.shared
    code = parsed(sass.disassembled(made.asm["cubin"], "-hex"))
    return Kernel(name, family, tuple(grid), warps, registers, spill, shared, constants, code)
