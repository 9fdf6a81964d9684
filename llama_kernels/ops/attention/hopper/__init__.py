"""Attention for Hopper GPUs, in Gluon: copy engine, warp groups in turns, asynchronous products.

The portable kernels beside this folder are what these are held against, and what runs wherever `choice.choose` says so.
choice.py decides, forward.py and backward.py hold the kernels, schedule.py the arithmetic of their pipelines (which
tests run on a CPU), descriptors.py how tensors look to the copy engine, gluon.py the language.

Below, what the launchers ask; each gives None, or False, where the portable kernels are to run.
"""

from __future__ import annotations

import torch

from llama_kernels.ops.attention.hopper.backward import launch_hopper_backward
from llama_kernels.ops.attention.hopper.choice import HopperTile, attempt, choose, hopper_attention, wanted
from llama_kernels.ops.attention.hopper.forward import launch_hopper_forward

__all__ = ["backward_tile", "hopper_attention", "try_backward", "try_forward"]


def try_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    *call: object,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """out, lse; arguments as `launch_forward`."""
    if not wanted("forward") or isinstance(tile := choose("forward", kv_start, kv_end, None, q, k, v), str):
        return None
    done, result = attempt("forward", launch_hopper_forward, tile, q, k, v, sinks, *call)
    return result if done else None


def backward_tile(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    softcap: float | None,
    deterministic: bool | None,
    *needed: bool,
) -> HopperTile | None:
    """Where there is one, `try_backward` takes a sum of dq to begin with, zeros."""
    if not wanted("backward") or not all(needed):
        return None
    if deterministic or (deterministic is None and torch.are_deterministic_algorithms_enabled()):
        return None
    tile = choose("backward", kv_start, kv_end, softcap, q, k, v, do)
    return None if isinstance(tile, str) else tile


def try_backward(tile: HopperTile, *call: object) -> bool:
    """Whether dq, dk and dv are filled; arguments as `launch_hopper_backward`."""
    return attempt("backward", launch_hopper_backward, tile, *call)[0]
