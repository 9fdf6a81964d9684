"""Where the tiles of the attention kernels lie in memory, and how they are loaded and stored.

Names in all kernels: query row i of a sequence of Sq, key j of one of Sk; a tile has BLOCK_M query rows and BLOCK_N
keys; heads of q and k are D wide, those of v DV, in tiles of BLOCK_D and BLOCK_DV columns, the next powers of two. Each
tensor is addressed by its strides of (batch, head, token). In a packed batch the stride of the batch is 0, and each
sequence starts at its own token.
"""

from __future__ import annotations

from typing import NamedTuple

from llama_kernels.core.language import INTERPRETED, TRITON_VERSION, cast, tl, triton
from llama_kernels.ops.attention.masks import KeyBlocks, Mask, both, floor_of

# Tokens of a block of a packed sequence. The rows or keys of every tile divide it.
PACKED_BLOCK: tl.constexpr = tl.constexpr(128)

_OWN_ADDRESSES: tl.constexpr = tl.constexpr(TRITON_VERSION >= (3, 7) and not INTERPRETED)


class Matrix(NamedTuple):
    """One head of one sequence: row r begins at base + r * stride."""

    base: tl.tensor
    stride: tl.tensor


class Keys(NamedTuple):
    """The keys that a tile of query rows reads, and which of them each row sees."""

    K: Matrix
    V: Matrix
    mask: Mask
    i: tl.tensor  # the rows, [BLOCK_M, 1]
    blocks: KeyBlocks


class KeyShape(NamedTuple):
    """The shapes of a block of k, [BLOCK_N, BLOCK_D], and of v, [BLOCK_N, BLOCK_DV], at compile time."""

    D: tl.constexpr
    DV: tl.constexpr
    FAR: tl.constexpr
    BLOCK_N: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr


@triton.jit
def tiles_of_program(list_ptr, heads, ROWS: tl.constexpr, PERSISTENT: tl.constexpr):
    """How many tiles this program computes. A tile is ROWS query rows or keys of one head.

    One, if the batch is dense (list_ptr is None). In a packed batch, program p of P computes tile p, if there is one;
    with PERSISTENT also tiles p + P, p + 2 P and so on.
    """
    count = 1
    if list_ptr is not None:
        pid, P = tl.program_id(0), tl.num_programs(0)
        tiles = tl.load(list_ptr) * (heads * (PACKED_BLOCK // ROWS))
        if PERSISTENT:
            count = (tiles + P - 1 - pid) // P
        else:
            count = (pid < tiles).to(tl.int32)
    return count


@triton.jit
def listed_tile(list_ptr, nth, heads, ROWS: tl.constexpr):
    """The head, sequence, block, and place in the block of this program's tile number `nth` in a packed batch.

    Heads run fastest, so that programs that run at the same time share keys.
    """
    tile_index = tl.program_id(0) + nth * tl.num_programs(0)
    place = tile_index // heads % (PACKED_BLOCK // ROWS)
    entry = list_ptr + 2 + tile_index // (heads * (PACKED_BLOCK // ROWS)) * 2
    return tile_index % heads, tl.load(entry), tl.load(entry + 1), place


@triton.jit
def query_tile(list_ptr, nth, sizes, BLOCK_M: tl.constexpr):
    """First row, head and batch of this program's tile of query rows; in a packed batch, of its tile number `nth`.

    The last rows come first, since under a causal mask they see the most keys. Heads run fastest, so that programs that
    run at the same time share keys.
    """
    if list_ptr is None:
        pid, heads = tl.program_id(0), sizes.B * sizes.Hq
        tile_index = tl.num_programs(0) // heads - 1 - pid // heads
        m, h, b = tile_index * BLOCK_M, pid % sizes.Hq, pid // sizes.Hq % sizes.B
    else:
        h, b, block, place = listed_tile(list_ptr, nth, sizes.Hq, BLOCK_M)
        m = block * PACKED_BLOCK + (PACKED_BLOCK // BLOCK_M - 1 - place) * BLOCK_M
    return m, h, b


@triton.jit
def length(argument):
    """The number that `Sizes.as_arguments` passes less 2^31: all bits but the sign."""
    return argument & 0x7FFFFFFF


@triton.jit
def sequence(cu_seqlens_ptr, b, size, longest):
    """First token and length of sequence b. size: tokens of the tensor.

    cu_seqlens is clamped, so that no sequence reaches outside the tensor or is longer than `longest`.
    """
    start = tl.cast(0, tl.int64)
    count = size
    if cu_seqlens_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b), 0), size)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1), first), size)
        start = first.to(tl.int64)
        count = tl.minimum(last - first, longest)
    return start, count


@triton.jit
def sequences(cu_seqlens_q_ptr, cu_seqlens_k_ptr, b, sizes):
    """First token and length of the queries of sequence b, then of its keys. sizes: `Sizes.as_arguments`."""
    q_start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, length(sizes.longest_q))
    k_start, Sk = sequence(cu_seqlens_k_ptr, b, length(sizes.Sk), length(sizes.longest_k))
    return q_start, Sq, k_start, Sk


