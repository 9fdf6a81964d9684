"""Attention backward (arXiv 2307.08691): delta, then dk and dv a key tile, then dq a row tile. No atomics anywhere.

With P = exp(logits - lse), dP = do @ v^T and delta = rowsum(o * do) - dlse, the gradient of the logits is
dS = P * (dP - delta), and dv = P^T @ do, dk = dS^T @ q, dq = dS @ k. P is recomputed, never stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llama_kernels.core.language import LN2, LOG2E, cast, dot, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv, empty_in_order_of, strides_of
from llama_kernels.ops.attention import hopper
from llama_kernels.ops.attention.layout import (
    Sizes,
    bound_strides,
    call_scoring,
    call_sizes,
    call_widths,
    call_window,
    empty_grads,
    far,
    lse_strides,
    size_arguments,
    width_class,
)
from llama_kernels.ops.attention.tables import tile_for
from llama_kernels.ops.attention.tiles import (
    Mask,
    key_blocks,
    load_bound,
    load_tile,
    matrix,
    offset,
    probs_and_score_grads,
    query_blocks,
    query_tile,
    sequence,
    store_tile,
    visible,
)
from llama_kernels.ops.rotation import Rotation, Tables, inverse_rotation

# --- delta, and the gradient of the sinks ----------------------------------------------------------------------------


# lse2 and delta, which the two big kernels read in tiles, are padded to whole tiles of any BLOCK_M: every sequence of a
# packed batch starts at a multiple of this, so that no tile of one reads the rows of the next.
PADDING: tl.constexpr = tl.constexpr(128)


@triton.jit
def _padded(cu_seqlens_q_ptr, b, q_start):
    """Where the rows of a sequence start in lse2 and delta; `_padded_rows` holds them all."""
    start = q_start
    if cu_seqlens_q_ptr is not None:
        start = (q_start + b * PADDING) // PADDING * PADDING
    return start


def _padded_rows(sizes: Sizes, packed: bool) -> int:
    """Rows of lse2 and delta a batch and head, or all sequences' together where they are packed: whole tiles."""
    return (cdiv(sizes.Sq, PADDING.value) + (sizes.B if packed else 0)) * PADDING.value


