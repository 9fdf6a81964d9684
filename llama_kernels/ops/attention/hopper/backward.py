"""Attention backward for Hopper (FlashAttention-3, arXiv 2407.08608): one pass, five products.

A program keeps dk and dv of 128 keys in registers, and streams the query rows of the whole group. The copy engine adds
up dq in float32, in the order in which the programs finish, so its last bits differ from run to run. With
deterministic=True the portable kernels run instead, which compute the scores twice.

The warps are specialised as in forward.py: one warp loads (`_produce`), one stores (`_write`), and two groups of four
warps compute 64 keys each (`_consume`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.core.language import tl
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv, empty_in_order_of
from llama_kernels.ops.attention.call import AttentionCall, Grads, RowInputs, Scoring, Sizes
from llama_kernels.ops.attention.delta import padded_start
from llama_kernels.ops.attention.hopper.descriptors import coordinates, describe, describe_rows
from llama_kernels.ops.attention.hopper.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    tma,
    tma_add,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from llama_kernels.ops.attention.hopper.schedule import (
    Walk,
    filled_phase,
    freed_phase,
    head_and_block,
    row_walk,
    slot_of,
)
from llama_kernels.ops.attention.hopper.shared_memory import barriers, ring, tile_in
from llama_kernels.ops.attention.hopper.tables import HopperTile
from llama_kernels.ops.attention.masks import Mask, visible
from llama_kernels.ops.attention.rounding import round_launch
from llama_kernels.ops.attention.softmax import logits
from llama_kernels.ops.attention.tile_list import TileLists, programs_for
from llama_kernels.ops.attention.tiles import key_tile, length, sequence, tiles_of_program
from llama_kernels.ops.rotation import Rotation


class Place(NamedTuple):
    """The tile of keys from n on, of key head h_kv, and the rows of its sequence."""

    b: gl.tensor
    h_kv: gl.tensor
    heads: gl.tensor  # of the batches before this one, in lse2 and delta
    n: gl.tensor
    group: gl.tensor
    q_start: gl.tensor
    first_padded: gl.tensor  # of the sequence's rows in lse2 and delta
    Sq: gl.tensor
    k_start: gl.tensor
    Sk: gl.tensor


class Buffers(NamedTuple):
    """Tiles in shared memory. k and v hold 64 keys for each consumer, which later writes dk and dv there."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q: gl.shared_memory_descriptor
    do: gl.shared_memory_descriptor
    lse2: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor  # [64 keys, 64 rows] for each consumer
    dq: gl.shared_memory_descriptor  # [64 rows, 64 columns] for each consumer, float32


class Barriers(NamedTuple):
    """Who waits for whom. Each field holds one barrier, or one for each slot of a ring, or for each consumer."""

    kv_filled: gl.shared_memory_descriptor  # the copy engine has loaded k and v of both consumers
    q_filled: gl.shared_memory_descriptor  # of a slot: the copy engine has loaded q and lse2
    do_filled: gl.shared_memory_descriptor  # of a slot: the copy engine has loaded do and delta
    freed: gl.shared_memory_descriptor  # of a slot: both consumers have read all four
    ds_filled: gl.shared_memory_descriptor  # where dq is shared: both consumers have written ds
    ds_freed: gl.shared_memory_descriptor  # where dq is shared: both consumers have read ds
    dq_filled: gl.shared_memory_descriptor  # of a consumer: its tile of dq is in shared memory
    dq_freed: gl.shared_memory_descriptor  # of a consumer: the copy engine has read that tile
    dkdv_filled: gl.shared_memory_descriptor  # of a consumer: its dk and dv are in shared memory


class ConsumerKeys(NamedTuple):
    """The keys of a consumer, and what it visits for them."""

    k: gl.shared_memory_descriptor  # [64, D]
    v: gl.shared_memory_descriptor  # [64, D]
    j: gl.tensor  # [64], the numbers of the keys
    buffers: Buffers
    bars: Barriers
    place: Place
    walk: Walk
    mask: Mask
    scoring: Scoring


