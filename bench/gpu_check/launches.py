"""Finds the kernels that the bench launches on a GPU, by running it on the meta device, whose tensors have no data."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import llama_kernels as lk
from bench.codegen.compiling import StandInDriver
from bench.measuring.kernels import tile_of
from bench.measuring.step import Step
from bench.providers.provider import OURS, Unsupported
from bench.providers.registry import PROVIDERS
from bench.training import scale as training
from bench.training.step import Step as TrainingStep
from bench.training.step import llama
from bench.training.variations import Ours
from bench.works import presets
from bench.works.work import Work
from llama_kernels.core.device import arch_of, processors_of


class Target(NamedTuple):
    """The properties of a GPU that a kernel's code depends on."""

    backend: str
    arch: int | str
    warp_size: int
    family: str  # the family whose tiles it uses
    processors: int

    @classmethod
    def here(cls) -> Target:
        """The current GPU."""
        target, device = driver.active.get_current_target(), torch.device("cuda", torch.cuda.current_device())
        return cls(*dataclasses.astuple(target), arch_of(device), processors_of(device))


# --- what is launched ------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    name: str
    run: Callable[[], None]


def calls(target: Target) -> list[Call]:
    """The calls of the stages parity, speed and hopper-speed. Attention, which compiles longest, comes first."""
    works = [("bench", False, work) for work in presets.works_of("smoke")]
    if target.family == "sm_90":
        works += [("bench, Hopper", True, work) for kind, _, work in works if "attention" in work.op]
    works += [("parity", False, work) for work in presets.small()]
    found = [
        Call(f"{kind}: {work.op}, {work.shape}, {str(work.dtype)[6:]}", lambda w=work, h=hopper: _work(w, h))
        for kind, hopper, work in sorted(works, key=lambda each: "attention" not in each[2].op)
    ]
    layers = (scale for scale in training.scales() if not scale.whole)
    return [*found, *(Call(f"patched layer: {scale.shape}", lambda s=scale: _layer(s)) for scale in layers)]


def _work(work: Work, hopper: bool) -> None:
    """Run forward and backward of every provider that launches our kernels."""
    backward = "backward" in work.directions
    with lk.hopper_attention(hopper):
        for provider in PROVIDERS:
            if provider.name.startswith(OURS) and provider.has(work.op):
                step = Step(provider.function(work, "meta"), work.draw("meta"), backward)
                step.forward_once()
                if backward:
                    step.backward()


def _layer(scale: training.Scale) -> None:
    with contextlib.suppress(Unsupported):  # transformers is not installed
        stock = llama(scale, "meta", scale.dtype)
        step = TrainingStep(scale, Ours(False), "meta", scale.dtype, stock)
        step.backward(step.forward())


# --- launches without a GPU ------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """key: identifies the kernel within this process. tile: its block sizes, warps and stages."""

    key: str
    name: str
    tile: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.key.encode()).hexdigest()[:8]


@contextlib.contextmanager
def launching_for(target: Target, wanted: Callable[[Kernel], bool]) -> Iterator[list[Any]]:
    """In this context, ops on meta tensors launch as they do on `target`, except that nothing runs.

    A kernel for which `wanted` returns True is compiled, and its triton.CompiledKernel is added to the list. `wanted`
    is not called for kernels that this process has compiled before.
    """
    compiled: list[Any] = []
    run, asked_for = JITFunction.run, [False]

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        asked_for[0] = False
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if asked_for[0]:
            compiled.append(kernel)

    def is_left_out(**launch: Any) -> bool:
        asked_for[0] = wanted(_kernel(**launch))
        return not asked_for[0]

    answers = {"arch_of": lambda _: target.family, "processors_of": lambda _: target.processors}
    library = torch.library.Library("llama_kernels", "IMPL")
    with contextlib.ExitStack() as stack:
        stack.callback(library._destroy)
        stack.callback(driver.set_active, driver._active)
        stack.callback(setattr, knobs.runtime, "jit_cache_hook", knobs.runtime.jit_cache_hook)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=UserWarning)  # PyTorch warns when an implementation is replaced
        run_launchers_on("Meta", library)
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for module in [m for name, m in sys.modules.items() if name.startswith("llama_kernels")]:
            for asked in answers.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, asked, answers[asked]))
        driver.set_active(StandInDriver(target.family, GPUTarget(*target[:3])))
        knobs.runtime.jit_cache_hook = is_left_out
        yield compiled


def _kernel(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> Kernel:
    names = fn.jit_function.arg_names
    constants = {names[at[0]]: x for at, x in compile["constants"].items() if len(at) == 1}
    tile = tile_of(num_warps=compile["num_warps"], num_stages=compile["num_stages"], **constants)
    return Kernel(f"{fn.module}.{fn.name} {key}", fn.jit_function.__name__.strip("_"), tile)


def run_launchers_on(device: str, library: torch.library.Library) -> None:
    """Register the launchers, which run on CUDA tensors, for tensors of another dispatch key as well."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("llama_kernels::"):
            op = getattr(torch.ops.llama_kernels, name.split("::")[1]).default
            library.impl(op, lambda *args, op=op: op.redispatch(cuda, *args), device, allow_override=True)


def collected(target: Target, made: list[Call]) -> list[list[Kernel]]:
    """The kernels that each call launches, in order. Nothing is compiled."""
    launched: list[list[Kernel]] = []
    with launching_for(target, lambda kernel: bool(launched[-1].append(kernel))):
        for call in made:
            launched.append([])
            call.run()
    return launched