@triton.jit
def key_tile(list_ptr, nth, sizes, cu_seqlens_k_ptr, BLOCK_N: tl.constexpr, at_once=None):
    """First key, key head and batch of a tile, as `query_tile`, and first token and number of keys of its sequence.

    The first keys come first, since under a causal mask the most rows see them. Heads run fastest, of a dense batch the
    first `at_once` of all sequences' key heads, then the next; None: all.
    """
    Hkv = sizes.Hq // sizes.group
    if list_ptr is None:
        pid, heads = tl.program_id(0), Hkv * sizes.B
        first = 0
        if at_once is not None:
            tiles = tl.num_programs(0) // heads
            first = pid // (at_once * tiles) * at_once
            pid -= first * tiles
            heads = tl.minimum(at_once, heads - first)
        n, head = pid // heads * BLOCK_N, first + pid % heads
        h_kv, b = head % Hkv, head // Hkv
        k_start, Sk = sequence(cu_seqlens_k_ptr, b, length(sizes.Sk), length(sizes.longest_k))
    else:
        h_kv, b, block, place = listed_tile(list_ptr, nth, Hkv, BLOCK_N)
        k_start, Sk = sequence(cu_seqlens_k_ptr, b, length(sizes.Sk), length(sizes.longest_k))
        n = (tl.cdiv(Sk, PACKED_BLOCK) - 1 - block) * PACKED_BLOCK + place * BLOCK_N
    return n, h_kv, b, k_start, Sk


@triton.jit
def offset(strides, b, h, start):
    """Where head h of a sequence begins, in elements. 64-bit, since each of the products may pass 2^31."""
    return tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1] + start * strides[2]


@triton.jit
def matrix(ptr, strides, b, h, start):
    """Head h of the sequence of batch b that begins at token `start`."""
    return Matrix(ptr + offset(strides, b, h, start), strides[2])


@triton.jit
def columns_of(x, first: tl.constexpr):
    """x from column `first` on."""
    return Matrix(x.base + first, x.stride)


@triton.jit
def zero_of_step(m):
    """0, from inline PTX that depends on the step m of a loop, so that the compiler cannot know the value.

    Row numbers to which it is added are multiplied by their stride in each step. Otherwise the compiler multiplies them
    before the loop, and keeps the products in registers. From Triton 3.7 on these are too many for dk and dv on Hopper.
    None on other GPUs, and under older releases.
    """
    zero = None
    if _OWN_ADDRESSES and tl.target_info.cuda_capability_geq(9, 0) and not tl.target_info.cuda_capability_geq(10, 0):
        zero = tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [m], dtype=tl.int32, is_pure=True, pack=1)
    return zero


@triton.jit
def tile_ptrs(x, first, FAR: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, zero=None):
    """Pointers [ROWS, BLOCK_D] to the rows from `first` on of the Matrix x. zero: see `zero_of_step`."""
    rows = tl.arange(0, ROWS)
    if zero is not None:
        rows += zero
    if FAR:  # the stride is so large that ROWS of them may pass 2^31
        rows = rows.to(tl.int64)
    return x.base + tl.cast(first, tl.int64) * x.stride + (rows[:, None] * x.stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_tile(
    x, first, limit, D: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, floor=None,
    prefix=None, zero=None,
):  # fmt: skip
    """Rows [first, first + ROWS) as [ROWS, BLOCK_D], with zeros past column D.

    Only rows in [floor, limit) and the first `prefix` rows of x are loaded; the others are zeros. A `floor` or `limit`
    of None does not restrict the rows. A `prefix` of None adds none. zero: see `zero_of_step`.
    """
    ptrs = tile_ptrs(x, first, FAR, ROWS, BLOCK_D, zero)
    rows, d = first + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    loaded = None
    if limit is not None:
        loaded = rows < limit
    if floor is not None:
        loaded = both(loaded, rows >= floor)
    if prefix is not None and loaded is not None:
        loaded = loaded | (rows < prefix)
    if D != BLOCK_D:
        loaded = both(loaded, d < D)
    return tl.load(ptrs) if loaded is None else tl.load(ptrs, mask=loaded, other=0.0)


@triton.jit
def load_keys(
    x, n, keys, D: tl.constexpr, BLOCK_D: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """The block of keys from n on of x, which is `keys.K`, `keys.V` or columns of one: [BLOCK_N, BLOCK_D].

    Of a block that is MASKED, only the keys that some row may see are loaded: those from the first to the last of
    `KeyBlocks`, and those of a prefix. The others are zeros. A key among those loaded that no row sees must be finite:
    its probability is 0, and 0 * NaN is NaN.
    """
    limit, floor, prefix = None, None, None
    if MASKED:
        limit = keys.blocks.end
        floor = floor_of(keys.mask, keys.blocks)
        if keys.mask.prefix is not None:
            prefix = keys.blocks.prefix
    return load_tile(x, n, limit, D, SHAPE.FAR, SHAPE.BLOCK_N, BLOCK_D, floor, prefix)


@triton.jit
def store_tile(
    x, first, limit, values, D: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Round `values` [ROWS, BLOCK_D] to the dtype of x, and store its rows before `limit` and its columns before D."""
    stored = (first + tl.arange(0, ROWS)[:, None] < limit) & (tl.arange(0, BLOCK_D)[None, :] < D)
    tl.store(tile_ptrs(x, first, FAR, ROWS, BLOCK_D), cast(values, x.base.dtype.element_ty), mask=stored)


@triton.jit
def load_bound(ptr, strides, b, start, i, Sq):
    """kv_start or kv_end of rows i, in the shape of i; None where ptr is None.

    Rows from Sq on get the bound of row Sq - 1, so that the minimum and maximum over a tile are those of its rows.
    """
    bound = None
    if ptr is not None:
        bound = tl.load(ptr + offset(strides, b, 0, start) + tl.minimum(i, Sq - 1).to(tl.int64) * strides[2])
    return bound


@triton.jit
def load_prefix(ptr, strides, b, start, i, Sq, Sk):
    """kv_prefix of rows i, as `load_bound`, at most Sk."""
    prefix = load_bound(ptr, strides, b, start, i, Sq)
    if prefix is not None:
        prefix = tl.minimum(prefix, Sk)
    return prefix
