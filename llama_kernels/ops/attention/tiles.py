"""Where the tiles of the attention kernels lie in memory, and how they are loaded and stored.

Names in all kernels: query row i of a sequence of Sq, key j of one of Sk; a tile has BLOCK_M query rows and BLOCK_N
keys; heads of q and k are D wide, those of v DV, in tiles of BLOCK_D and BLOCK_DV columns, the next powers of two. Each
tensor is addressed by its strides of (batch, head, token). In a packed batch the stride of the batch is 0, and each
sequence starts at its own token.
"""

from __future__ import annotations

from typing import NamedTuple

from llama_kernels.core.language import cast, tl, triton
from llama_kernels.ops.attention.masks import both


class Matrix(NamedTuple):
    """One head of one sequence: row r begins at base + r * stride."""

    base: tl.tensor
    stride: tl.tensor


@triton.jit
def query_tile(pid, sizes, BLOCK_M: tl.constexpr):
    """First row, head and batch of program pid, in a grid over row tiles.

    The last rows come first, since under a causal mask they see the most keys. Heads run fastest, so that programs that
    run at the same time share keys.
    """
    heads = sizes.B * sizes.Hq
    tile = tl.num_programs(0) // heads - 1 - pid // heads
    return tile * BLOCK_M, pid % sizes.Hq, pid // sizes.Hq % sizes.B


@triton.jit
def sequence(cu_seqlens_ptr, b, size, minus_longest):
    """First token and length of sequence b. size: tokens of the tensor.

    cu_seqlens is clamped, so that no sequence reaches outside the tensor or is longer than -minus_longest
    (`Sizes.as_arguments` says why that is negated).
    """
    start = tl.cast(0, tl.int64)
    length = size
    if cu_seqlens_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b), 0), size)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1), first), size)
        start = first.to(tl.int64)
        length = tl.minimum(last - first, -minus_longest)
    return start, length


@triton.jit
def offset(strides, b, h, start):
    """Where head h of a sequence begins, in elements. 64-bit, since each of the products may pass 2^31."""
    return tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1] + start * strides[2]


@triton.jit
def matrix(ptr, strides, b, h, start):
    return Matrix(ptr + offset(strides, b, h, start), strides[2])


@triton.jit
def _tile_ptrs(x, first, FAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    if FAR:  # the stride is so large that BLOCK of them may pass 2^31
        rows = rows.to(tl.int64)
    return x.base + tl.cast(first, tl.int64) * x.stride + (rows[:, None] * x.stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_tile(
    x, first, limit, D: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, floor=None
):  # fmt: skip
    """Rows [first, first + BLOCK) as [BLOCK, BLOCK_D], with zeros past column D.

    Rows from `limit` on and rows before `floor`, unless these are None, are not loaded and are zeros too.
    """
    ptrs = _tile_ptrs(x, first, FAR, BLOCK, BLOCK_D)
    rows, d = first + tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    loaded = None
    if limit is not None:
        loaded = rows < limit
    if floor is not None:
        loaded = both(loaded, rows >= floor)
    if D != BLOCK_D:
        loaded = both(loaded, d < D)
    return tl.load(ptrs) if loaded is None else tl.load(ptrs, mask=loaded, other=0.0)


@triton.jit
def store_tile(
    x, first, limit, tile, D: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Round `tile` [BLOCK, BLOCK_D] to the dtype of x, and store its rows before `limit` and its columns before D."""
    stored = (first + tl.arange(0, BLOCK)[:, None] < limit) & (tl.arange(0, BLOCK_D)[None, :] < D)
    tl.store(_tile_ptrs(x, first, FAR, BLOCK, BLOCK_D), cast(tile, x.base.dtype.element_ty), mask=stored)


@triton.jit
def load_bound(ptr, strides, b, start, i, Sq):
    """kv_start or kv_end of rows i, in the shape of i; None where ptr is None.

    Rows from Sq on get the bound of row Sq - 1, which changes no minimum and no maximum.
    """
    bound = None
    if ptr is not None:
        bound = tl.load(ptr + offset(strides, b, 0, start) + tl.minimum(i, Sq - 1).to(tl.int64) * strides[2])
    return bound