@triton.jit
def _delta_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, lse2_ptr, delta_ptr, dsinks_ptr, dq_sum_ptr, cu_seqlens_q_ptr,
    o_strides, do_strides, lse_strides, dlse_strides, delta_strides, dq_sum_strides,
    sizes,
    DV: tl.constexpr, FAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = sum(o * do) - dlse and lse2 = lse / log(2), BLOCK_M rows of one head, and dsinks = -sum(p_sink * delta).

    o, do (B, Hq, Sq, DV); lse, dlse (B, Hq, Sq) float32; dsinks (programs,) float32, summed by head afterwards. Rows
    past Sq, up to the padding, get lse2 = inf and delta = 0; rows without keys lse2 = inf: their probabilities are 0.
    dlse and sinks may be None, and so may dq_sum, as o in float32, which is zeroed on the way for a backward that adds
    to it. Bytes: o and do once. FLOPs: 2 DV a row.
    """
    m, h, b = query_tile(tl.program_id(0), sizes, BLOCK_M)
    start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, sizes.longest_q)
    if sinks_ptr is not None:
        tl.store(dsinks_ptr + tl.program_id(0), 0.0)
    if m >= tl.cdiv(Sq, PADDING) * PADDING:
        return
    i = m + tl.arange(0, BLOCK_M)
    o = load_tile(matrix(o_ptr, o_strides, b, h, start), m, Sq, DV, FAR, BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    do = load_tile(matrix(do_ptr, do_strides, b, h, start), m, Sq, DV, FAR, BLOCK_M, BLOCK_DV)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BLOCK_M]
    if dq_sum_ptr is not None:
        zeros = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        store_tile(matrix(dq_sum_ptr, dq_sum_strides, b, h, start), m, Sq, zeros, DV, FAR, BLOCK_M, BLOCK_DV)
    if dlse_ptr is not None:
        dlse_rows = offset(dlse_strides, b, h, start) + i.to(tl.int64) * dlse_strides[2]
        delta -= tl.load(dlse_ptr + dlse_rows, mask=i < Sq, other=0.0)
    lse = tl.load(lse_ptr + offset(lse_strides, b, h, start) + i, mask=i < Sq, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    padded = offset(delta_strides, b, h, _padded(cu_seqlens_q_ptr, b, start)) + i
    tl.store(delta_ptr + padded, delta)
    # Divided by what the forward multiplied with, to come back to the very bits it had; * LOG2E would be off by a few.
    lse2 = tl.div_rn(lse, tl.full([BLOCK_M], LN2, tl.float32))
    tl.store(lse2_ptr + padded, lse2)
    if sinks_ptr is not None:
        p = tl.exp2(tl.load(sinks_ptr + h).to(tl.float32) * LOG2E - lse2)
        tl.store(dsinks_ptr + tl.program_id(0), -tl.sum(p * delta))


# --- dk and dv -------------------------------------------------------------------------------------------------------


@triton.jit
def _rows_by_bounds(kv_start_ptr, kv_end_ptr, kv_start_strides, kv_end_strides, b, q_start, Sq, first, last,
                    Sk, CHUNK: tl.constexpr):  # fmt: skip
    """First row, and past the last, whose kv_start and kv_end let it see any of keys first to last; first key, and past
    the last, that they let any row see. Neither need be sorted."""
    begin, end = Sq, 0
    lowest, past = Sk, 0
    if kv_start_ptr is None:
        lowest = 0
    if kv_end_ptr is None:
        past = Sk
    for chunk in range(0, Sq, CHUNK):
        i = chunk + tl.arange(0, CHUNK)
        sees = i < Sq
        if kv_start_ptr is not None:
            start = load_bound(kv_start_ptr, kv_start_strides, b, q_start, i, Sq)
            sees &= start <= last
            lowest = tl.minimum(lowest, tl.min(start))
        if kv_end_ptr is not None:
            stop = load_bound(kv_end_ptr, kv_end_strides, b, q_start, i, Sq)
            sees &= stop > first
            past = tl.maximum(past, tl.max(stop))
        begin = tl.minimum(begin, tl.min(tl.where(sees, i, Sq)))
        end = tl.maximum(end, tl.max(tl.where(sees, i + 1, 0)))
    return begin, end, lowest, tl.minimum(past, Sk)


@triton.jit
def _add_dkdv(
    dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, kv_start_ptr, kv_end_ptr,
    q_strides, do_strides, delta_strides, kv_start_strides, kv_end_strides,
    mask, j, b, h_kv, group, q_start, padded_start, Sq, begin, end, scoring,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv after the row blocks of every head of the group. Scores lie on their side: keys run down, rows across.
    Rows past Sq take no part: their lse2 is inf, their p 0. Nor do keys past Sk: nobody stores them.

    Every block is masked, if there is a mask: two loops of their own for the edges cost more, in pipelines filled and
    drained for each head and in registers, than the compares do. For the registers' sake nothing is hoisted either.
    """
    BOUNDED: tl.constexpr = kv_start_ptr is not None or kv_end_ptr is not None
    MASKED: tl.constexpr = mask.left is not None or mask.right is not None or BOUNDED
    for h in tl.range(h_kv * group, h_kv * group + group, disable_licm=True):
        Q, DO = matrix(q_ptr, q_strides, b, h, q_start), matrix(do_ptr, do_strides, b, h, q_start)
        padded = offset(delta_strides, b, h, padded_start)
        for m in tl.range(begin, end, BLOCK_M, disable_licm=True):
            i = m + tl.arange(0, BLOCK_M)
            q = load_tile(Q, m, Sq, D, FAR, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            do = load_tile(DO, m, Sq, DV, FAR, BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
            lse2, delta = tl.load(lse2_ptr + padded + i), tl.load(delta_ptr + padded + i)  # [BLOCK_M]
            qk = dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_M]
            # dP - delta: the product itself takes it off, which needs fewer registers than to do it afterwards.
            dp = dot(v, tl.trans(do), tl.zeros_like(qk) - delta[None, :])
            see = None
            if MASKED:
                kv_start = load_bound(kv_start_ptr, kv_start_strides, b, q_start, i[None, :], Sq)  # [1, BLOCK_M]
                kv_end = load_bound(kv_end_ptr, kv_end_strides, b, q_start, i[None, :], Sq)
                see = visible(Mask(mask.shift, mask.left, mask.right, kv_start, kv_end, None), i[None, :], j)
            p, ds = probs_and_score_grads(qk, dp, lse2[None, :], see, scoring)
            if NEED_DV:
                dv = dot(cast(p, do.dtype), do, dv)
            if NEED_DK:
                dk = dot(cast(ds, q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["positions"])
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr,
    kv_start_ptr, kv_end_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, cos_ptr, sin_ptr, position_ids_ptr,
    q_strides, k_strides, v_strides, do_strides, delta_strides, dk_strides, dv_strides,
    kv_start_strides, kv_end_strides, cos_strides, sin_strides, position_strides,
    sizes, scoring, window, positions,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dv = sum(P^T @ do) and dk = sum(dS^T @ q) scale, for BLOCK_N keys of one key head, summed over its query heads.

    The sum over the group happens here, in one program and one order: no atomics, no second pass, same bits every run.
    Either of dk and dv may be None. Row blocks that see none of the keys are not visited. float32 sums. With HALF,
    k was rotated by the tables, and dk is turned back by them.
    Bytes: k, v, dk, dv once; q, do, lse, delta of the group once a key tile, from L2. FLOPs: 4 (D + DV) a visible pair.
    """
    pid, Hkv = tl.program_id(0), sizes.Hq // sizes.group
    h_kv, b = pid % Hkv, pid // Hkv % sizes.B
    n = pid // (Hkv * sizes.B) * BLOCK_N  # the first keys, which under a causal mask most rows see, come first
    q_start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, sizes.longest_q)
    k_start, Sk = sequence(cu_seqlens_k_ptr, b, -sizes.Sk, sizes.longest_k)
    if n >= Sk:
        return
    j = n + tl.arange(0, BLOCK_N)[:, None]
    last = tl.minimum(n + BLOCK_N, Sk) - 1
    mask = Mask(Sk - Sq, window.left, window.right, None, None, None)
    first_row, row_end, lowest, past = 0, Sq, None, Sk
    if kv_start_ptr is not None or kv_end_ptr is not None:
        first_row, row_end, lowest, past = _rows_by_bounds(
            kv_start_ptr, kv_end_ptr, kv_start_strides, kv_end_strides, b, q_start, Sq, n, last, Sk, CHUNK=1024
        )
    begin, end = query_blocks(mask, n, last, first_row, row_end, BLOCK_M)

    K, V = matrix(k_ptr, k_strides, b, h_kv, k_start), matrix(v_ptr, v_strides, b, h_kv, k_start)
    # Keys that no row sees may be anything, and 0 times NaN is NaN: they stay unread.
    k = load_tile(K, n, past, D, FAR, BLOCK_N, BLOCK_D, lowest)  # [BLOCK_N, BLOCK_D]
    v = load_tile(V, n, past, DV, FAR, BLOCK_N, BLOCK_DV, lowest)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dk, dv = _add_dkdv(
        dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, kv_start_ptr, kv_end_ptr,
        q_strides, do_strides, delta_strides, kv_start_strides, kv_end_strides,
        mask, j, b, h_kv, sizes.group, q_start, _padded(cu_seqlens_q_ptr, b, q_start), Sq, begin, end, scoring,
        D, DV, FAR, dk_ptr is not None, dv_ptr is not None, BLOCK_M, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    if dk_ptr is not None:
        dk = dk * scoring.scale
        if HALF:
            s = n + tl.arange(0, BLOCK_N)
            tables = Tables(cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, positions)
            dk = inverse_rotation(dk, tables, b, k_start + s, s < Sk, HALF, INTERLEAVED, BLOCK_N, BLOCK_D)
        store_tile(matrix(dk_ptr, dk_strides, b, h_kv, k_start), n, Sk, dk, D, FAR, BLOCK_N, BLOCK_D)
    if dv_ptr is not None:
        store_tile(matrix(dv_ptr, dv_strides, b, h_kv, k_start), n, Sk, dv, DV, FAR, BLOCK_N, BLOCK_DV)


# --- dq --------------------------------------------------------------------------------------------------------------


@triton.jit
def _add_dq(
    dq, q, do, lse2, delta, K, V, mask, i, blocks, begin, end, scoring,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq after the key blocks from begin to end. lse2, delta and i are [BLOCK_M, 1]."""
    limit = blocks.end if MASKED else None
    floor = blocks.first if MASKED and mask.kv_start is not None else None
    for n in tl.range(begin, end, BLOCK_N):
        k = load_tile(K, n, limit, D, FAR, BLOCK_N, BLOCK_D, floor)  # [BLOCK_N, BLOCK_D]
        v = load_tile(V, n, limit, DV, FAR, BLOCK_N, BLOCK_DV, floor)  # [BLOCK_N, BLOCK_DV]
        qk = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        dp = dot(do, tl.trans(v), tl.zeros_like(qk) - delta)
        see = None
        if MASKED:
            see = visible(mask, i, n + tl.arange(0, BLOCK_N)[None, :])
        _, ds = probs_and_score_grads(qk, dp, lse2, see, scoring)
        dq = dot(cast(ds, k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["positions"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr,
    kv_start_ptr, kv_end_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, cos_ptr, sin_ptr, position_ids_ptr,
    q_strides, k_strides, v_strides, do_strides, delta_strides, dq_strides,
    kv_start_strides, kv_end_strides, cos_strides, sin_strides, position_strides,
    sizes, scoring, window, positions,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq = dS @ k scale, for BLOCK_M rows of one head; it walks the same key blocks as the forward. float32 sums. With
    HALF, q was rotated by the tables, and dq is turned back by them.

    Bytes: q, do, dq once; k, v once a row tile, from L2. FLOPs: 2 (2 D + DV) a visible pair.
    """
    m, h, b = query_tile(tl.program_id(0), sizes, BLOCK_M)
    q_start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, sizes.longest_q)
    k_start, Sk = sequence(cu_seqlens_k_ptr, b, -sizes.Sk, sizes.longest_k)
    if m >= Sq:
        return
    i = m + tl.arange(0, BLOCK_M)[:, None]
    kv_start = load_bound(kv_start_ptr, kv_start_strides, b, q_start, i, Sq)  # [BLOCK_M, 1]
    kv_end = load_bound(kv_end_ptr, kv_end_strides, b, q_start, i, Sq)  # [BLOCK_M, 1]
    mask = Mask(Sk - Sq, window.left, window.right, kv_start, kv_end, Sk)
    blocks = key_blocks(mask, m, tl.minimum(m + BLOCK_M, Sq) - 1, BLOCK_N)

    q = load_tile(matrix(q_ptr, q_strides, b, h, q_start), m, Sq, D, FAR, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = load_tile(matrix(do_ptr, do_strides, b, h, q_start), m, Sq, DV, FAR, BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    padded = offset(delta_strides, b, h, _padded(cu_seqlens_q_ptr, b, q_start)) + i
    lse2, delta = tl.load(lse2_ptr + padded), tl.load(delta_ptr + padded)  # [BLOCK_M, 1]
    K = matrix(k_ptr, k_strides, b, h // sizes.group, k_start)
    V = matrix(v_ptr, v_strides, b, h // sizes.group, k_start)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if window.left is not None or kv_start_ptr is not None:
        dq = _add_dq(
            dq, q, do, lse2, delta, K, V, mask, i, blocks, blocks.begin, blocks.full_begin, scoring,
            D, DV, FAR, True, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    dq = _add_dq(
        dq, q, do, lse2, delta, K, V, mask, i, blocks, blocks.full_begin, blocks.full_end, scoring,
        D, DV, FAR, False, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    dq = _add_dq(
        dq, q, do, lse2, delta, K, V, mask, i, blocks, blocks.full_end, blocks.end, scoring,
        D, DV, FAR, True, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    dq = dq * scoring.scale
    if HALF:
        s = m + tl.arange(0, BLOCK_M)
        tables = Tables(cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, positions)
        dq = inverse_rotation(dq, tables, b, q_start + s, s < Sq, HALF, INTERLEAVED, BLOCK_M, BLOCK_D)
    store_tile(matrix(dq_ptr, dq_strides, b, h, q_start), m, Sq, dq, D, FAR, BLOCK_M, BLOCK_D)


# --- launcher --------------------------------------------------------------------------------------------------------


@cached_launch
def _plan_delta(o, do, lse, dlse, sinks, lse2, delta, shares, dq_sum, cu_seqlens_q, sizes) -> Iterator[Launch]:
    BLOCK_DV, BLOCK_M = width_class(o.shape[-1]), _delta_rows(o)
    yield Launch(
        _delta_kernel,
        (_delta_tiles(sizes, BLOCK_M) * sizes.B * sizes.Hq,),
        (
            o, do, lse, dlse, sinks, lse2, delta, shares, dq_sum, cu_seqlens_q,
            strides_of(o), strides_of(do), lse_strides(lse), None if dlse is None else lse_strides(dlse),
            lse_strides(delta), None if dq_sum is None else strides_of(dq_sum), size_arguments(sizes),
        ),
        {"DV": o.shape[-1], "FAR": far(o, do), "BLOCK_M": BLOCK_M, "BLOCK_DV": BLOCK_DV, "num_warps": 4},
    )  # fmt: skip


def _delta_rows(o: torch.Tensor) -> int:
    """A program's: 32 elements a thread, and a divisor of PADDING."""
    return min(max(4096 // width_class(o.shape[-1]), 16), PADDING.value)


def _delta_tiles(sizes: Sizes, BLOCK_M: int) -> int:
    return cdiv(sizes.longest_q, PADDING.value) * (PADDING.value // BLOCK_M)


def _launch_delta(o, do, lse, dlse, sinks, dsinks, dq_sum, cu_seqlens_q, sizes):
    """lse2 and delta, (B, Hq, padded Sq) or packed (Hq, padded Tq), and dsinks, filled where `sinks` is given."""
    lse2, delta = lse.new_empty(2, *lse.shape[:-1], _padded_rows(sizes, cu_seqlens_q is not None))
    tiles = _delta_tiles(sizes, _delta_rows(o)) * sizes.B
    if not tiles * sizes.Hq:
        return lse2, delta, dsinks.zero_()
    shares = None if sinks is None else lse.new_empty(tiles, sizes.Hq)  # heads run fastest over programs
    _plan_delta(o, do, lse, dlse, sinks, lse2, delta, shares, dq_sum, cu_seqlens_q, sizes)
    return lse2, delta, dsinks if sinks is None else shares.sum(0).to(sinks.dtype)


@cached_launch
def _plan(
    q, k, v, do, lse2, delta, dq, dk, dv, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, sizes,
    scale, softcap, left, right, *rotation,
) -> Iterator[Launch]:  # fmt: skip
    """dq, dk and dv are None where not needed."""
    turned = Rotation(*rotation)
    # What both kernels take, in their order.
    given, given_strides = (q, k, v, do, lse2, delta), (*map(strides_of, (q, k, v, do)), lse_strides(delta))
    bounds = (kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, *turned.tensors)
    bounds_strides = (bound_strides(kv_start), bound_strides(kv_end), *turned.strides)
    window = call_window(left, right, sizes.longest_q, sizes.longest_k)
    rest = (size_arguments(sizes), call_scoring(scale, softcap), window, turned.positions)
    flags = {**call_widths(q, v), "FAR": far(q, k, v, do), "HALF": turned.half, "INTERLEAVED": turned.interleaved}

    tile = tile_for("dkdv", q, v, softcap is not None or kv_end is not None)
    programs = cdiv(sizes.longest_k, tile.BLOCK_N) * sizes.B * (sizes.Hq // sizes.group)
    for pair in ((dk, None), (None, dv)) if tile.split else ((dk, dv),):
        if programs and pair != (None, None):
            yield Launch(
                _dkdv_kernel,
                (programs,),
                (
                    *given, *pair, *bounds,
                    *given_strides, *(None if x is None else strides_of(x) for x in pair), *bounds_strides, *rest,
                ),
                {**flags, **tile.launch_options},
            )  # fmt: skip

    crowded = softcap is not None or left is not None or kv_start is not None or kv_end is not None
    tile = tile_for("dq", q, v, crowded or turned.half > 0)
    programs = cdiv(sizes.longest_q, tile.BLOCK_M) * sizes.B * sizes.Hq
    if programs and dq is not None:
        yield Launch(
            _dq_kernel,
            (programs,),
            (*given, dq, *bounds, *given_strides, strides_of(dq), *bounds_strides, *rest),
            {**flags, **tile.launch_options},
        )


def launch_backward(
    do, dlse, q, k, v, o, lse, sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k,
    scale, softcap, left, right, need_dq, need_dk, need_dv, need_dsinks, deterministic=None, rotation=Rotation(),
):  # fmt: skip
    """Launch; arguments and results as `llama_kernels::attention_backward`. dq and dk are turned back by `rotation`,
    where it is given, before they are rounded."""
    dq, dk, dv, dsinks = empty_grads(q, k, v, sinks, need_dq, need_dk, need_dv, need_dsinks)
    sizes = call_sizes(q, k, cu_seqlens_q, longest_q, longest_k)
    if cu_seqlens_q is not None or not sizes.Hq:  # no program visits a token that no sequence owns, or no head reads
        for grad in (dq, dk, dv):
            grad.zero_()
    needed = (need_dq, need_dk, need_dv)
    tile = hopper.backward_tile(do, q, k, v, kv_start, kv_end, softcap, deterministic, *needed)
    dq_sum = None if tile is None else empty_in_order_of(dq, dtype=torch.float32)
    lse2, delta, dsinks = _launch_delta(
        o, do, lse, dlse, sinks if need_dsinks else None, dsinks, dq_sum, cu_seqlens_q, sizes
    )
    call = (cu_seqlens_q, cu_seqlens_k, sizes, scale, softcap, left, right)
    if tile is not None:
        given = (do, q, k, v, lse2, delta, dq_sum, dq, dk, dv, *call, PADDING.value, rotation)
        if hopper.try_backward(tile, *given):
            return dq, dk, dv, dsinks
    grads = (grad if need else None for grad, need in zip((dq, dk, dv), needed, strict=True))
    _plan(q, k, v, do, lse2, delta, *grads, kv_start, kv_end, *call, *rotation)
    return dq, dk, dv, dsinks
