"""Attention forward for Hopper (FlashAttention-3, arXiv 2407.08608): the kernel and its launcher.

A program computes 128 query rows of one head. Its warps are specialised: one warp loads and stores (`_produce`), and
two groups of four warps compute 64 rows each (`_consume`). `_hopper_forward_kernel`, below, sets them up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.core.language import LN2, LOG2E
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv
from llama_kernels.ops.attention.call import AttentionCall, Scoring, lse_strides
from llama_kernels.ops.attention.hopper.descriptors import coordinates, describe, tokens_apart
from llama_kernels.ops.attention.hopper.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    tma,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from llama_kernels.ops.attention.hopper.schedule import (
    Walk,
    block_of,
    filled_phase,
    freed_phase,
    key_walk,
    slot_of,
    turn_phase,
)
from llama_kernels.ops.attention.hopper.shared_memory import barriers, ring, tile_in
from llama_kernels.ops.attention.hopper.tables import HopperTile
from llama_kernels.ops.attention.masks import Mask, begin_of, end_of, floor_of, key_blocks, visible, within
from llama_kernels.ops.attention.softmax import logits
from llama_kernels.ops.attention.tile_list import Fill, TileLists, list_tiles, programs_for
from llama_kernels.ops.attention.tiles import length, load_bound, offset, query_tile, sequence, tiles_of_program


class Place(NamedTuple):
    """The tile of query rows from m on, of head h, and the keys of its sequence."""

    b: gl.tensor
    h: gl.tensor
    h_kv: gl.tensor
    m: gl.tensor
    q_start: gl.tensor
    Sq: gl.tensor
    k_start: gl.tensor
    v_start: gl.tensor  # k_start, unless k and v are addressed as packed and have sequences that are not as far apart
    Sk: gl.tensor


class Buffers(NamedTuple):
    """Rings of tiles in shared memory, and numbers of each row. q holds 64 rows for each consumer.

    A consumer later writes its output where its q was.
    """

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    begin: gl.shared_memory_descriptor  # [128]: the first key that each row sees; None without kv_start and kv_end
    end: gl.shared_memory_descriptor  # [128], likewise one past the last key


class Barriers(NamedTuple):
    """Who waits for whom. Each field holds one barrier for each slot of a ring, or for each consumer."""

    q_filled: gl.shared_memory_descriptor  # of a consumer: the copy engine has loaded its q
    k_filled: gl.shared_memory_descriptor  # of a slot: the copy engine has loaded the keys
    k_freed: gl.shared_memory_descriptor  # of a slot: both consumers have read the keys
    v_filled: gl.shared_memory_descriptor  # likewise of values
    v_freed: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor  # of a consumer: the other one has issued its products
    o_filled: gl.shared_memory_descriptor  # of a consumer: its output is in shared memory


class ConsumerRows(NamedTuple):
    """The rows of a consumer, and what it visits for them."""

    q: gl.shared_memory_descriptor  # [64, D]
    i: gl.tensor  # [64, 1], the numbers of the rows
    buffers: Buffers
    bars: Barriers
    walk: Walk
    mask: Mask  # where there is no kv_start and kv_end
    begin: gl.shared_memory_descriptor  # [64], as in Buffers
    end: gl.shared_memory_descriptor  # [64], as in Buffers
    scoring: Scoring


@jit
def _uniform(x):
    """x, an integer that all threads of a warp have in common, so that ptxas knows that they have.

    It cannot know that of the result of a reduction. In a loop over such a number of steps, the ptxas of Triton 3.8
    computes the addresses of the products' tiles in registers of each thread, of which there are too few.
    """
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@jit
def _produce(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, buffers, bars, place, walk, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """The producer: loads q, then keys and values into their rings as slots become free, and stores out and lse."""
    for c in gl.static_range(2):
        bar = bars.q_filled.index(c)
        mbarrier.expect(bar, q_desc.block_type.nbytes)
        q_at = coordinates(q_desc, place.b, place.h, place.q_start, place.Sq, place.m + 64 * c)
        tma_load(q_desc, q_at, bar, buffers.q.index(c))
    for step in range(walk.count):
        slot, freed = slot_of(step, STAGES), freed_phase(step, STAGES)
        n = block_of(walk, step) * BLOCK_N
        mbarrier.wait(bars.k_freed.index(slot), freed)
        mbarrier.expect(bars.k_filled.index(slot), k_desc.block_type.nbytes)
        at = coordinates(k_desc, place.b, place.h_kv, place.k_start, place.Sk, n)
        tma_load(k_desc, at, bars.k_filled.index(slot), buffers.k.index(slot))
        mbarrier.wait(bars.v_freed.index(slot), freed)
        mbarrier.expect(bars.v_filled.index(slot), v_desc.block_type.nbytes)
        at = coordinates(v_desc, place.b, place.h_kv, place.v_start, place.Sk, n)
        tma_load(v_desc, at, bars.v_filled.index(slot), buffers.v.index(slot))
    for c in gl.static_range(2):
        mbarrier.wait(bars.o_filled.index(c), 0)
        o_at = coordinates(o_desc, place.b, place.h, place.q_start, place.Sq, place.m + 64 * c)
        tma_store(o_desc, o_at, buffers.q.index(c))
        i = gl.arange(0, 64, gl.BlockedLayout([2], [32], [1], [0]))
        lse = buffers.lse.index(c).load(i.type.layout)  # [64]
        gl.store(lse_ptr + place.m + 64 * c + i, lse, mask=place.m + 64 * c + i < place.Sq)
    tma.store_wait(0)


@jit
def _softmax(s, mass, peak, rows, n, MASKED: gl.constexpr):
    """One step of the online softmax for scores s [64, BLOCK_N] of the keys from n on.

    Returns p, the factor that rescales the sums so far, and the new mass and peak.
    """
    s = logits(s, rows.scoring)
    if MASKED:
        j, mask = gl.expand_dims(gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout)), 0), rows.mask
        if rows.begin is None:
            j += n
        else:
            # The loop has no registers to keep bounds or columns in. So bounds are loaded in each step, and taken less
            # what all columns of a thread have in common: n, and bits 1 and 2. What is left of a column is a constant.
            ROWS: gl.constexpr = gl.SliceLayout(1, s.type.layout)
            common = n + (j & 6)
            begin, end = gl.expand_dims(rows.begin.load(ROWS), 1), gl.expand_dims(rows.end.load(ROWS), 1)
            j, mask = j & ~6, Mask(0, None, None, begin - common, end - common)
        s = gl.where(visible(mask, rows.i, j), s, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(s, 1) * rows.scoring.unit)
    base = new_peak
    if MASKED:  # for a row that saw no key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) is NaN
        base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = gl.exp2(s * rows.scoring.unit - gl.expand_dims(base, 1))
    shrink = gl.exp2(peak - base)
    return p, shrink, mass * shrink + gl.sum(p, 1), new_peak


@jit
def _steps(
    acc, p, mass, peak, rows, begin, end, C: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The steps in [begin, end). p is that of the step before.

    While a step computes its softmax, the tensor cores run p @ v of the step before, and the other consumer's products.
    """
    buffers, bars, walk = rows.buffers, rows.bars, rows.walk
    BLOCK_N: gl.constexpr = buffers.k.shape[-2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    for step in range(begin, end):
        slot, before, after = slot_of(step, STAGES), slot_of(step - 1, STAGES), slot_of(step + 1, STAGES)
        p_half = gl.convert_layout(p.to(buffers.v.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
        mbarrier.wait(bars.turn.index(C), turn_phase(step, C))
        k = tile_in(buffers.k, slot).permute((1, 0))
        s = warpgroup_mma(rows.q, k, gl.zeros([64, BLOCK_N], gl.float32, S), use_acc=False, is_async=True)
        mbarrier.wait(bars.v_filled.index(before), filled_phase(step - 1, STAGES))
        acc = warpgroup_mma(p_half, tile_in(buffers.v, before), acc, is_async=True)
        mbarrier.arrive(bars.turn.index(1 - C))
        s = warpgroup_mma_wait(1, deps=(s,))  # [64, BLOCK_N]
        mbarrier.arrive(bars.k_freed.index(slot))
        n = block_of(walk, step) * BLOCK_N
        p, shrink, mass, peak = _softmax(s, mass, peak, rows, n, MASKED)
        # The wait for the next keys stands here for its branch, which keeps the softmax before the wait for the
        # product. Without one ptxas moves the softmax after it, where no product runs at the same time.
        mbarrier.wait(bars.k_filled.index(after), filled_phase(step + 1, STAGES), pred=step + 1 < walk.count)
        acc, p_half = warpgroup_mma_wait(0, deps=(acc, p_half))
        mbarrier.arrive(bars.v_freed.index(before))
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, p, mass, peak


@jit
def _consume(sink_ptr, buffers, bars, m, shift, Sk, walk, scoring, window, C: gl.constexpr, STAGES: gl.constexpr):
    """Consumer C of two: computes the output of 64 rows, and writes it where their q was."""
    BLOCK_N: gl.constexpr = buffers.k.shape[-2]
    D: gl.constexpr = buffers.k.shape[-1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    i = gl.expand_dims(m + 64 * C + gl.arange(0, 64, gl.SliceLayout(1, S)), 1)
    q = tile_in(buffers.q, C)  # [64, D]
    begin = None
    end = None
    if buffers.begin is not None:
        begin, end = buffers.begin.slice(64 * C, 64), buffers.end.slice(64 * C, 64)
    mask = Mask(shift, window.left, window.right, None, None, Sk)
    rows = ConsumerRows(q, i, buffers, bars, walk, mask, begin, end, scoring)
    peak = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    mass = gl.zeros([64], gl.float32, gl.SliceLayout(1, S))
    if sink_ptr is not None:  # one more logit, whose value is 0
        peak, mass = gl.zeros_like(peak) + gl.load(sink_ptr).to(gl.float32) * LOG2E, mass + 1.0
    acc = gl.zeros([64, D], gl.float32, O)

    mbarrier.wait(bars.q_filled.index(C), 0)
    mbarrier.wait(bars.k_filled.index(0), 0)
    s = warpgroup_mma(
        q, tile_in(buffers.k, 0).permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, S), use_acc=False, is_async=True
    )
    s = warpgroup_mma_wait(0, deps=(s,))  # [64, BLOCK_N]
    mbarrier.arrive(bars.k_freed.index(0))
    p, _, mass, peak = _softmax(s, mass, peak, rows, walk.top * BLOCK_N, True)
    mbarrier.wait(bars.k_filled.index(slot_of(1, STAGES)), filled_phase(1, STAGES), pred=walk.count > 1)

    acc, p, mass, peak = _steps(acc, p, mass, peak, rows, 1, walk.masked, C, True, STAGES)
    acc, p, mass, peak = _steps(acc, p, mass, peak, rows, walk.masked, walk.count, C, False, STAGES)
    last = walk.count - 1
    p = gl.convert_layout(p.to(buffers.v.dtype), gl.DotOperandLayout(0, O, 2))  # [64, BLOCK_N]
    mbarrier.wait(bars.v_filled.index(slot_of(last, STAGES)), filled_phase(last, STAGES))
    acc = warpgroup_mma(p, tile_in(buffers.v, slot_of(last, STAGES)), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))

    mass = gl.where(mass == 0.0, 1.0, mass)  # a row that saw no key: o is 0 / 1, and lse is -inf
    o = acc * gl.expand_dims(gl.convert_layout(1.0 / mass, gl.SliceLayout(1, O)), 1)  # [64, D]
    q.store(o.to(buffers.q.dtype))
    buffers.lse.index(C).store((peak + gl.log2(mass)) * LN2)
    fence_async_shared()
    mbarrier.arrive(bars.o_filled.index(C))


@jit
def _hopper_forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, sinks_ptr, kv_start_ptr, kv_end_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, list_ptr,
    lse_strides, kv_start_strides, kv_end_strides, k_apart, v_apart,
    sizes, scoring, window,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """o = softmax(q @ k^T scale + mask) @ v and lse = log(sum(exp(q @ k^T scale + mask))), 128 rows of one head.

    q (B, Hq, Sq, D), k, v (B, Hkv, Sk, D), o as q, lse (B, Hq, Sq) float32; packed: (T, H, D) and (Hq, T). Scores,
    softmax and sums are float32; p is rounded to v's dtype for the second product, as in the portable kernel.
    One warp loads. Two groups of four warps multiply 64 rows each, in turns: while one computes its softmax, the tensor
    cores run the products of the other. Only blocks at the edge of the mask compute it.
    With kv_start or kv_end, a program loads only keys from the first to the last that its rows see. So that the copy
    engine leaves out those past the last, k and v of a dense batch are then addressed as packed tensors, in which a
    sequence begins k_apart and v_apart tokens after the one before.
    Bytes: q and o once; k and v once for each row tile, from L2. FLOPs: 4 D for each visible pair.
    """
    if tiles_of_program(list_ptr, sizes.Hq, 128, False) > 0:
        m, h, b = query_tile(list_ptr, 0, sizes, 128)
        q_start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, length(sizes.longest_q))
        k_start, Sk = sequence(cu_seqlens_k_ptr, b, length(sizes.Sk), length(sizes.longest_k))
        shift, last, first = Sk - Sq, gl.minimum(m + 128, Sq) - 1, 0
        i = m + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
        kv_start = load_bound(kv_start_ptr, kv_start_strides, b, q_start, i, Sq)  # [128]
        kv_end = load_bound(kv_end_ptr, kv_end_strides, b, q_start, i, Sq)  # [128]
        # Keys that are hidden from all rows may be NaN. Keys count from `first` on, so that none before it is loaded.
        if kv_start is not None or kv_end is not None:
            seen = key_blocks(Mask(shift, window.left, window.right, kv_start, kv_end, Sk), m, last, BLOCK_N)
            first, Sk = gl.minimum(gl.maximum(seen.first, 0), seen.end), seen.end
        elif window.left is not None:
            first = gl.maximum(shift - window.left, 0)
        Sk, shift = Sk - first, shift - first
        kv_start = within(kv_start, first, Sk)
        kv_end = within(kv_end, first, Sk)
        mask = Mask(shift, window.left, window.right, kv_start, kv_end, Sk)
        blocks = key_blocks(mask, m, last, BLOCK_N)
        walk = key_walk(blocks, floor_of(mask, blocks), Sk, BLOCK_N)
        if kv_start is not None or kv_end is not None:
            walk = Walk(_uniform(walk.top), _uniform(walk.upper), _uniform(walk.masked), _uniform(walk.count))
        k_start = (k_start + first).to(gl.int32)
        v_start = k_start
        if k_apart is not None:
            k_start, v_start = k_start + b * k_apart, v_start + b * v_apart
        place = Place(b, h, h // sizes.group, m, q_start.to(gl.int32), Sq, k_start, v_start, Sk)
        ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        lse = gl.allocate_shared_memory(gl.float32, [2, 64], ROWS)
        begin = None
        end = None
        if kv_start is not None or kv_end is not None:
            begins = begin_of(mask, i)  # [128]
            if begins is None:
                begins = gl.zeros_like(i)
            ends = end_of(mask, i)  # [128]
            if ends is None:
                ends = gl.zeros_like(i) + Sk
            begin = gl.allocate_shared_memory(gl.int32, [128], ROWS, begins)
            end = gl.allocate_shared_memory(gl.int32, [128], ROWS, gl.minimum(ends, Sk))
        buffers = Buffers(ring(q_desc, 2), ring(k_desc, STAGES), ring(v_desc, STAGES), lse, begin, end)
        bars = Barriers(
            q_filled=barriers(2, 1), k_filled=barriers(STAGES, 1), k_freed=barriers(STAGES, 2),
            v_filled=barriers(STAGES, 1), v_freed=barriers(STAGES, 2), turn=barriers(2, 1), o_filled=barriers(2, 1),
        )  # fmt: skip
        lse_ptr += offset(lse_strides, b, h, q_start)
        if sinks_ptr is not None:
            sinks_ptr += h
        fence_async_shared()  # so that the copy engine sees the initialised barriers
        gl.warp_specialize(
            [
                (_consume, (sinks_ptr, buffers, bars, m, shift, Sk, walk, scoring, window, gl.constexpr(0), STAGES)),
                (_consume, (sinks_ptr, buffers, bars, m, shift, Sk, walk, scoring, window, gl.constexpr(1), STAGES)),
                (_produce, (q_desc, k_desc, v_desc, o_desc, lse_ptr, buffers, bars, place, walk, BLOCK_N, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


# --- launcher --------------------------------------------------------------------------------------------------------


@cached_launch
def _launch_hopper_forward_kernels(
    call: AttentionCall, tile: HopperTile, o: torch.Tensor, lse: torch.Tensor, lists: TileLists | None
) -> list[Launch]:
    call.require_contiguous_vectors()
    sizes = call.sizes
    launches, list_q, programs = [], None, cdiv(sizes.Sq, 128) * sizes.B * sizes.Hq
    if call.cu_seqlens_q is not None and lists is not None:
        list_q, programs = lists.of_q, programs_for(sizes.Sq, sizes.B, sizes.Hq, 128, persistent=False)
        launches.append(list_tiles(lists, call.cu_seqlens_q, None, sizes, Fill(o, lse)))
    as_packed = not call.packed and (call.kv_start is not None or call.kv_end is not None)
    kv_start_strides, kv_end_strides, _ = call.bound_strides
    args = (
        describe(call.q, 64, tile.width), describe(call.k, tile.BLOCK_N, tile.width, as_packed),
        describe(call.v, tile.BLOCK_N, tile.width, as_packed), describe(o, 64, tile.width),
        lse, call.sinks, call.kv_start, call.kv_end, call.cu_seqlens_q, call.cu_seqlens_k, list_q,
        lse_strides(lse), kv_start_strides, kv_end_strides,
        tokens_apart(call.k) if as_packed else None, tokens_apart(call.v) if as_packed else None,
        sizes.as_arguments(), call.scoring, call.window,
    )  # fmt: skip
    options = {"BLOCK_N": tile.BLOCK_N, "STAGES": tile.STAGES, "num_warps": 4}
    return [*launches, Launch(_hopper_forward_kernel, (programs,), args, options)]


def launch_hopper_forward(
    call: AttentionCall, tile: HopperTile, o: torch.Tensor, lse: torch.Tensor, lists: TileLists | None
) -> None:
    """Fill o and lse. tile: the one that dispatch.py chose for the call. lists: of a packed call, to be written."""
    _launch_hopper_forward_kernels(call, tile, o, lse, lists)
