"""The mask of the attention kernels: which keys a query sees, and which blocks of keys or rows a tile visits."""

from __future__ import annotations

from typing import NamedTuple

from llama_kernels.core.language import tl, triton


class Mask(NamedTuple):
    """What decides whether query i sees key j. A None hides no key."""

    shift: tl.tensor  # Sk - Sq: the position of query i is that of key i + shift
    left: tl.tensor  # keys before its own position that a query sees
    right: tl.tensor  # keys after its own position that a query sees; 0 is causal
    kv_start: tl.tensor = None  # the first key that each row sees, in the shape of i
    kv_end: tl.tensor = None  # one past the last key that each row sees, in the shape of i
    Sk: tl.tensor = None  # number of keys; None where it does not matter what keys past the end give
    key_mask: tl.tensor = None  # pointer to one bool for each key, False for a key that no query sees; needs Sk
    prefix: tl.tensor = None  # how many first keys each row also sees, in the shape of i; at most the number of keys


class KeyBlocks(NamedTuple):
    """Ranges of keys, in multiples of BLOCK_N but for end, first and prefix. begin <= full_begin <= full_end.

    In [full_begin, full_end) every row sees every key, so no mask is needed. Keys outside [first, end) are not loaded,
    and may be NaN.
    With a prefix, the blocks in [0, prefix_end) come before these, and begin is prefix_end or more. So a key that a row
    sees twice, as one of its first keys and between its bounds, counts once. `over_key_blocks` visits them all.
    """

    begin: tl.tensor
    full_begin: tl.tensor
    full_end: tl.tensor
    end: tl.tensor  # one past the last key that a row sees
    first: tl.tensor  # the first key that a row sees, where there is a kv_start or a window to the left; otherwise 0
    prefix_full: tl.tensor = 0  # in [0, prefix_full) every row sees every key, as one of its first keys
    prefix_end: tl.tensor = 0
    prefix: tl.tensor = 0  # the most first keys that a row sees; they are loaded too


@triton.jit
def within(bound, first, count):
    """`bound`, a key or a number of keys, counted from key `first` on. At most `count`; None stays None."""
    inside = None
    if bound is not None:
        inside = tl.minimum(tl.maximum(bound, 0) - first, count)
    return inside


@triton.jit
def both(see, more):
    """see & more; see may be None, for everything."""
    return more if see is None else see & more


@triton.jit
def begin_of(mask, i):
    """The first key that row i sees, in the shape of i; None if nothing hides the first keys."""
    begin = mask.kv_start
    if mask.left is not None:
        own = i + (mask.shift - mask.left)
        begin = own if begin is None else tl.maximum(begin, own)
    return begin


@triton.jit
def end_of(mask, i):
    """One past the last key that row i sees, in the shape of i, or past the last key; None if nothing hides them."""
    end = mask.kv_end
    if mask.right is not None:
        own = i + (mask.shift + mask.right + 1)
        end = own if end is None else tl.minimum(end, own)
    return end


@triton.jit
def visible(mask, i, j):
    """Whether query i sees key j, in the shape to which i and j broadcast. Every attention kernel uses this function.

    The bounds on each side of a row are first combined into one, in the shape of i. This takes fewer registers than
    comparing j with each of them.
    """
    begin = begin_of(mask, i)
    end = end_of(mask, i)
    see = None
    if mask.key_mask is not None:
        see = tl.load(mask.key_mask + j, mask=j < mask.Sk, other=False)
    elif mask.Sk is not None:
        end = mask.Sk if end is None else tl.minimum(end, mask.Sk)
    if end is not None:
        see = both(see, j < end)
    if begin is not None:
        see = both(see, j >= begin)
    if mask.prefix is not None and see is not None:
        see = see | (j < mask.prefix)
    return see


