"""Compile the kernels that later stages launch, on every core: `python -m bench.gpu_check.compile`.

The bench's works run on the meta device, where a tensor has a shape and strides and no memory, and the package's own
launchers launch for them. Triton makes the same cache key of such a launch as of one on the GPU (the same types,
constants, options, and the same divisibility of addresses and numbers by 16), compiles by it into its cache on disk,
and nothing is launched. The first pass only collects the keys; then every worker takes a kernel at a time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import llama_kernels as lk
from bench import end_to_end, parity
from bench.__main__ import works_of
from bench.providers import OURS, PROVIDERS, Unsupported
from bench.runner import Step
from bench.work import Work
from llama_kernels import runtime


class Target(NamedTuple):
    """A GPU, as far as a kernel's code depends on it."""

    backend: str
    arch: int | str
    warp_size: int
    family: str  # whose tiles it takes
    processors: int

    @classmethod
    def here(cls) -> Target:
        """The current GPU."""
        target, device = driver.active.get_current_target(), torch.device("cuda", torch.cuda.current_device())
        return cls(*dataclasses.astuple(target), runtime.arch_of(device), runtime.processors_of(device))


# --- what is launched ------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    name: str
    run: Callable[[], None]


def calls(target: Target) -> list[Call]:
    """Attention, whose kernels compile longest, comes first."""
    works = [("bench", False, work) for work in works_of("smoke")]
    if target.family == "sm_90":
        works += [("bench, Hopper", True, work) for kind, _, work in works if "attention" in work.op]
    works += [("parity", False, work) for work in parity.works()]
    found = [
        Call(f"{kind}: {work.op}, {work.shape}, {str(work.dtype)[6:]}", lambda w=work, h=hopper: _work(w, h))
        for kind, hopper, work in sorted(works, key=lambda each: "attention" not in each[2].op)
    ]
    layers = (scale for scale in end_to_end.scales() if not scale.whole)
    return [*found, *(Call(f"patched layer: {scale.shape}", lambda s=scale: _layer(s)) for scale in layers)]


def _work(work: Work, hopper: bool) -> None:
    """Forward and backward of every provider that is made of our kernels."""
    backward = "backward" in work.directions
    with lk.hopper_attention(hopper):
        for provider in PROVIDERS:
            if provider.name.startswith(OURS) and provider.has(work.op):
                step = Step(provider.function(work, "meta"), work.draw("meta"), backward)
                step.forward_once()
                if backward:
                    step.backward()


def _layer(scale: end_to_end.Scale) -> None:
    with contextlib.suppress(Unsupported):  # without transformers
        stock = end_to_end._llama(scale, "meta", scale.dtype)
        step = end_to_end._Step(scale, end_to_end.Ours(False), "meta", scale.dtype, stock)
        step.backward(step.forward())


# --- launches without a GPU ------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """key: what Triton tells kernels of this process apart by. tile: its constants of block sizes, warps, stages."""

    key: str
    name: str
    tile: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.key.encode()).hexdigest()[:8]


class _Driver:
    """What Triton asks of a driver before it compiles. Each target is a device of its own to Triton's caches."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(*self._target[:3])

    def get_current_device(self) -> Target:
        return self._target

    def get_current_stream(self, device: Target) -> int:
        return 0


@contextlib.contextmanager
def launching_for(target: Target, wanted: Callable[[Kernel], bool]) -> Iterator[list[Any]]:
    """Inside, ops on meta tensors launch as they do on `target`, into nothing. A kernel that is `wanted` is compiled
    first, and its triton CompiledKernel is in the list. Kernels that this process has compiled are not asked for."""
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
        warnings.filterwarnings("ignore", category=UserWarning)  # that an implementation is replaced: so it shall be
        _launch_on_meta(library)
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for module in [m for name, m in sys.modules.items() if name.startswith("llama_kernels")]:
            for asked in answers.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, asked, answers[asked]))
        driver.set_active(_Driver(target))
        knobs.runtime.jit_cache_hook = is_left_out
        yield compiled


def _kernel(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> Kernel:
    names = fn.jit_function.arg_names
    constants = {names[at[0]]: x for at, x in compile["constants"].items() if len(at) == 1}
    blocks = [f"{name} {x}" for name, x in constants.items() if name.startswith("BLOCK")]
    tile = ", ".join((*blocks, f"{compile['num_warps']} warps", f"{compile['num_stages']} stages"))
    return Kernel(f"{fn.module}.{fn.name} {key}", fn.jit_function.__name__.strip("_"), tile)


def _launch_on_meta(library: torch.library.Library) -> None:
    """Meta tensors run what CUDA tensors do: the launchers."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("llama_kernels::"):
            op = getattr(torch.ops.llama_kernels, name.split("::")[1]).default
            library.impl(op, lambda *args, op=op: op.redispatch(cuda, *args), "Meta", allow_override=True)


