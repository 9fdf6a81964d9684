"""Families of Transformers under tensor parallelism: two processes load each with its tp_plan, run it and patch it.

    TRITON_INTERPRET=0 CUDA_VISIBLE_DEVICES= python -m tests.integrations.tensor_parallel [family ...]

says of each family, or of all, what stock and the patched model do.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from llama_kernels.integrations.transformers import patch, report
from tests.integrations.checks import Baseline, Result, close, logits_and_gradients
from tests.integrations.families import EVERY_FAMILY, FAMILIES, batch

RANKS = 2


def whole(result: Result) -> dict[str, torch.Tensor]:
    """The numbers of a result, of which each rank may hold a part."""
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in result.close.items()}


def results(families: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """By family, what `run` found. RuntimeError where the processes have not ended after so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            Baseline(family).model.save_pretrained(Path(folder, family))
        context = mp.spawn(run, (folder, families), nprocs=RANKS, join=False)
        try:
            end = time.monotonic() + seconds
            while not context.join(timeout=1):  # until all have ended, or one has failed
                if time.monotonic() > end:
                    raise RuntimeError(f"{RANKS} processes have not ended after {seconds} s")
        finally:
            for process in context.processes:
                process.kill()
        return {family: torch.load(Path(folder, f"{family}.pt"), weights_only=True) for family in families}


def run(rank: int, folder: str, families: list[str]) -> None:
    """What one process does. Rank 0 writes for each family: logits and gradients, "stock" and "patched", with padding
    on the left; "ours", the kinds that are; "error" with a traceback where anything was raised."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))  # as torchrun sets them
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    for family in families:
        auto = AutoModelForCausalLM if family in FAMILIES else AutoModelForImageTextToText
        found: dict[str, Any] = {}
        try:
            how = {"attn_implementation": "eager", "experts_implementation": "eager"}
            model = auto.from_pretrained(f"{folder}/{family}", tp_plan="auto", **how).eval()
            found["stock"] = whole(logits_and_gradients(model, batch(family), "left"))
            patch(model)
            found["patched"] = whole(logits_and_gradients(model, batch(family), "left"))
            rows = report(model).rows
            found["ours"] = {
                kind: sum(r.count for r in rows if r.kind == kind and r.ours) for kind in {r.kind for r in rows}
            }
        except Exception:
            found["error"] = traceback.format_exc()
        if rank == 0:
            torch.save(found, Path(folder, f"{family}.pt"))
    dist.destroy_process_group()


def right(family: str, numbers: dict[str, torch.Tensor]) -> None:
    """AssertionError where these are not the numbers of one process with the stock model."""
    theirs, truth = Baseline(family).results("left")
    close(numbers, theirs.close, truth.close)


if __name__ == "__main__":
    for family, found in results(sys.argv[1:] or list(EVERY_FAMILY), 600).items():
        said = []
        for name in ("stock", "patched"):
            try:
                if name in found:
                    right(family, found[name])
                    said.append(f"{name} right")
            except AssertionError as error:
                said.append(f"{name} wrong: {error}")
        if "error" in found:
            said.append(found["error"].splitlines()[-1])
        print(family, *said, sep=" | ")
