"""The arithmetic of the pipeline: which blocks in which order, which slot of a ring, which phase of a barrier.

If one of these is wrong, a kernel of several warp groups does not fail: it hangs, or reads data that has not arrived.
They are functions of integers alone, so that the kernels compile them, and tests/ops/test_hopper.py runs them on a CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llama_kernels.ops.attention.hopper.gluon import jit


class Walk(NamedTuple):
    """The order in which a tile visits its blocks, the last block first in each of three groups.

    First come the last blocks, which need a mask, then the first blocks, which need one, then the others, which need
    none. So a kernel has one loop with a mask and one without. There are only four numbers, since a consumer holds them
    in registers, of which its loop has none to spare.
    """

    top: Any  # the last block
    upper: Any  # how many of the last blocks need a mask
    masked: Any  # how many blocks need a mask
    count: Any  # how many blocks there are


@jit
def block_of(walk, step):
    """The block of a step."""
    block = walk.top - step
    if step >= walk.upper:  # past the blocks without a mask
        block -= walk.count - walk.masked
    if step >= walk.masked:
        block = walk.top + walk.masked - walk.upper - step
    return block


@jit
def key_walk(blocks, floor, Sk, BLOCK_N):
    """The walk of a tile of query rows over the keys. blocks: from `key_blocks`. floor: `floor_of` them.

    There is always a first step, with a mask. If the rows see no key, it visits the first block past the end, which
    loads as zeros.
    """
    bottom, end = blocks.begin // BLOCK_N, (blocks.end + BLOCK_N - 1) // BLOCK_N
    if end == bottom:
        bottom = (Sk + BLOCK_N - 1) // BLOCK_N
        end = bottom + 1
    count = end - bottom
    upper = min(max(end - blocks.full_end // BLOCK_N, 1), count)
    masked = upper
    if floor is not None:
        masked = upper + max(min(blocks.full_begin // BLOCK_N - bottom, count - upper), 0)
    return Walk(end - 1, upper, masked, count)


@jit
def row_walk(mask, n, Sq, BLOCK_M, BLOCK_N):
    """The walk of a tile of keys, from n on, over the query rows that see one of them. It may have no step.

    Rows past Sq need no mask, since their probabilities are 0. Keys past Sk need one, in every block.
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
    """The head and the block of a step, where all heads of a group walk alike: first the masked blocks of each head."""
    rest = step - group * walk.masked
    if rest < 0:
        head, block = step // walk.masked, block_of(walk, step % walk.masked)
    else:
        plain = walk.count - walk.masked
        head, block = rest // plain, block_of(walk, walk.masked + rest % plain)
    return head, block


@jit
def slot_of(step, STAGES):
    """The slot of a step's block in a ring of STAGES slots, a power of two."""
    return step & (STAGES - 1)


@jit
def filled_phase(step, STAGES):
    """The phase of the slot's barrier to wait for before a step reads the slot."""
    return (step // STAGES) & 1


@jit
def freed_phase(step, STAGES):
    """The phase to wait for before a step's block is loaded into the slot: its readers have finished.

    On a new barrier this phase counts as over, so the first round does not wait.
    """
    return ((step // STAGES) & 1) ^ 1


@jit
def turn_phase(step, C):
    """The phase to wait for until it is the turn of consumer C of two, at each step from 1 on.

    Consumer 0 is first: on a new barrier the phase that it waits for counts as over.
    """
    return (step + C) & 1
