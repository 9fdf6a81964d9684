"""The kernel of dq: a tile of query rows of one head."""

from __future__ import annotations

from typing import NamedTuple

from llama_kernels.core.language import cast, dot, tl, triton
from llama_kernels.ops.attention.delta import DeltaInputs, DeltaOutputs, padded_rows, row_terms
from llama_kernels.ops.attention.masks import Mask, key_blocks, over_key_blocks, visible
from llama_kernels.ops.attention.softmax import probs_and_score_grads
from llama_kernels.ops.attention.tiles import (
    Keys,
    columns_of,
    load_bound,
    load_keys,
    load_prefix,
    load_tile,
    matrix,
    query_tile,
    sequences,
    store_tile,
    tiles_of_program,
)
from llama_kernels.ops.rotation import Tables, inverse_rotation


class QueryRows(NamedTuple):
    """A tile of query rows: what dq depends on beside the keys."""

    q: tl.tensor  # [BLOCK_M, BLOCK_D]
    do: tl.tensor  # [BLOCK_M, BLOCK_DV]
    lse2: tl.tensor  # [BLOCK_M, 1] float32
    delta: tl.tensor  # [BLOCK_M, 1] float32


class DqShape(NamedTuple):
    """A `KeyShape`, and which columns of dq a program computes: COLUMNS from column FIRST on."""

    D: tl.constexpr
    DV: tl.constexpr
    FAR: tl.constexpr
    BLOCK_N: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr
    FIRST: tl.constexpr
    COLUMNS: tl.constexpr


