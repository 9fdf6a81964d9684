"""Attention for Hopper GPUs, in Gluon: bulk copies (TMA), warp groups that take turns, asynchronous products (wgmma).

The portable kernels in the folder above compute the same; ../dispatch.py says which of them computes a call.

    forward.py, backward.py   the kernels and their launchers
    schedule.py               the order of blocks and the phases of barriers, as functions of integers
    descriptors.py            how the copy engine (TMA) addresses a tile of a tensor
    shared_memory.py          rings of tiles, and barriers
    tables.py                 the tiles
    switch.py                 `hopper_attention`, which switches the kernels on, and what failed on this machine
    gluon.py                  the import of Gluon

Read forward.py first. In a thread block, one warp loads (the producer) and two groups of four warps compute (the
consumers). They hand slots of shared memory to one another through barriers: `filled` says that a slot holds data,
`freed` that it may be overwritten.
"""

from __future__ import annotations

from llama_kernels.ops.attention.call import AttentionCall
from llama_kernels.ops.attention.hopper.backward import launch_hopper_backward
from llama_kernels.ops.attention.hopper.forward import launch_hopper_forward
from llama_kernels.ops.attention.hopper.switch import attempt, hopper_attention
from llama_kernels.ops.attention.hopper.tables import HopperTile

__all__ = ["hopper_attention", "try_backward", "try_forward"]


def try_forward(call: AttentionCall, tile: HopperTile, *others: object) -> bool:
    """Whether out and lse are filled; arguments as `launch_hopper_forward`.

    False: the kernel does not compile or launch on this machine.
    """
    return attempt("forward", launch_hopper_forward, call, tile, *others)


def try_backward(call: AttentionCall, tile: HopperTile, *others: object) -> bool:
    """Whether dq, dk and dv are filled; arguments as `launch_hopper_backward`. False: as in `try_forward`."""
    return attempt("backward", launch_hopper_backward, call, tile, *others)
