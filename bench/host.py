"""Host time of a call, measured without a GPU: `python -m bench.host [--json FILE]`.

The public functions run on small CPU tensors, for which the kernels' launchers are registered. A stand-in driver takes
the place of the GPU's: Triton binds the arguments and looks up the compiled kernel as on a GPU, and the launch does
nothing. The figures include everything except the driver's launch (about 3 µs a kernel on an H200's host). They are
times of this machine's processor.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.runtime import driver

import llama_kernels as lk
from bench.codegen.compiling import StandInDriver
from llama_kernels.core import launch_cache, registry
from llama_kernels.ops.attention import tables
from tests.support.ops import OPS, Make, Shape

GOAL = 25.0  # microseconds a forward call
BATCHES, CALLS = 20, 50


class _Utils:
    """Reports enough shared memory for every kernel. Loading a kernel does nothing."""

    def load_binary(self, *_: Any) -> tuple[object, int, int, int, int]:
        return object(), 0, 0, 0, 1024

    def unload_module(self, _: Any) -> None:  # Triton 3.9 and newer call it when a kernel is freed
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20}


class LaunchingNothing(StandInDriver):
    """A driver whose launches do nothing."""

    utils = _Utils()

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None


def calls() -> Iterator[tuple[str, Callable[[], torch.Tensor], tuple[torch.Tensor, ...]]]:
    """(name, call, tensors that need a gradient) of every op and of a decoding step.

    The tensors are small, because the host time of a call does not depend on their sizes.
    """
    shape, make = Shape(B=1, Hq=8, Hkv=2, S=128, D=64, N=1024), Make(dtype=torch.bfloat16)
    for op in OPS.values():
        arguments = op.arguments(shape, make)
        leaves = tuple(arguments[name].requires_grad_() for name in op.differentiable)
        yield op.name, functools.partial(_first_result, getattr(lk, op.name), arguments), leaves
    token, keys, values = (make.heads(1, H, S, 64) for H, S in ((8, 1), (2, 1024), (2, 1024)))
    yield "decode", lambda: lk.attention(token, keys, values), ()


def _first_result(op: Callable[..., Any], arguments: dict[str, Any]) -> torch.Tensor:
    result = op(**arguments)
    return result[0] if isinstance(result, tuple) else result


def microseconds(run: Callable[[], object]) -> float:
    """Microseconds a call: the median over BATCHES batches of CALLS calls."""
    for _ in range(CALLS):
        run()
    samples = []
    for _ in range(BATCHES):
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(samples)


def _step(call: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], dy: torch.Tensor) -> object:
    return torch.autograd.grad(call(), leaves, dy, allow_unused=True)


def measure() -> list[dict[str, Any]]:
    """A row for each of `calls`: microseconds of the forward, and of forward and backward where there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch warns when an implementation is replaced
        for name, launcher in registry.KERNELS.items():
            registry.LIBRARY.impl(name, launcher, "CPU", allow_override=True)
    before = driver._active
    driver.set_active(LaunchingNothing("sm_90"))
    rows = []
    try:
        with mock.patch.object(tables, "arch_of", lambda _: "sm_90"):
            for op, call, leaves in calls():
                with torch.no_grad():
                    row = {"op": op, "forward": microseconds(call), "goal": GOAL}
                if leaves:
                    dy = torch.randn_like(call())
                    step = functools.partial(_step, call, leaves, dy)
                    row["training"] = microseconds(step)
                rows.append(row)
    finally:
        driver._active = before
        launch_cache.clear()  # its bound launches belong to the stand-in driver
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter has no launch to time; unset it")
    if torch.cuda.is_available():
        parser.error('the stand-in driver would replace that of the GPU; set CUDA_VISIBLE_DEVICES=""')
    torch.set_num_threads(1)
    rows = measure()
    for row in rows:
        training = f"{row['training']:7.1f} us forward and backward" if "training" in row else ""
        print(f"{row['op']:16}{row['forward']:7.1f} us forward {training}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
