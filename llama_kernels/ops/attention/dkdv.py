"""The kernel of dk and dv: a tile of keys of one key head, summed over its query heads."""

from __future__ import annotations

from typing import NamedTuple

from llama_kernels.core.language import cast, dot, tl, triton
from llama_kernels.ops.attention.delta import padded_start
from llama_kernels.ops.attention.masks import Mask, query_blocks, visible
from llama_kernels.ops.attention.softmax import probs_and_score_grads
from llama_kernels.ops.attention.tiles import (
    key_tile,
    length,
    load_bound,
    load_prefix,
    load_tile,
    matrix,
    offset,
    sequence,
    store_tile,
    tiles_of_program,
    zero_of_step,
)
from llama_kernels.ops.rotation import Tables, inverse_rotation


class Bounds(NamedTuple):
    """kv_start, kv_end and kv_prefix of the query rows: pointers, each of which may be None, and strides."""

    start_ptr: tl.tensor
    end_ptr: tl.tensor
    prefix_ptr: tl.tensor
    start_strides: tl.tuple
    end_strides: tl.tuple
    prefix_strides: tl.tuple


class QueryPointers(NamedTuple):
    """The query rows of a sequence, as dk and dv read them.

    Pointers, their strides of batch, head and token, and the number, first token and length of the sequence.
    """

    q_ptr: tl.tensor
    do_ptr: tl.tensor
    lse2_ptr: tl.tensor
    delta_ptr: tl.tensor
    q_strides: tl.tuple
    do_strides: tl.tuple
    delta_strides: tl.tuple  # also of lse2
    bounds: Bounds
    cu_seqlens_ptr: tl.tensor
    b: tl.tensor
    start: tl.tensor
    Sq: tl.tensor


class DkdvShape(NamedTuple):
    """The shapes of a block of q, [BLOCK_M, BLOCK_D], and of do, [BLOCK_M, BLOCK_DV], and what is wanted."""

    D: tl.constexpr
    DV: tl.constexpr
    FAR: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr
    NEED_DK: tl.constexpr
    NEED_DV: tl.constexpr


