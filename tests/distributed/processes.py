"""Runs functions on several processes that talk over gloo."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Jobs = Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]  # by name: a function of a module, and its arguments


def run(jobs: Jobs, ranks: int, seconds: float = 240) -> dict[str, Any]:
    """What each job returned on rank 0, or its traceback where it raised on any rank.

    Every process runs all jobs, in their order. RuntimeError if they have not ended after so many seconds.
    """
    modules = {"llama_kernels.distributed", *(job.__module__ for job, _ in jobs.values())}
    multiprocessing.set_forkserver_preload(sorted(modules))  # imported once, by the first call
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(_work, (ranks, folder, jobs), nprocs=ranks, join=False, start_method="forkserver")
        try:
            end = time.monotonic() + seconds
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise RuntimeError(f"{ranks} processes have not ended after {seconds} s")
        finally:
            for process in context.processes:
                process.kill()
        return torch.load(Path(folder, "results.pt"), weights_only=False)


def _work(rank: int, ranks: int, folder: str, jobs: Jobs) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    results = {}
    for name, (job, arguments) in jobs.items():
        try:
            found = job(*arguments)
        except Exception:
            found = traceback.format_exc()
        everywhere: list[Any] = [None] * ranks
        dist.all_gather_object(everywhere, found if isinstance(found, str) else None)
        raised = [f"rank {r}: {text}" for r, text in enumerate(everywhere) if text]
        results[name] = "\n".join(raised) or found
    if rank == 0:
        torch.save(results, Path(folder, "results.pt"))
    dist.destroy_process_group()
