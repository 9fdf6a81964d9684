"""The arithmetic of the pipeline: which blocks in which order, which slot of a ring, which phase of a barrier.

A kernel of several warp groups that get one of these wrong does not fail, it hangs, or reads what is not there yet. So
these are functions of integers alone, which the kernels compile and tests/ops/test_hopper.py runs as plain Python and
compares with the definition of the mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llama_kernels.ops.attention.hopper.gluon import jit


class Walk(NamedTuple):
    """The blocks that a tile visits, by step, each time downwards: those at the top that need a mask, those at the
    bottom that do, the rest. So each kernel has two loops, one with a mask and one without.

    In few numbers: a consumer keeps them all, in a loop that has no register to spare.
    """

    top: Any  # the last block of all, where the walk starts
    upper: Any  # masked blocks at the top
    masked: Any  # with those at the bottom, which follow
    count: Any


@jit
def block_of(walk, step):
    """Which block step visits."""
    block = walk.top - step
    if step >= walk.upper:  # past the blocks without a mask
        block -= walk.count - walk.masked
    if step >= walk.masked:
        block = walk.top + walk.masked - walk.upper - step
    return block


@jit
def key_walk(blocks, left, Sk, BLOCK_N):
    """Of a tile of query rows over its keys, from `key_blocks` of a mask with this `left`. Its first step is always
    masked, and there is one:

    rows that see no key visit the first block past the end all the same, which reads as zeros, whatever the keys hold.
    """
    bottom, end = blocks.begin // BLOCK_N, (blocks.end + BLOCK_N - 1) // BLOCK_N
    if end == bottom:
        bottom = (Sk + BLOCK_N - 1) // BLOCK_N
        end = bottom + 1
    count = end - bottom
    upper = min(max(end - blocks.full_end // BLOCK_N, 1), count)
    masked = upper
    if left is not None:
        masked = upper + max(min(blocks.full_begin // BLOCK_N - bottom, count - upper), 0)
    return Walk(end - 1, upper, masked, count)


@jit
def row_walk(mask, n, Sq, BLOCK_M, BLOCK_N):
    """Of a tile of keys, from n on, over the query rows that see any of them. There may be none.

    Rows past Sq need no mask: their probabilities are 0. Keys past Sk do, for every row.
    """
    last = min(n + BLOCK_N, mask.Sk) - 1
    begin, end = 0, Sq
    full_begin, full_end = 0, Sq + BLOCK_M - 1
    if mask.right is not None:
        begin = max(n - mask.shift - mask.right, 0)
        full_begin = max(n + BLOCK_N - 1 - mask.shift - mask.right, 0)
    if mask.left is not None:
        end = min(last - mask.shift + mask.left + 1, Sq)
        if n - mask.shift + mask.left + 1 < Sq:
            full_end = max(n - mask.shift + mask.left + 1, 0)
    bottom, top = begin // BLOCK_M, (max(end, 0) + BLOCK_M - 1) // BLOCK_M
    count = max(top - bottom, 0)
    full_begin, full_end = (full_begin + BLOCK_M - 1) // BLOCK_M, full_end // BLOCK_M
    lower, upper = min(max(full_begin - bottom, 0), count), min(max(top - full_end, 0), count)
    if n + BLOCK_N > mask.Sk:
        lower = count
    upper = min(upper, count - lower)
    return Walk(top - 1, upper, upper + lower, count)


@jit
def head_and_block(walk, step, group):
    """Which head of a group, and which block, where its heads walk alike: the masked steps of all, then the rest."""
    rest = step - group * walk.masked
    if rest < 0:
        head, block = step // walk.masked, block_of(walk, step % walk.masked)
    else:
        plain = walk.count - walk.masked
        head, block = rest // plain, block_of(walk, walk.masked + rest % plain)
    return head, block


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
