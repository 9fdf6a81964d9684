"""What the backward computes first: delta and lse2 of every row, and the gradient of the sinks.

The kernel of dq computes them for its own rows with `row_terms`, and stores them for dk and dv. This saves a read of do
and a launch. The kernel in this file computes them in five cases: dq is not wanted; dq takes several launches; the
tensors are float32; the tile of dq has too few registers; the Hopper backward runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.core.language import LN2, LOG2E, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv, optional_strides_of, require_contiguous, strides_of
from llama_kernels.ops.attention.call import (
    AttentionCall,
    Grads,
    Results,
    RowInputs,
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


class DeltaInputs(NamedTuple):
    """What delta, lse2 and dsinks are computed from beside out and do. sinks_ptr: None where dsinks is not wanted."""

    lse_ptr: tl.tensor
    dlse_ptr: tl.tensor
    sinks_ptr: tl.tensor
    lse_strides: tl.tuple
    dlse_strides: tl.tuple


class DeltaOutputs(NamedTuple):
    """Where lse2 and delta are stored: pointers, and their strides of batch, head and row."""

    lse2_ptr: tl.tensor
    delta_ptr: tl.tensor
    strides: tl.tuple
    cu_seqlens_ptr: tl.tensor


@triton.jit
def padded_start(cu_seqlens_q_ptr, b, q_start):
    """Where the rows of a sequence start in lse2 and delta."""
    start = q_start
    if cu_seqlens_q_ptr is not None:
        start = (q_start + b * PADDING) // PADDING * PADDING
    return start


@triton.jit
def padded_rows(outputs, b, h, start, i):
    """Where rows i of one head are in lse2 and delta, in elements. outputs: `DeltaOutputs`."""
    return offset(outputs.strides, b, h, padded_start(outputs.cu_seqlens_ptr, b, start)) + i


@triton.jit
def _row_ptrs(ptr, strides, b, h, start, i):
    """Pointers to the numbers of rows i of one head, in the shape of i; None where ptr is None."""
    ptrs = ptr
    if ptr is not None:
        ptrs = ptr + offset(strides, b, h, start) + i.to(tl.int64) * strides[2]
    return ptrs


@triton.jit
def row_terms(o, do, inputs, outputs, b, h, start, i, Sq):
    """lse2 and delta of rows i, [BLOCK_M] each, which are stored too, and the part of these rows in dsinks.

    o, do: [BLOCK_M, BLOCK_DV], zeros from row Sq on. delta = sum(o * do) - dlse and lse2 = lse / log(2). Rows without
    visible keys, and rows from Sq on, get lse2 = inf, so that their probabilities are 0.
    """
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if inputs.dlse_ptr is not None:
        delta -= tl.load(_row_ptrs(inputs.dlse_ptr, inputs.dlse_strides, b, h, start, i), mask=i < Sq, other=0.0)
    lse_ptrs = _row_ptrs(inputs.lse_ptr, inputs.lse_strides, b, h, start, i)
    lse = tl.load(lse_ptrs, mask=i < Sq, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    # The inverse of the forward's * LN2. Division gives back the forward's bits; * LOG2E would be a few ulps off.
    lse2 = tl.div_rn(lse, tl.full(lse.shape, LN2, tl.float32))
    padded = padded_rows(outputs, b, h, start, i)
    tl.store(outputs.delta_ptr + padded, delta)
    tl.store(outputs.lse2_ptr + padded, lse2)
    dsinks = 0.0
    if inputs.sinks_ptr is not None:
        p = tl.exp2(tl.load(inputs.sinks_ptr + h).to(tl.float32) * LOG2E - lse2)
        # The selection keeps the product apart from the sum. Fused into one instruction, the sums of the threads of a
        # warp would differ in the last bit, and under Triton 3.8 all of them store theirs to one place.
        dsinks = -tl.sum(tl.where(i < Sq, p * delta, 0.0))
    return lse2, delta, dsinks


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
    None. dq_sum, float32 as o, or None, is zeroed for a backward that adds to it.
    Bytes: o and do in once; dq_sum, where it is given, out once. FLOPs: 2 DV for each row.
    """
    dsinks = 0.0
    for nth in tl.range(0, tiles_of_program(list_ptr, sizes.Hq, BLOCK_M, True), disable_licm=True):
        m, h, b = query_tile(list_ptr, nth, sizes, BLOCK_M)
        start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, length(sizes.longest_q))
        i = m + tl.arange(0, BLOCK_M)
        o = load_tile(matrix(o_ptr, o_strides, b, h, start), m, Sq, DV, FAR, BLOCK_M, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        do = load_tile(matrix(do_ptr, do_strides, b, h, start), m, Sq, DV, FAR, BLOCK_M, BLOCK_DV)
        if dq_sum_ptr is not None:
            zeros = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            store_tile(matrix(dq_sum_ptr, dq_sum_strides, b, h, start), m, Sq, zeros, DV, FAR, BLOCK_M, BLOCK_DV)
        inputs = DeltaInputs(lse_ptr, dlse_ptr, sinks_ptr, lse_strides, dlse_strides)
        outputs = DeltaOutputs(lse2_ptr, delta_ptr, delta_strides, cu_seqlens_q_ptr)
        _, _, of_tile = row_terms(o, do, inputs, outputs, b, h, start, i, Sq)
        dsinks += of_tile
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
    programs = programs_of_rows(sizes, BLOCK_M, packed=listing is not None, persistent=True)
    return [*launches, Launch(_delta_kernel, (programs,), args, options)]


def _rows_per_program(o: torch.Tensor) -> int:
    """32 elements per thread; a divisor of PADDING."""
    return min(max(4096 // width_class(o.shape[-1]), 16), PADDING.value)


def programs_of_rows(sizes: Sizes, BLOCK_M: int, packed: bool, persistent: bool) -> int:
    """The number of programs that write lse2 and delta up to the next multiple of PADDING; a multiple of Hq.

    persistent: programs of a packed batch may compute several tiles.
    """
    if packed:
        return programs_for(sizes.Sq, sizes.B, sizes.Hq, BLOCK_M, persistent)
    return cdiv(sizes.Sq, PADDING.value) * (PADDING.value // BLOCK_M) * sizes.B * sizes.Hq


def empty_rows(call: AttentionCall, results: Results, sizes: Sizes) -> RowInputs:
    """do, and lse2 and delta to be filled: each (B, Hq, padded Sq) or packed (Hq, padded Tq), float32."""
    rows = (cdiv(sizes.Sq, PADDING.value) + (sizes.B if call.packed else 0)) * PADDING.value
    shape = (*results.lse.shape[:-1], rows)
    return RowInputs(results.do, results.lse.new_empty(shape), results.lse.new_empty(shape))


def launch_delta(
    call: AttentionCall, results: Results, rows: RowInputs, need_dsinks: bool, dq_sum: torch.Tensor | None,
    lists: TileLists | None, grads: Grads,
) -> torch.Tensor | None:  # fmt: skip
    """Fills lse2 and delta of `rows`, and returns the shares of dsinks, or None where it is not needed.

    dq_sum, unless it is None, is zeroed. Packed, `lists` are written first, and the tokens of `grads` that no sequence
    owns. There is at least one row.
    """
    sizes, out, lse, sinks = call.sizes, results.out, results.lse, call.sinks if need_dsinks else None
    programs = programs_of_rows(sizes, _rows_per_program(out), call.packed, persistent=True)
    shares = None if sinks is None else empty_shares(programs, sizes, lse)
    listing = lists and _ListArguments(lists, call.cu_seqlens_q, call.cu_seqlens_k, fill_of(grads))
    _launch_delta_kernels(
        out, results.do, lse, results.dlse, sinks, rows.lse2, rows.delta, shares, dq_sum, listing, tuple(sizes)
    )
    return shares


def fill_of(grads: Grads) -> Fill:
    """The gradients of tokens that no sequence owns are zeros."""
    return Fill(grads.dq, dk=grads.dk, dv=grads.dv)


def empty_shares(programs: int, sizes: Sizes, lse: torch.Tensor) -> torch.Tensor:
    """The part of each program in dsinks, (programs / Hq, Hq): heads run fastest over the programs."""
    return lse.new_empty(programs // sizes.Hq, sizes.Hq)