@triton.jit
def _add_dq(dq, rows, keys, begin, end, scoring, SHAPE: tl.constexpr, MASKED: tl.constexpr):
    """dq [BLOCK_M, COLUMNS] after the key blocks in [begin, end), some of `keys.blocks`. SHAPE: a `DqShape`."""
    for n in tl.range(begin, end, SHAPE.BLOCK_N):
        k = load_keys(keys.K, n, keys, SHAPE.D, SHAPE.BLOCK_D, SHAPE, MASKED)  # [BLOCK_N, BLOCK_D]
        v = load_keys(keys.V, n, keys, SHAPE.DV, SHAPE.BLOCK_DV, SHAPE, MASKED)  # [BLOCK_N, BLOCK_DV]
        qk = dot(rows.q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        dp = dot(rows.do, tl.trans(v), tl.zeros_like(qk) - rows.delta)
        see = None
        if MASKED:
            see = visible(keys.mask, keys.i, n + tl.arange(0, SHAPE.BLOCK_N)[None, :])
        _, ds = probs_and_score_grads(qk, dp, rows.lse2, see, scoring)
        columns = k
        if SHAPE.COLUMNS != SHAPE.BLOCK_D:
            K = columns_of(keys.K, SHAPE.FIRST)
            columns = load_keys(K, n, keys, SHAPE.D - SHAPE.FIRST, SHAPE.COLUMNS, SHAPE, MASKED)  # [BLOCK_N, COLUMNS]
        dq = dot(cast(ds, k.dtype), columns, dq)
    return dq


@triton.jit(do_not_specialize=["positions"])
def _dq_kernel(
    o_ptr, lse_ptr, dlse_ptr, sinks_ptr, dsinks_ptr, q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr,
    kv_start_ptr, kv_end_ptr, kv_prefix_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    cos_ptr, sin_ptr, position_ids_ptr, list_ptr,
    o_strides, lse_strides, dlse_strides, q_strides, k_strides, v_strides, do_strides, delta_strides, dq_strides,
    kv_start_strides, kv_end_strides, kv_prefix_strides, cos_strides, sin_strides, position_strides,
    sizes, scoring, window, positions,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    PERSISTENT: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq = dS @ k scale, for BLOCK_M rows of one head, over the same key blocks as in the forward.

    q, dq (B, Hq, Sq, D), o, do (B, Hq, Sq, DV), k, v (B, Hkv, Sk, D or DV), lse, dlse (B, Hq, Sq) float32, lse2 and
    delta (B, Hq, padded Sq) float32. dS = P * (do @ v^T - delta), and P = exp2(logits - lse2).
    lse2 and delta are computed from o, lse and dlse, and stored, with dsinks, as delta.py says. If o is None, they are
    read instead.
    Of dq, COLUMNS from column FIRST on: all of them, unless the heads are so wide that a program cannot hold them.
    Sums are float32. With HALF, q was rotated by the tables, and dq gets the inverse rotation.
    Bytes: q, o, do, dq once; k, v once for each row tile, from L2. FLOPs: 2 (2 D + DV) for each visible pair.
    """
    dsinks = 0.0
    for nth in tl.range(0, tiles_of_program(list_ptr, sizes.Hq, BLOCK_M, PERSISTENT), disable_licm=True):
        m, h, b = query_tile(list_ptr, nth, sizes, BLOCK_M)
        q_start, Sq, k_start, Sk = sequences(cu_seqlens_q_ptr, cu_seqlens_k_ptr, b, sizes)
        outputs = DeltaOutputs(lse2_ptr, delta_ptr, delta_strides, cu_seqlens_q_ptr)
        if m < Sq:
            i = m + tl.arange(0, BLOCK_M)[:, None]
            kv_start = load_bound(kv_start_ptr, kv_start_strides, b, q_start, i, Sq)  # [BLOCK_M, 1]
            kv_end = load_bound(kv_end_ptr, kv_end_strides, b, q_start, i, Sq)  # [BLOCK_M, 1]
            prefix = load_prefix(kv_prefix_ptr, kv_prefix_strides, b, q_start, i, Sq, Sk)  # [BLOCK_M, 1]
            mask = Mask(Sk - Sq, window.left, window.right, kv_start, kv_end, Sk, prefix=prefix)
            blocks = key_blocks(mask, m, tl.minimum(m + BLOCK_M, Sq) - 1, BLOCK_N)

            Q = matrix(q_ptr, q_strides, b, h, q_start)
            q = load_tile(Q, m, Sq, D, FAR, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            do = load_tile(matrix(do_ptr, do_strides, b, h, q_start), m, Sq, DV, FAR, BLOCK_M, BLOCK_DV)
            if o_ptr is None:
                padded = padded_rows(outputs, b, h, q_start, i)
                lse2, delta = tl.load(lse2_ptr + padded), tl.load(delta_ptr + padded)  # [BLOCK_M, 1]
            else:
                o = load_tile(matrix(o_ptr, o_strides, b, h, q_start), m, Sq, DV, FAR, BLOCK_M, BLOCK_DV)
                inputs = DeltaInputs(lse_ptr, dlse_ptr, sinks_ptr, lse_strides, dlse_strides)
                row = m + tl.arange(0, BLOCK_M)
                lse2, delta, of_tile = row_terms(o, do, inputs, outputs, b, h, q_start, row, Sq)
                lse2, delta, dsinks = lse2[:, None], delta[:, None], dsinks + of_tile
            rows = QueryRows(q, do, lse2, delta)
            K = matrix(k_ptr, k_strides, b, h // sizes.group, k_start)
            V = matrix(v_ptr, v_strides, b, h // sizes.group, k_start)
            keys = Keys(K, V, mask, i, blocks)
            dq = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
            SHAPE: tl.constexpr = DqShape(D, DV, FAR, BLOCK_N, BLOCK_D, BLOCK_DV, FIRST, COLUMNS)
            dq = over_key_blocks(_add_dq, dq, rows, keys, scoring, SHAPE)
            dq = dq * scoring.scale
            if HALF:
                s = m + tl.arange(0, BLOCK_M)
                tables = Tables(
                    cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, positions
                )
                dq = inverse_rotation(dq, tables, b, q_start + s, s < Sq, HALF, INTERLEAVED, BLOCK_M, BLOCK_D)
            DQ = columns_of(matrix(dq_ptr, dq_strides, b, h, q_start), FIRST)
            store_tile(DQ, m, Sq, dq, D - FIRST, FAR, BLOCK_M, COLUMNS)
        elif o_ptr is not None:
            padded = padded_rows(outputs, b, h, q_start, m + tl.arange(0, BLOCK_M))
            tl.store(lse2_ptr + padded, tl.full([BLOCK_M], float("inf"), tl.float32))
            tl.store(delta_ptr + padded, tl.zeros([BLOCK_M], tl.float32))
    if sinks_ptr is not None:
        tl.store(dsinks_ptr + tl.program_id(0), dsinks)
