"""Attention forward (FlashAttention, arXiv 2205.14135 and 2307.08691): the kernel and its launcher."""

from __future__ import annotations

import torch

from llama_kernels.core.language import LN2, LOG2E, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv, strides_of
from llama_kernels.ops.attention import dispatch, hopper
from llama_kernels.ops.attention.call import AttentionCall, empty_outputs, far, lse_strides, outputs_to_fill
from llama_kernels.ops.attention.combine import Parts, combine_launch
from llama_kernels.ops.attention.decode import launch_decode
from llama_kernels.ops.attention.key_split import KeySplit
from llama_kernels.ops.attention.masks import Mask, key_blocks, over_key_blocks, within
from llama_kernels.ops.attention.softmax import SoftmaxState, attend
from llama_kernels.ops.attention.tables import tile_for
from llama_kernels.ops.attention.tile_list import Fill, TileLists, is_persistent, list_tiles, programs_for, tile_lists
from llama_kernels.ops.attention.tiles import (
    Keys,
    KeyShape,
    load_bound,
    load_prefix,
    load_tile,
    matrix,
    offset,
    query_tile,
    sequences,
    store_tile,
    tiles_of_program,
)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr, kv_start_ptr, kv_end_ptr, kv_prefix_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, list_ptr,
    q_strides, k_strides, v_strides, o_strides, lse_strides, kv_start_strides, kv_end_strides, kv_prefix_strides,
    sizes, scoring, window, split,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o = softmax(q @ k^T scale + mask) @ v and lse = log(sum(exp(q @ k^T scale + mask))), BLOCK_M rows of one head.

    q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, DV), o as q with DV, lse (B, Hq, Sq) float32; head h reads key
    head h // group. Scores, softmax and sums are float32; p is rounded to v's dtype for the second product.
    Blocks of keys that no row of the tile sees are skipped; only blocks at the edge of the mask compute it.
    With split, a `KeySplit`, a program computes one chunk c of the keys. o and lse are then float32, with
    h * split.chunks + c for a head, and lse is in base 2.
    Bytes: q and o once; k and v once for each row tile, from L2. FLOPs: 2 (D + DV) for each visible pair.
    """
    for nth in tl.range(0, tiles_of_program(list_ptr, sizes.Hq, BLOCK_M, PERSISTENT), disable_licm=True):
        m, h, b = query_tile(list_ptr, nth, sizes, BLOCK_M)
        h_of_o = h
        if split is not None:
            rows_of_all = tl.cdiv(sizes.Sq, BLOCK_M) * BLOCK_M
            c, m = m // rows_of_all, m % rows_of_all
            h_of_o = h * split.chunks + c
        q_start, Sq, k_start, Sk = sequences(cu_seqlens_q_ptr, cu_seqlens_k_ptr, b, sizes)
        if m < Sq:
            i = m + tl.arange(0, BLOCK_M)[:, None]
            kv_start = load_bound(kv_start_ptr, kv_start_strides, b, q_start, i, Sq)  # [BLOCK_M, 1]
            kv_end = load_bound(kv_end_ptr, kv_end_strides, b, q_start, i, Sq)  # [BLOCK_M, 1]
            prefix = load_prefix(kv_prefix_ptr, kv_prefix_strides, b, q_start, i, Sq, Sk)  # [BLOCK_M, 1]
            shift = Sk - Sq
            if split is not None:  # from here on, keys count from the first key of the chunk
                first, count = split.first + c * split.keys, split.keys
                shift, k_start, Sk = shift - first, k_start + first, within(Sk, first, count)
                kv_start = within(kv_start, first, count)
                kv_end = within(kv_end, first, count)
                prefix = within(prefix, first, count)
            mask = Mask(shift, window.left, window.right, kv_start, kv_end, Sk, prefix=prefix)
            blocks = key_blocks(mask, m, tl.minimum(m + BLOCK_M, Sq) - 1, BLOCK_N)

            Q = matrix(q_ptr, q_strides, b, h, q_start)
            q = load_tile(Q, m, Sq, D, FAR, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            K = matrix(k_ptr, k_strides, b, h // sizes.group, k_start)
            V = matrix(v_ptr, v_strides, b, h // sizes.group, k_start)
            keys = Keys(K, V, mask, i, blocks)
            peak, mass = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
            if sinks_ptr is not None:  # one more logit, whose value is 0
                peak, mass = tl.zeros_like(mass) + tl.load(sinks_ptr + h).to(tl.float32) * LOG2E, mass + 1.0
            state = SoftmaxState(tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), mass, peak)
            SHAPE: tl.constexpr = KeyShape(D, DV, FAR, BLOCK_N, BLOCK_D, BLOCK_DV)
            state = over_key_blocks(attend, state, q, keys, scoring, SHAPE)

            mass = tl.where(state.mass == 0.0, 1.0, state.mass)  # a row that saw no key: o is 0 / 1, and lse is -inf
            o = state.acc * (1.0 / mass)[:, None]  # [BLOCK_M, BLOCK_DV]
            store_tile(matrix(o_ptr, o_strides, b, h_of_o, q_start), m, Sq, o, DV, FAR, BLOCK_M, BLOCK_DV)
            lse = state.peak + tl.log2(mass)  # [BLOCK_M], in base 2
            if split is None:
                lse = lse * LN2
            rows = m + tl.arange(0, BLOCK_M)
            tl.store(lse_ptr + offset(lse_strides, b, h_of_o, q_start) + rows, lse, mask=rows < Sq)


# --- launcher --------------------------------------------------------------------------------------------------------


def _forward_launch(
    call: AttentionCall, o: torch.Tensor, lse: torch.Tensor, list_q: torch.Tensor | None, programs: int,
    split: KeySplit | None = None,
) -> Launch:  # fmt: skip
    call.require_contiguous_vectors()
    q, k, v, sizes, tile = call.q, call.k, call.v, call.sizes, tile_for("forward", call)
    args = (
        q, k, v, o, lse, None if split else call.sinks, call.kv_start, call.kv_end, call.kv_prefix,
        call.cu_seqlens_q, call.cu_seqlens_k, list_q,
        *map(strides_of, (q, k, v, o)), lse_strides(lse), *call.bound_strides,
        sizes.as_arguments(), call.scoring, call.window, split,
    )  # fmt: skip
    options = {**call.widths, "FAR": far(q, k, v, o), "PERSISTENT": is_persistent(call), **tile.launch_options}
    return Launch(_forward_kernel, (programs,), args, options)


@cached_launch
def _launch_forward_kernels(
    call: AttentionCall, o: torch.Tensor, lse: torch.Tensor, lists: TileLists | None
) -> list[Launch]:
    sizes, BLOCK_M = call.sizes, tile_for("forward", call).BLOCK_M
    launches, list_q, programs = [], None, cdiv(sizes.Sq, BLOCK_M) * sizes.B * sizes.Hq
    if call.cu_seqlens_q is not None and lists is not None:
        list_q, programs = lists.of_q, programs_for(sizes.Sq, sizes.B, sizes.Hq, BLOCK_M, is_persistent(call))
        launches.append(list_tiles(lists, call.cu_seqlens_q, None, sizes, Fill(o, lse)))
    return [*launches, _forward_launch(call, o, lse, list_q, programs)] if programs else []


@cached_launch
def _launch_split_kernels(call: AttentionCall, part, lse2, o, lse, split: KeySplit) -> list[Launch]:
    """part (B, Hq * chunks, Sq, DV) and lse2 (B, Hq * chunks, Sq), float32."""
    sizes, chunks = call.sizes, split.chunks
    programs = cdiv(sizes.Sq, tile_for("forward", call).BLOCK_M) * sizes.B * sizes.Hq * chunks
    (b, h, i), (lse_b, lse_h, lse_i) = strides_of(part), lse2.stride()
    parts = Parts(part, lse2, (b, h * chunks, i, h), (lse_b, lse_h * chunks, lse_i, lse_h), chunks)
    return [_forward_launch(call, part, lse2, None, programs, split), combine_launch(parts, call, o, lse, many=True)]


def _launch_split(call: AttentionCall, split: KeySplit) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse = empty_outputs(call)
    B, Hq, Sq = lse.shape
    part = lse.new_empty(B, Hq * split.chunks, Sq, o.shape[-1])
    _launch_split_kernels(call, part, lse.new_empty(part.shape[:-1]), o, lse, split)
    return o, lse


def launch_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of `call`, by the kernel that dispatch.py says."""
    choice = dispatch.forward(call)
    if choice is dispatch.DECODE:
        return launch_decode(call)
    if not call.sequences:
        return outputs_to_fill(call)
    if choice.split is not None:
        return _launch_split(call, choice.split)
    o, lse = empty_outputs(call)
    lists = tile_lists(call, of_keys=False)
    if choice.tile is None or not hopper.try_forward(call, choice.tile, o, lse, lists):
        _launch_forward_kernels(call, o, lse, lists)
    return o, lse