@triton.jit
def key_blocks(mask, first, last, BLOCK_N: tl.constexpr):
    """The blocks of keys that at least one of the query rows first to last sees.

    Where nothing hides the first keys, begin is the constant 0. If ptxas does not know where the first loop starts, it
    serialises the tensor-core pipeline there.
    """
    begin, full_begin = 0, 0
    end, full_end = mask.Sk, mask.Sk
    if mask.left is not None:
        begin, full_begin = first + mask.shift - mask.left, last + mask.shift - mask.left
    if mask.right is not None:
        end = tl.minimum(end, last + mask.shift + mask.right + 1)
        full_end = tl.minimum(full_end, first + mask.shift + mask.right + 1)
    if mask.kv_start is not None:
        begin, full_begin = tl.maximum(begin, tl.min(mask.kv_start)), tl.maximum(full_begin, tl.max(mask.kv_start))
    if mask.kv_end is not None:
        end, full_end = tl.minimum(end, tl.max(mask.kv_end)), tl.minimum(full_end, tl.min(mask.kv_end))
    end = tl.maximum(end, 0)
    lowest = 0
    if mask.left is not None or mask.kv_start is not None:
        lowest = begin
        begin = tl.minimum(tl.maximum(begin, 0), end) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.minimum(tl.maximum(full_begin, begin), end), BLOCK_N) * BLOCK_N
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N, full_begin)
    prefix_full, prefix_end, prefix = 0, 0, 0
    if mask.prefix is not None:
        prefix = tl.maximum(tl.max(mask.prefix), 0)
        prefix_full = tl.maximum(tl.min(mask.prefix), 0) // BLOCK_N * BLOCK_N
        prefix_end = tl.cdiv(prefix, BLOCK_N) * BLOCK_N
        begin, full_begin = tl.maximum(begin, prefix_end), tl.maximum(full_begin, prefix_end)
        full_end = tl.maximum(full_end, prefix_end)
    return KeyBlocks(begin, full_begin, full_end, end, lowest, prefix_full, prefix_end, prefix)


@triton.jit
def floor_of(mask, blocks):
    """The first key that a row sees; None if nothing hides the first keys. blocks: the `key_blocks` of the mask."""
    floor = None
    if mask.left is not None or mask.kv_start is not None:
        floor = blocks.first
    return floor


@triton.jit
def over_key_blocks(ADD: tl.constexpr, result, rows, keys, scoring, SHAPE: tl.constexpr):
    """`result` after all blocks of `keys`, a `Keys` of tiles.py. Blocks at the edges of the mask are MASKED.

    ADD(result, rows, keys, begin, end, scoring, SHAPE, MASKED) is the result after the blocks in [begin, end). rows:
    what it needs of the tile's query rows. SHAPE: its sizes at compile time.
    """
    blocks = keys.blocks
    if keys.mask.prefix is not None:
        result = ADD(result, rows, keys, 0, blocks.prefix_full, scoring, SHAPE, MASKED=False)
        result = ADD(result, rows, keys, blocks.prefix_full, blocks.prefix_end, scoring, SHAPE, MASKED=True)
    if floor_of(keys.mask, blocks) is not None:
        result = ADD(result, rows, keys, blocks.begin, blocks.full_begin, scoring, SHAPE, MASKED=True)
    result = ADD(result, rows, keys, blocks.full_begin, blocks.full_end, scoring, SHAPE, MASKED=False)
    return ADD(result, rows, keys, blocks.full_end, blocks.end, scoring, SHAPE, MASKED=True)


@triton.jit
def query_blocks(mask, first, last, begin, end, BLOCK_M: tl.constexpr):
    """Of query rows [begin, end), the range of blocks with a row that sees one of the keys first to last."""
    if mask.right is not None:
        begin = tl.maximum(first - mask.shift - mask.right, begin)
    if mask.left is not None:
        end = tl.minimum(end, last - mask.shift + mask.left + 1)
    return begin // BLOCK_M * BLOCK_M, end
