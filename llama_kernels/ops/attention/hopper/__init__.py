"""Attention for Hopper GPUs, in Gluon: copy engine, warp groups in turns, asynchronous products.

The portable kernels beside this folder are what these are held against, and what runs wherever `choice.choose` says so.
choice.py decides, forward.py and backward.py hold the kernels, schedule.py the arithmetic of their pipelines (which
tests run on a CPU), descriptors.py how tensors look to the copy engine, gluon.py the language.

Hooks for the launchers: each gives None where the portable kernel is to run.
"""

from __future__ import annotations

import torch

from llama_kernels.ops.attention.hopper.choice import attempt, choose, hopper_attention, wanted
from llama_kernels.ops.attention.hopper.forward import launch_hopper_forward

__all__ = ["hopper_attention", "try_forward"]


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
    if not wanted("forward") or isinstance(tile := choose("forward", kv_start, kv_end, q, k, v), str):
        return None
    return attempt("forward", launch_hopper_forward, tile, q, k, v, sinks, *call)
