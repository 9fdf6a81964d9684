"""Runs functions on several processes: on a GPU each, over NCCL, if there are enough; else on the CPU, over gloo."""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Jobs = Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]  # by name: a function of a module, and its arguments


def run(jobs: Jobs, ranks: int, seconds: float = 480) -> dict[str, Any]:
    """What each job returned on rank 0, or its traceback where it raised on any rank.

    Every process runs all jobs, in their order. RuntimeError if they have not ended after so many seconds.
    """
    modules = {"llama_kernels.distributed", *(job.__module__ for job, _ in jobs.values())}
    multiprocessing.set_forkserver_preload(sorted(modules))  # imported once, by the first call
    device = "cuda" if torch.cuda.device_count() >= ranks else "cpu"
    method = "spawn" if device == "cuda" else "forkserver"  # a forked process cannot use CUDA
    visible = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, visible):
            context = mp.start_processes(_work, (ranks, device, folder, jobs), ranks, join=False, start_method=method)
        try:
            end = time.monotonic() + seconds
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise RuntimeError(f"{ranks} processes have not ended after {seconds} s")
        finally:
            for process in context.processes:
                process.kill()
        return torch.load(Path(folder, "results.pt"), weights_only=False, map_location="cpu")


def _work(rank: int, ranks: int, device: str, folder: str, jobs: Jobs) -> None:
    torch.set_num_threads(1)
    tempfile.tempdir = folder  # files that a job leaves are removed with it
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "localhost", "MASTER_PORT": 0}  # fmt: skip
    os.environ.update({name: f"{value}" for name, value in torchrun.items()})  # accelerate reads them
    if device == "cuda":
        torch.cuda.set_device(rank)
    global _device
    _device = torch.device(device, rank if device == "cuda" else None)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank,
        world_size=ranks, timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    results = {}
    for name, (job, arguments) in jobs.items():
        try:
            found = job(*arguments)
        except Exception:
            found = traceback.format_exc()
            print(f"{name}, rank {rank}: {found}", file=sys.stderr, flush=True)  # others may wait until their timeout
        everywhere: list[Any] = [None] * ranks
        dist.all_gather_object(everywhere, found if isinstance(found, str) else None)
        raised = [f"rank {r}: {text}" for r, text in enumerate(everywhere) if text]
        results[name] = "\n".join(raised) or found
    if rank == 0:
        torch.save(results, Path(folder, "results.pt"))
    dist.destroy_process_group()


# --- for jobs --------------------------------------------------------------------------------------------------------

_device = torch.device("cpu")


def device() -> torch.device:
    """That of this process."""
    return _device


@functools.cache
def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh of all processes, on their devices. By default of one dimension.

    The same one for the same arguments: torch 2.13 does not compile calls on DTensors of a mesh after eager calls on
    DTensors of an equal one ("Node tangents_2 was invalid").
    """
    shape = shape or (dist.get_world_size(),)
    return init_device_mesh(_device.type, shape, mesh_dim_names=names)


def here(x: torch.Tensor) -> torch.Tensor:
    """`x` on the device of this process."""
    return x.to(_device)
