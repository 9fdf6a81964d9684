"""The arithmetic of the pipeline: which blocks in which order, which slot of a ring, which phase of a barrier.

A kernel of several warp groups that get one of these wrong does not fail, it hangs, or reads what is not there yet. So
these are functions of integers alone, which the kernels compile and tests/test_hopper.py runs, as they are, in a model
of the pipeline on a CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llama_kernels.ops.attention.hopper.gluon import jit


class Walk(NamedTuple):
    """The blocks of keys that a tile of query rows visits, by step: first those that need a mask. Never none."""

    top: Any  # the last block of all, where the walk starts
    bottom: Any  # the first
    upper: Any  # masked blocks at the top, one at least: the walk's first step is always masked
    masked: Any  # with those at the bottom, which follow
    count: Any


@jit
def walk_of(blocks, Sk, BLOCK_N):
    """From `key_blocks`. The masked blocks come first, from both ends, and the rest is one plain loop, downwards.

    Rows that see no key visit one block all the same, the first that lies past the end: it reads as zeros, whatever the
    keys hold.
    """
    bottom, end = blocks.begin // BLOCK_N, (blocks.end + BLOCK_N - 1) // BLOCK_N
    if end == bottom:
        bottom = (Sk + BLOCK_N - 1) // BLOCK_N
        end = bottom + 1
    count = end - bottom
    upper = min(max(end - blocks.full_end // BLOCK_N, 1), count)
    lower = min(blocks.full_begin // BLOCK_N - bottom, count - upper)
    return Walk(end - 1, bottom, upper, upper + max(lower, 0), count)


@jit
def block_of(walk, step):
    """Which block step visits."""
    block = walk.top - step
    if step >= walk.upper:
        block = walk.bottom + step - walk.upper
    if step >= walk.masked:
        block = walk.top + walk.masked - walk.upper - step
    return block


@jit
def slot_of(step, STAGES):
    """Where in a ring of STAGES, a power of two, step's block lies."""
    return step & (STAGES - 1)


@jit
def filled_phase(step, STAGES):
    """Of the barrier of step's slot: what to wait for to read what the producer put there."""
    return (step // STAGES) & 1


@jit
def freed_phase(step, STAGES):
    """Likewise, to write it: that all readers of what was there are done. Of an untouched barrier this one is over."""
    return ((step // STAGES) & 1) ^ 1


@jit
def turn_phase(step, C):
    """Of the barrier on which consumer C of two waits for its turn, at each step from 1 on. The first is consumer 0's:
    to it an untouched barrier says that the other is done."""
    return (step + C) & 1