@jit
def _produce(q_desc, k_desc, v_desc, do_desc, lse2_desc, delta_desc, buffers, bars, place, walk, STAGES: gl.constexpr):
    """The producer: loads keys and values, then the rows of every head of the group, as slots become free."""
    mbarrier.expect(bars.kv_filled.index(0), 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for c in gl.static_range(2):
        at = coordinates(k_desc, place.b, place.h_kv, place.k_start, place.Sk, place.n + 64 * c)
        tma_load(k_desc, at, bars.kv_filled.index(0), buffers.k.index(c))
        tma_load(v_desc, at, bars.kv_filled.index(0), buffers.v.index(c))
    for step in range(place.group * walk.count):
        slot, freed = slot_of(step, STAGES), freed_phase(step, STAGES)
        head, block = head_and_block(walk, step, place.group)
        h, m = place.h_kv * place.group + head, block * 64
        at = coordinates(q_desc, place.b, h, place.q_start, place.Sq, m)
        row = (place.heads + h, place.first_padded + m)
        mbarrier.wait(bars.freed.index(slot), freed)
        mbarrier.expect(bars.q_filled.index(slot), q_desc.block_type.nbytes + lse2_desc.block_type.nbytes)
        tma_load(q_desc, at, bars.q_filled.index(slot), buffers.q.index(slot))
        tma_load(lse2_desc, row, bars.q_filled.index(slot), buffers.lse2.index(slot))
        mbarrier.expect(bars.do_filled.index(slot), do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
        tma_load(do_desc, at, bars.do_filled.index(slot), buffers.do.index(slot))
        tma_load(delta_desc, row, bars.do_filled.index(slot), buffers.delta.index(slot))


@jit
def _write(dq_desc, dk_desc, dv_desc, buffers, bars, place, walk, SHARED: gl.constexpr):
    """One warp: adds the consumers' tiles of dq to the sum in memory, and at the end stores dk and dv."""
    for step in range(place.group * walk.count):
        head, block = head_and_block(walk, step, place.group)
        for c in gl.static_range(2):
            mbarrier.wait(bars.dq_filled.index(c), filled_phase(step, 1))
            h, column = place.h_kv * place.group + head, 64 * c if SHARED else 0
            at = coordinates(dq_desc, place.b, h, place.q_start, place.Sq, block * 64, column)
            tma_add(dq_desc, at, buffers.dq.index(c))
        for c in gl.static_range(2):
            tma.store_wait(1 - c)
            mbarrier.arrive(bars.dq_freed.index(c))
    for c in gl.static_range(2):
        mbarrier.wait(bars.dkdv_filled.index(c), 0)
        at = coordinates(dk_desc, place.b, place.h_kv, place.k_start, place.Sk, place.n + 64 * c)
        tma_store(dk_desc, at, buffers.k.index(c))
        tma_store(dv_desc, at, buffers.v.index(c))
    tma.store_wait(0)


@jit
def _steps(
    dk, dv, keys, begin, end,
    C: gl.constexpr, MASKED: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of 64 keys after the steps in [begin, end). Scores are transposed: [keys, rows].

    SHARED: a consumer computes half of dq's columns, from the keys of both consumers. Otherwise it computes all columns
    from its own keys.
    """
    buffers, bars, scoring = keys.buffers, keys.bars, keys.scoring
    dtype: gl.constexpr = buffers.k.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    for step in tl.range(begin, end, disable_licm=True):
        slot = slot_of(step, STAGES)
        q, do = tile_in(buffers.q, slot), tile_in(buffers.do, slot)  # [64, D]
        mbarrier.wait(bars.q_filled.index(slot), filled_phase(step, STAGES))
        zeros = gl.zeros([64, 64], gl.float32, S)
        s = warpgroup_mma(keys.k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(bars.do_filled.index(slot), filled_phase(step, STAGES))
        delta = gl.expand_dims(buffers.delta.index(slot).reshape([64]).load(ROW), 0)
        dp = warpgroup_mma(keys.v, do.permute((1, 0)), zeros - delta, is_async=True)
        s = logits(warpgroup_mma_wait(1, deps=(s,)), scoring)  # [64 keys, 64 rows]
        lse2 = buffers.lse2.index(slot).reshape([64]).load(ROW)
        p = gl.exp2(s * scoring.unit - gl.expand_dims(lse2, 0))
        if MASKED:
            _, block = head_and_block(keys.walk, step, keys.place.group)
            i = block * 64 + gl.arange(0, 64, ROW)
            p = gl.where(visible(keys.mask, gl.expand_dims(i, 0), gl.expand_dims(keys.j, 1)), p, 0.0)
        p_half = gl.convert_layout(p.to(dtype), A)
        if scoring.softcap is not None:
            capped = s / scoring.softcap
            p *= 1.0 - capped * capped
        # These waits, which rarely block, stand here for their branch. Without one ptxas moves the exponentials after
        # the wait for dp.
        if SHARED:
            mbarrier.wait(bars.ds_freed.index(0), freed_phase(step, 1))
        else:
            mbarrier.wait(bars.dq_freed.index(C), freed_phase(step, 1))
        dp = warpgroup_mma_wait(0, deps=(dp,))
        dv = warpgroup_mma(p_half, do, dv, is_async=True)
        ds = (p * dp).to(dtype)
        tile_in(buffers.ds, C).store(ds)
        fence_async_shared()
        if SHARED:
            mbarrier.arrive(bars.ds_filled.index(0))
        ds = gl.convert_layout(ds, A)
        dk = warpgroup_mma(ds, q, dk, is_async=True)
        if SHARED:
            mbarrier.wait(bars.ds_filled.index(0), filled_phase(step, 1))
            upper = tile_in(buffers.k, 0).slice(64 * C, 64, dim=1)
            lower = tile_in(buffers.k, 1).slice(64 * C, 64, dim=1)
            dq = warpgroup_mma(tile_in(buffers.ds, 0).permute((1, 0)), upper, zeros, use_acc=False, is_async=True)
            dq = warpgroup_mma(tile_in(buffers.ds, 1).permute((1, 0)), lower, dq, is_async=True)
        else:
            dq = warpgroup_mma(tile_in(buffers.ds, C).permute((1, 0)), keys.k, zeros, use_acc=False, is_async=True)
        dv, dk, p_half, ds = warpgroup_mma_wait(2 if SHARED else 1, deps=(dv, dk, p_half, ds))
        mbarrier.arrive(bars.freed.index(slot))
        dq = warpgroup_mma_wait(0, deps=(dq,))  # [64 rows, 64 columns]
        if SHARED:
            mbarrier.arrive(bars.ds_freed.index(0))
            mbarrier.wait(bars.dq_freed.index(C), freed_phase(step, 1))
        tile_in(buffers.dq, C).store(dq)
        fence_async_shared()
        mbarrier.arrive(bars.dq_filled.index(C))
    return dk, dv


@jit
def _consume(buffers, bars, place, walk, scoring, window, C: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr):
    """Consumer C of two: computes dk and dv of 64 keys, and writes them where their k and v were."""
    D: gl.constexpr = buffers.k.shape[-1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dk = gl.zeros([64, D], gl.float32, A)
    dv = gl.zeros([64, D], gl.float32, A)
    # Sk is given as kv_end, which hides the same keys. So the machine code is that which an H100 ran.
    mask = Mask(place.Sk - place.Sq, window.left, window.right, kv_start=None, kv_end=place.Sk, Sk=None)
    j = place.n + 64 * C + gl.arange(0, 64, gl.SliceLayout(1, S))
    k, v = tile_in(buffers.k, C), tile_in(buffers.v, C)  # [64, D]
    keys = ConsumerKeys(k, v, j, buffers, bars, place, walk, mask, scoring)
    mbarrier.wait(bars.kv_filled.index(0), 0)
    masked, steps = place.group * walk.masked, place.group * walk.count
    dk, dv = _steps(dk, dv, keys, 0, masked, C, True, SHARED, STAGES)
    dk, dv = _steps(dk, dv, keys, masked, steps, C, False, SHARED, STAGES)
    if SHARED:  # the other consumer may still read these keys
        mbarrier.wait(bars.ds_freed.index(0), freed_phase(steps, 1))
    k.store((dk * scoring.scale).to(buffers.k.dtype))
    v.store(dv.to(buffers.v.dtype))
    fence_async_shared()
    mbarrier.arrive(bars.dkdv_filled.index(C))


@jit
def _hopper_backward_kernel(
    q_desc, k_desc, v_desc, do_desc, lse2_desc, delta_desc, dq_desc, dk_desc, dv_desc,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, list_ptr,
    sizes, scoring, window, at_once,
    SHARED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk = dS^T @ q scale and dv = P^T @ do of 128 keys of one key head, summed over its query heads; dq += dS @ k.

    q, do (B, Hq, Sq, D), k, v, dk, dv (B, Hkv, Sk, D), dq as q in float32, lse2 and delta float32, padded; or packed.
    P = exp(logits - lse), dP = do @ v^T, dS = P * (dP - delta), all float32; P and dS are rounded before a product.
    One warp loads, one stores, two groups of four warps multiply 64 keys each. They write tiles of dq to shared memory,
    and the copy engine adds these to the sum in memory, the only sum whose order is not fixed.
    Bytes: k, v, dk, dv once; q and do of the group and the sum of dq once for each key tile, from L2. FLOPs: 10 D for
    each visible pair.
    """
    if tiles_of_program(list_ptr, sizes.Hq // sizes.group, 128, False) > 0:
        n, h_kv, b, k_start, Sk = key_tile(list_ptr, 0, sizes, cu_seqlens_k_ptr, 128, at_once)
        q_start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, length(sizes.longest_q))
        walk = row_walk(Mask(Sk - Sq, window.left, window.right, None, None, Sk), n, Sq, 64, 128)
        heads = b * sizes.Hq if cu_seqlens_q_ptr is None else 0
        first_padded = padded_start(cu_seqlens_q_ptr, b, q_start).to(gl.int32)
        place = Place(
            b, h_kv, heads, n, sizes.group, q_start.to(gl.int32), first_padded, Sq, k_start.to(gl.int32), Sk
        )  # fmt: skip
        DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], k_desc.dtype)
        buffers = Buffers(
            ring(k_desc, 2), ring(v_desc, 2), ring(q_desc, STAGES), ring(do_desc, STAGES),
            ring(lse2_desc, STAGES), ring(delta_desc, STAGES),
            gl.allocate_shared_memory(k_desc.dtype, [2, 64, 64], DS), ring(dq_desc, 2),
        )  # fmt: skip
        bars = Barriers(
            kv_filled=barriers(1, 1), q_filled=barriers(STAGES, 1), do_filled=barriers(STAGES, 1),
            freed=barriers(STAGES, 2), ds_filled=barriers(1, 2), ds_freed=barriers(1, 2),
            dq_filled=barriers(2, 1), dq_freed=barriers(2, 1), dkdv_filled=barriers(2, 1),
        )  # fmt: skip
        fence_async_shared()  # so that the copy engine sees the initialised barriers
        gl.warp_specialize(
            [
                (_consume, (buffers, bars, place, walk, scoring, window, gl.constexpr(0), SHARED, STAGES)),
                (_consume, (buffers, bars, place, walk, scoring, window, gl.constexpr(1), SHARED, STAGES)),
                (_produce, (q_desc, k_desc, v_desc, do_desc, lse2_desc, delta_desc, buffers, bars, place, walk,
                            STAGES)),
                (_write, (dq_desc, dk_desc, dv_desc, buffers, bars, place, walk, SHARED)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip


# --- launcher --------------------------------------------------------------------------------------------------------

_L2 = 50 * 2**20  # bytes, of an H100


def heads_at_once(sizes: Sizes, width: int) -> int:
    """How many key heads the programs of a dense batch work on at a time: those whose rows L2 holds, and at least two.

    A row is q, do and the float32 sum of dq, to which every tile of keys adds. With all heads at a time an H100 reads
    and writes most of the sums in memory, which takes a fifth longer (docs/lab/2026-11-27-second_gpu.md).
    """
    bytes_a_head = sizes.group * sizes.Sq * width * (2 + 2 + 4)
    return min(max(_L2 // max(bytes_a_head, 1), 2), max(sizes.B * sizes.Hkv, 1))


@cached_launch
def _launch_hopper_backward_kernels(
    call: AttentionCall, tile: HopperTile, rows: RowInputs, dq_sum: torch.Tensor, grads: Grads,
    unrotated: torch.Tensor | None, rotation: Rotation, lists: TileLists | None,
) -> list[Launch]:  # fmt: skip
    """unrotated: dk before the inverse rotation; None where there is none."""
    call.require_contiguous_vectors()
    sizes, (dq, dk, dv) = call.sizes, grads
    list_q, list_k = lists or (None, None)
    dk_sum = dk if unrotated is None else unrotated
    args = (
        *(describe(x, 64, tile.width) for x in (call.q, call.k, call.v, rows.do)),
        describe_rows(rows.lse2, 64), describe_rows(rows.delta, 64),
        describe(dq_sum, 64, 64), describe(dk_sum, 64, tile.width), describe(dv, 64, tile.width),
        call.cu_seqlens_q, call.cu_seqlens_k, list_k, sizes.as_arguments(), call.scoring, call.window,
        None if lists else heads_at_once(sizes, tile.width),
    )  # fmt: skip
    options = {"SHARED": tile.width == 128, "STAGES": tile.STAGES, "num_warps": 4}
    programs = cdiv(sizes.Sk, 128) * sizes.B * sizes.Hkv
    if lists is not None:
        programs = programs_for(sizes.Sk, sizes.B, sizes.Hkv, 128, persistent=False)
    launches = [
        Launch(_hopper_backward_kernel, (programs,), args, options),
        round_launch(dq_sum, dq, call.cu_seqlens_q, list_q, sizes, call.scale, rotation),
    ]
    if unrotated is not None:
        keys_as_rows = sizes._replace(Hq=sizes.Hkv, Sq=sizes.Sk, longest_q=sizes.longest_k)
        launches.append(round_launch(unrotated, dk, None, None, keys_as_rows, 1.0, rotation))
    return launches


def launch_hopper_backward(
    call: AttentionCall, tile: HopperTile, rows: RowInputs, dq_sum: torch.Tensor, grads: Grads, rotation: Rotation,
    lists: TileLists | None,
) -> None:  # fmt: skip
    """Fill `grads`, all three of which are wanted. dq_sum: float32 zeros in the shape of dq.

    rotation: of q and k before the call. dq gets its inverse where its sum is rounded. dk, which the kernel writes
    rounded, gets it in a launch of its own.
    """
    unrotated = empty_in_order_of(grads.dk) if rotation.half else None
    _launch_hopper_backward_kernels(call, tile, rows, dq_sum, grads, unrotated, rotation, lists)