@triton.jit
def _rows_by_bounds(queries, first, last, Sk, CHUNK: tl.constexpr):
    """By kv_start and kv_end: the rows that may see one of the keys first to last, and the keys that any row sees.

    Both are ranges, (begin, end). The bounds of rows need not be sorted.
    """
    bounds, Sq = queries.bounds, queries.Sq
    begin, end = Sq, 0
    floor, limit = Sk, 0
    if bounds.start_ptr is None:
        floor = 0
    if bounds.end_ptr is None:
        limit = Sk
    for chunk in range(0, Sq, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        sees = i < Sq
        if bounds.start_ptr is not None:
            start = load_bound(bounds.start_ptr, bounds.start_strides, queries.b, queries.start, i, Sq)
            sees &= start <= last
            floor = tl.minimum(floor, tl.min(start))
        if bounds.end_ptr is not None:
            stop = load_bound(bounds.end_ptr, bounds.end_strides, queries.b, queries.start, i, Sq)
            sees &= stop > first
            limit = tl.maximum(limit, tl.max(stop))
        begin = tl.minimum(begin, tl.min(tl.where(sees, i, Sq)))
        end = tl.maximum(end, tl.max(tl.where(sees, i + 1, 0)))
    return begin, end, floor, tl.minimum(limit, Sk)


@triton.jit
def _with_rows_of_prefix(queries, Sk, first, begin, end, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    """The row blocks [begin, end) and those whose kv_prefix reaches key `first`, as one range, and the largest prefix.

    Rows between the two are visited too; the mask hides the keys from them.
    """
    bounds, Sq = queries.bounds, queries.Sq
    prefix_begin, prefix_end, longest = Sq, 0, 0
    for chunk in range(0, Sq, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        prefix = load_prefix(bounds.prefix_ptr, bounds.prefix_strides, queries.b, queries.start, i, Sq, Sk)
        sees = (i < Sq) & (prefix > first)
        longest = tl.maximum(longest, tl.max(prefix))
        prefix_begin = tl.minimum(prefix_begin, tl.min(tl.where(sees, i, Sq)))
        prefix_end = tl.maximum(prefix_end, tl.max(tl.where(sees, i + 1, 0)))
    own = begin < end
    begin = tl.minimum(tl.where(own, begin, Sq), prefix_begin // BLOCK_M * BLOCK_M)
    return begin, tl.maximum(tl.where(own, end, 0), prefix_end), longest


@triton.jit
def _add_dkdv(dk, dv, k, v, j, mask, queries, heads, begin, end, scoring, SHAPE: tl.constexpr):
    """dk and dv of keys j after the row blocks in [begin, end) of some heads. Scores are transposed: [keys, rows].

    Rows past Sq add nothing, since their lse2 is inf and so their p is 0. Keys past Sk are never stored.
    If there is a mask, every block computes it. Separate loops for the blocks at its edges would cost more: registers,
    and a pipeline to fill in each loop of each head. To save registers, nothing is hoisted out of the loops.
    """
    bounds, b, start, Sq = queries.bounds, queries.b, queries.start, queries.Sq
    first_padded = padded_start(queries.cu_seqlens_ptr, b, start)
    BOUNDED: tl.constexpr = bounds.start_ptr is not None or bounds.end_ptr is not None
    MASKED: tl.constexpr = mask.left is not None or mask.right is not None or BOUNDED
    for h in tl.range(heads[0], heads[1], disable_licm=True):
        Q = matrix(queries.q_ptr, queries.q_strides, b, h, start)
        DO = matrix(queries.do_ptr, queries.do_strides, b, h, start)
        padded = offset(queries.delta_strides, b, h, first_padded)
        for m in tl.range(begin, end, SHAPE.BLOCK_M, disable_licm=True):
            i = m + tl.arange(0, SHAPE.BLOCK_M)
            zero = zero_of_step(m)
            q = load_tile(Q, m, Sq, SHAPE.D, SHAPE.FAR, SHAPE.BLOCK_M, SHAPE.BLOCK_D, zero=zero)  # [BLOCK_M, BLOCK_D]
            do = load_tile(DO, m, Sq, SHAPE.DV, SHAPE.FAR, SHAPE.BLOCK_M, SHAPE.BLOCK_DV, zero=zero)
            lse2 = tl.load(queries.lse2_ptr + padded + i)  # [BLOCK_M]
            delta = tl.load(queries.delta_ptr + padded + i)  # [BLOCK_M]
            qk = dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_M]
            # dP - delta: as the accumulator of the product, -delta needs fewer registers than subtracted afterwards.
            dp = dot(v, tl.trans(do), tl.zeros_like(qk) - delta[None, :])
            see = None
            if MASKED:
                kv_start = load_bound(bounds.start_ptr, bounds.start_strides, b, start, i[None, :], Sq)  # [1, BLOCK_M]
                kv_end = load_bound(bounds.end_ptr, bounds.end_strides, b, start, i[None, :], Sq)
                prefix = load_bound(bounds.prefix_ptr, bounds.prefix_strides, b, start, i[None, :], Sq)
                own = Mask(mask.shift, mask.left, mask.right, kv_start, kv_end, prefix=prefix)
                see = visible(own, i[None, :], j)
            p, ds = probs_and_score_grads(qk, dp, lse2[None, :], see, scoring)
            if SHAPE.NEED_DV:
                dv = dot(cast(p, do.dtype), do, dv)
            if SHAPE.NEED_DK:
                dk = dot(cast(ds, q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["positions"])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr,
    kv_start_ptr, kv_end_ptr, kv_prefix_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    cos_ptr, sin_ptr, position_ids_ptr, list_ptr,
    q_strides, k_strides, v_strides, do_strides, delta_strides, dk_strides, dv_strides,
    kv_start_strides, kv_end_strides, kv_prefix_strides, cos_strides, sin_strides, position_strides,
    sizes, scoring, window, positions,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    PERSISTENT: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dv = sum(P^T @ do) and dk = sum(dS^T @ q) scale, for BLOCK_N keys of one key head, summed over its query heads.

    One program sums over the group, in a fixed order and without atomics, so that every run gives the same bits. If
    PARTS is not 1, it sums over sizes.group heads, a part of the group: dk and dv then are float32, and have PARTS
    heads for each key head. Either of dk and dv may be None. Row blocks that see none of the keys are skipped. Sums are
    float32. With HALF, k was rotated by the tables, and dk gets the inverse rotation.
    q, do (B, Hq, Sq, D or DV), k, v, dk, dv (B, Hkv, Sk, D or DV), lse2 and delta (B, Hq, padded Sq) float32, of
    delta.py. P = exp2(logits - lse2), and dS = P * (do @ v^T - delta).
    Bytes: k, v, dk, dv once; q, do, lse2, delta of the group once for each key tile, from L2. FLOPs: 4 (D + DV) for
    each visible pair.
    """
    for nth in tl.range(0, tiles_of_program(list_ptr, sizes.Hq // sizes.group, BLOCK_N, PERSISTENT), disable_licm=True):
        n, h_kv, b, k_start, Sk = key_tile(list_ptr, nth, sizes, cu_seqlens_k_ptr, BLOCK_N)
        q_start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, length(sizes.longest_q))
        if n < Sk:
            j = n + tl.arange(0, BLOCK_N)[:, None]
            last = tl.minimum(n + BLOCK_N, Sk) - 1
            mask = Mask(Sk - Sq, window.left, window.right)
            bounds = Bounds(
                kv_start_ptr, kv_end_ptr, kv_prefix_ptr, kv_start_strides, kv_end_strides, kv_prefix_strides
            )  # fmt: skip
            queries = QueryPointers(
                q_ptr, do_ptr, lse2_ptr, delta_ptr, q_strides, do_strides, delta_strides,
                bounds, cu_seqlens_q_ptr, b, q_start, Sq,
            )  # fmt: skip
            first_row, row_end, floor, limit = 0, Sq, None, Sk
            if kv_start_ptr is not None or kv_end_ptr is not None:
                first_row, row_end, floor, limit = _rows_by_bounds(queries, n, last, Sk, CHUNK=1024)
            if window.left is not None:  # no row's window begins earlier than that of row 0
                own = Sk - Sq - window.left
                floor = own if floor is None else tl.maximum(floor, own)
            begin, end = query_blocks(mask, n, last, first_row, row_end, BLOCK_M)
            prefix = None
            if kv_prefix_ptr is not None:
                begin, end, prefix = _with_rows_of_prefix(queries, Sk, n, begin, end, BLOCK_M, CHUNK=1024)

            K = matrix(k_ptr, k_strides, b, h_kv // PARTS, k_start)
            V = matrix(v_ptr, v_strides, b, h_kv // PARTS, k_start)
            # Keys outside [floor, limit) and the prefix may be NaN, and 0 * NaN is NaN: they are not loaded.
            k = load_tile(K, n, limit, D, FAR, BLOCK_N, BLOCK_D, floor, prefix)  # [BLOCK_N, BLOCK_D]
            v = load_tile(V, n, limit, DV, FAR, BLOCK_N, BLOCK_DV, floor, prefix)  # [BLOCK_N, BLOCK_DV]
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
            heads = (h_kv * sizes.group, h_kv * sizes.group + sizes.group)
            SHAPE: tl.constexpr = DkdvShape(
                D, DV, FAR, BLOCK_M, BLOCK_D, BLOCK_DV, NEED_DK=dk_ptr is not None, NEED_DV=dv_ptr is not None
            )  # fmt: skip
            dk, dv = _add_dkdv(dk, dv, k, v, j, mask, queries, heads, begin, end, scoring, SHAPE)
            if dk_ptr is not None:
                dk = dk * scoring.scale
                if HALF:
                    s = n + tl.arange(0, BLOCK_N)
                    tables = Tables(
                        cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, positions
                    )
                    dk = inverse_rotation(dk, tables, b, k_start + s, s < Sk, HALF, INTERLEAVED, BLOCK_N, BLOCK_D)
                store_tile(matrix(dk_ptr, dk_strides, b, h_kv, k_start), n, Sk, dk, D, FAR, BLOCK_N, BLOCK_D)
            if dv_ptr is not None:
                store_tile(matrix(dv_ptr, dv_strides, b, h_kv, k_start), n, Sk, dv, DV, FAR, BLOCK_N, BLOCK_DV)
