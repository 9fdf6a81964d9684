"""What the backward computes first: delta and lse2 of every row, and the gradient of the sinks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.core.language import LN2, LOG2E, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv, optional_strides_of, require_contiguous, strides_of
from llama_kernels.ops.attention.call import (
    AttentionCall,
    Results,
    Sizes,
    far,
    lse_strides,
    width_class,
)
from llama_kernels.ops.attention.tile_list import Fill, TileLists, list_tiles, programs_for
from llama_kernels.ops.attention.tiles import (
    PACKED_BLOCK,
    length,
    load_tile,
    matrix,
    offset,
    query_tile,
    sequence,
    store_tile,
    tiles_of_program,
)

# Rows of lse2 and delta are padded to a multiple of this, which every BLOCK_M divides. In a packed batch each sequence
# starts at a multiple of it, so that a tile of one sequence never loads the rows of the next.
PADDING: tl.constexpr = PACKED_BLOCK


@triton.jit
def padded_start(cu_seqlens_q_ptr, b, q_start):
    """Where the rows of a sequence start in lse2 and delta."""
    start = q_start
    if cu_seqlens_q_ptr is not None:
        start = (q_start + b * PADDING) // PADDING * PADDING
    return start


@triton.jit
def _delta_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, lse2_ptr, delta_ptr, dsinks_ptr, dq_sum_ptr,
    cu_seqlens_q_ptr, list_ptr,
    o_strides, do_strides, lse_strides, dlse_strides, delta_strides, dq_sum_strides,
    sizes,
    DV: tl.constexpr, FAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = sum(o * do) - dlse and lse2 = lse / log(2), BLOCK_M rows of one head, and dsinks = -sum(p_sink * delta).

    o, do (B, Hq, Sq, DV); lse, dlse (B, Hq, Sq) float32; dsinks (programs,) float32, summed by head afterwards. Rows
    without visible keys, and padding rows, get lse2 = inf, so that their probabilities are 0. dlse and sinks may be
    None. dq_sum, float32 as o, or None, is zeroed for a backward that adds to it. Bytes: o and do once. FLOPs: 2 DV for
    each row.
    """
    dsinks = 0.0
    for nth in tl.range(0, tiles_of_program(list_ptr, sizes.Hq, BLOCK_M, True), disable_licm=True):
        m, h, b = query_tile(list_ptr, nth, sizes, BLOCK_M)
        start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, length(sizes.longest_q))
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
        padded = offset(delta_strides, b, h, padded_start(cu_seqlens_q_ptr, b, start)) + i
        tl.store(delta_ptr + padded, delta)
        # The inverse of the forward's * LN2. Division gives back the forward's bits; * LOG2E would be a few ulps off.
        lse2 = tl.div_rn(lse, tl.full([BLOCK_M], LN2, tl.float32))
        tl.store(lse2_ptr + padded, lse2)
        if sinks_ptr is not None:
            p = tl.exp2(tl.load(sinks_ptr + h).to(tl.float32) * LOG2E - lse2)
            dsinks -= tl.sum(p * delta)
    if sinks_ptr is not None:
        tl.store(dsinks_ptr + tl.program_id(0), dsinks)


# --- launcher --------------------------------------------------------------------------------------------------------


class _ListArguments(NamedTuple):
    """The arguments of `list_tiles`, whose launch comes before this one in a packed batch."""

    lists: TileLists
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    fill: Fill


@cached_launch
def _launch_delta_kernels(
    o: torch.Tensor, do: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None, sinks: torch.Tensor | None,
    lse2: torch.Tensor, delta: torch.Tensor, shares: torch.Tensor | None, dq_sum: torch.Tensor | None,
    listing: _ListArguments | None, sizes: tuple[int, ...],
) -> list[Launch]:  # fmt: skip
    """The launch that fills lse2, delta, shares and dq_sum; in a packed batch, after that of the tile lists.

    shares: (programs / Hq, Hq) float32, the part of each program in dsinks; None, as sinks, where that is not wanted.
    The tensors are passed one by one, and sizes as a plain tuple: expanding named tuples in the cache key would take
    each dense call 1.7 us.
    """
    require_contiguous(lse, sinks)
    sizes = Sizes(*sizes)
    BLOCK_DV, BLOCK_M = width_class(o.shape[-1]), _rows_per_program(o)
    launches, list_q, cu_seqlens_q = [], None, None
    if listing is not None:
        list_q, cu_seqlens_q = listing.lists.of_q, listing.cu_seqlens_q
        launches.append(list_tiles(listing.lists, cu_seqlens_q, listing.cu_seqlens_k, sizes, listing.fill))
    args = (
        o, do, lse, dlse, sinks, lse2, delta, shares, dq_sum, cu_seqlens_q, list_q,
        strides_of(o), strides_of(do), lse_strides(lse), None if dlse is None else lse_strides(dlse),
        lse_strides(delta), optional_strides_of(dq_sum), sizes.as_arguments(),
    )  # fmt: skip
    options = {"DV": o.shape[-1], "FAR": far(o, do), "BLOCK_M": BLOCK_M, "BLOCK_DV": BLOCK_DV, "num_warps": 4}
    programs = _programs(sizes, BLOCK_M, packed=listing is not None)
    return [*launches, Launch(_delta_kernel, (programs,), args, options)]


def _rows_per_program(o: torch.Tensor) -> int:
    """32 elements per thread; a divisor of PADDING."""
    return min(max(4096 // width_class(o.shape[-1]), 16), PADDING.value)


def _programs(sizes: Sizes, BLOCK_M: int, packed: bool) -> int:
    """A multiple of Hq. Packed or dense, they write the rows up to the next multiple of PADDING."""
    if packed:
        return programs_for(sizes.Sq, sizes.B, sizes.Hq, BLOCK_M, persistent=True)
    return cdiv(sizes.Sq, PADDING.value) * (PADDING.value // BLOCK_M) * sizes.B * sizes.Hq


def launch_delta(
    call: AttentionCall, results: Results, sizes: Sizes, need_dsinks: bool, dq_sum: torch.Tensor | None,
    lists: TileLists | None, fill: Fill,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """lse2 and delta, each (B, Hq, padded Sq) or packed (Hq, padded Tq) in float32, and dsinks, or None.

    dq_sum, unless it is None, is zeroed. Packed, `lists` and `fill` are written first. There is at least one row.
    """
    out, lse, sinks = results.out, results.lse, call.sinks if need_dsinks else None
    rows = (cdiv(sizes.Sq, PADDING.value) + (sizes.B if call.packed else 0)) * PADDING.value
    shape = (*lse.shape[:-1], rows)
    lse2, delta = lse.new_empty(shape), lse.new_empty(shape)
    programs = _programs(sizes, _rows_per_program(out), call.packed)
    # Heads run fastest over the programs.
    shares = None if sinks is None else lse.new_empty(programs // sizes.Hq, sizes.Hq)
    listing = lists and _ListArguments(lists, call.cu_seqlens_q, call.cu_seqlens_k, fill)
    _launch_delta_kernels(out, results.do, lse, results.dlse, sinks, lse2, delta, shares, dq_sum, listing, tuple(sizes))
    return lse2, delta, None if sinks is None or shares is None else shares.sum(0).to(sinks.dtype)
