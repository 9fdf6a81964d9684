"""What a call costs the host, without a GPU: `python -m bench.host [--json FILE]`.

The public functions run on small CPU tensors, with the kernels' launchers registered for them and with a driver that
stands in for a GPU: Triton binds, specialises and looks up the compiled kernel as it would, and the launch itself does
nothing. So the figures hold everything but the driver's own launch (about 3 µs a kernel on an H200's host); they are
those of this machine's processor.
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
from bench.codegen.cases import StandInDriver
from llama_kernels.core import launch_cache, registry
from llama_kernels.ops.attention import tables

GOAL = 25.0  # microseconds of a forward call
BATCHES, CALLS = 20, 50


class _Utils:
    """A GPU with room for everything, on which loading a kernel does nothing."""

    def load_binary(self, *_: Any) -> tuple[object, int, int, int, int]:
        return object(), 0, 0, 0, 1024

    def unload_module(self, _: Any) -> None:  # from Triton 3.9 on, of a kernel that is dropped
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20}


class LaunchingNothing(StandInDriver):
    utils = _Utils()

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None


def calls() -> Iterator[tuple[str, Callable[[], torch.Tensor], tuple[torch.Tensor, ...]]]:
    """Op, call, and what it is differentiated by. Small: only the shapes' handling costs anything here."""
    x, residual = (torch.randn(64, 1024, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.ones(1024, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (torch.randn(1, 128, H, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for H in (8, 2, 2))
    cos, sin = lk.rope_tables(lk.rope_frequencies(64)[0], 128)
    token, keys, values = (torch.randn(1, H, S, 64, dtype=torch.bfloat16) for H, S in ((8, 1), (2, 1024), (2, 1024)))
    yield "rms_norm", lambda: lk.rms_norm(x, weight), (x, weight)
    yield "add_rms_norm", lambda: lk.add_rms_norm(x, residual, weight)[0], (x, residual, weight)
    yield "rope", lambda: lk.rope(q, k, cos, sin)[0], (q, k)
    qkv, head = torch.randn(1, 128, 12 * 64, dtype=torch.bfloat16, requires_grad=True), weight[:64]
    slot, new = torch.tensor([3]), [token, *(x[:, :, :1] for x in (keys, values))]
    yield "rope_qkv", lambda: lk.rope_qkv(qkv, 8, 2, cos, sin)[0], (qkv,)
    yield "rope_into_cache", lambda: lk.rope_into_cache(*new, keys, values, slot, cos, sin), ()
    yield "qk_norm_rope", lambda: lk.qk_norm_rope(q, k, head, head, cos, sin)[0], (q, k)
    yield "attention", lambda: lk.attention(q, k, v), (q, k, v)
    yield "rope_attention", lambda: lk.rope_attention(q, k, v, cos, sin), (q, k, v)
    yield "decode", lambda: lk.attention(token, keys, values), ()


def microseconds(run: Callable[[], object]) -> float:
    """The median over batches of calls."""
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that an implementation is replaced: so it shall be
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
        launch_cache.forget()  # launches of that driver's
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: there is no launch to time")
    if torch.cuda.is_available():
        parser.error("there is a GPU: its own launches are in every figure of `python -m bench`")
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
