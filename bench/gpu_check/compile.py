"""Compiles the kernels that later stages launch, on every core: `python -m bench.gpu_check.compile`.

A launch on the meta device (bench.gpu_check.launches) has the same cache key as one on the GPU: the same types,
constants and options, and the same divisibility of addresses and numbers by 16. A first pass only collects the keys.
Then each worker compiles one kernel at a time into Triton's cache on disk, where a launch in any process finds it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from bench.gpu_check.launches import Call, Target, calls, collected, launching_for

_worker: tuple[Target, list[Call]]


def _begin(target: Target) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = target, calls(target)


def _compile(job: tuple[int, str]) -> dict[str, Any]:
    """Compile one kernel, given by its key, of one call."""
    (target, made), (index, key), hits = _worker, job, []
    start, error = time.perf_counter(), ""
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    with (
        launching_for(target, lambda kernel: kernel.key == key) as compiled,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")  # a Hopper kernel that does not compile warns
        try:
            made[index].run()
        except Exception as e:  # an error of the compiler; the other kernels are still compiled
            error = f"{type(e).__name__}: {e}"
    if not compiled and not error:
        hopper = (str(w.message) for w in said if "Hopper" in str(w.message))
        error = next(hopper, "this worker launched no such kernel")
    launcher = next(filter(None, map(_launcher, compiled)), "")
    return {"call": made[index].name, "on disk": bool(hits) and all(hits), "hashes": [k.hash for k in compiled],
            "seconds": time.perf_counter() - start, "launcher": launcher, "error": error}  # fmt: skip


def _launcher(compiled: Any) -> str:
    """Build the C code that launches the kernel, which Triton also caches on disk. Returns the error, or ""."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:  # uses internals of Triton; the first launch builds it instead
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def compile_all(target: Target, workers: int) -> dict[str, Any]:
    """Compile every distinct kernel once. Returns which kernels each call launches, and what was compiled."""
    made = calls(target)
    launched = collected(target, made)
    first: dict[str, int] = {}  # the first call with each key
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what each call launches to FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here, for which kernels would be compiled")
    target = Target.here()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the workers need no context on the GPU
    found = compile_all(target, args.workers)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    done = found["compiled"]
    if reason := next((each["launcher"] for each in done if each["launcher"]), None):
        print(f"each kernel's first launch will build its launcher: {reason}")
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