def collected(target: Target, made: list[Call]) -> list[list[Kernel]]:
    """What each call launches, in order. Nothing is compiled."""
    launched: list[list[Kernel]] = []
    with launching_for(target, lambda kernel: bool(launched[-1].append(kernel))):
        for call in made:
            launched.append([])
            call.run()
    return launched


# --- compiling -------------------------------------------------------------------------------------------------------

_worker: tuple[Target, list[Call]]


def _begin(target: Target) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = target, calls(target)


def _compile(job: tuple[int, str]) -> dict[str, Any]:
    """One kernel, by its key, of one call."""
    (target, made), (index, key), hits = _worker, job, []
    start, error = time.perf_counter(), ""
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    with (
        launching_for(target, lambda kernel: kernel.key == key) as compiled,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")  # what a Hopper kernel says that does not compile
        try:
            made[index].run()
        except Exception as e:  # of the compiler; the other kernels are compiled all the same
            error = f"{type(e).__name__}: {e}"
    if not compiled and not error:
        error = next(
            (str(w.message) for w in said if "Hopper" in str(w.message)), "this worker launched no such kernel"
        )
    launcher = next(filter(None, map(_launcher, compiled)), "")
    return {"call": made[index].name, "on disk": bool(hits) and all(hits), "hashes": [k.hash for k in compiled],
            "seconds": time.perf_counter() - start, "launcher": launcher, "error": error}  # fmt: skip


def _launcher(compiled: Any) -> str:
    """Build the C code that launches the kernel, which Triton caches on disk too. Says why it could not, or ""."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:  # of Triton's internals; the first launch builds it then
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def compile_all(target: Target, workers: int) -> dict[str, Any]:
    """Compile every distinct kernel once. What was launched by which call, and what was compiled."""
    made = calls(target)
    launched = collected(target, made)
    first: dict[str, int] = {}  # call of each key
    for index, kernels in enumerate(launched):
        for kernel in kernels:
            first.setdefault(kernel.key, index)
    jobs = [(index, key) for key, index in first.items()]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _begin, (target,)) as pool:
        done = list(pool.map(_compile, jobs))
    by_call = {call.name: [[kernel.name, kernel.tile, kernel.digest] for kernel in kernels]
               for call, kernels in zip(made, launched, strict=True)}  # fmt: skip
    return {"target": target._asdict(), "launched": by_call, "compiled": done}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.compile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there what each call launches")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here, whose kernels would be compiled")
    target = Target.here()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the workers, which need no context on the GPU
    found = compile_all(target, args.workers)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    done = found["compiled"]
    if reason := next((each["launcher"] for each in done if each["launcher"]), None):
        print(f"launchers are left to the first launch: {reason}")
    fresh = [each for each in done if not each["on disk"]]
    seconds = sum(each["seconds"] for each in fresh)
    failed = [each for each in done if each["error"]]
    for each in failed:
        print(f"{each['call']}: {each['error']}".splitlines()[0])
    were = f"{len(fresh) - len(failed)} compiled in {seconds:.0f} s of processor time, {len(failed)} failed"
    print(f"{len(done)} kernels: {len(done) - len(fresh)} were on disk, {were}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
