"""Attention backward (arXiv 2307.08691): delta.py, then dkdv.py for a tile of keys, then dq.py for a tile of rows.

With P = exp(logits - lse), dP = do @ v^T and delta = rowsum(o * do) - dlse, the gradient of the logits is
dS = P * (dP - delta), and dv = P^T @ do, dk = dS^T @ q, dq = dS @ k. P is recomputed, never stored. There are
no atomics.
"""

from __future__ import annotations

import torch

from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv, empty_in_order_of, optional_strides_of, strides_of
from llama_kernels.ops.attention import dispatch, hopper
from llama_kernels.ops.attention.call import (
    AttentionCall,
    Results,
    Wanted,
    empty_grads,
    far,
    lse_strides,
)
from llama_kernels.ops.attention.delta import launch_delta
from llama_kernels.ops.attention.dkdv import _dkdv_kernel
from llama_kernels.ops.attention.dq import _dq_kernel
from llama_kernels.ops.attention.tables import tile_for
from llama_kernels.ops.attention.tile_list import Fill, TileLists, programs_for, tile_lists, walks
from llama_kernels.ops.rotation import Rotation


@cached_launch
def _launches(
    call: AttentionCall, do, lse2, delta, dq, dk, dv, rotation: Rotation, lists: TileLists | None
) -> list[Launch]:
    """dq, dk and dv are None where they are not wanted."""
    q, k, v, sizes = call.q, call.k, call.v, call.sizes
    # What both kernels take, in their order: before the gradients, after them, after the gradients' strides.
    inputs = (q, k, v, do, lse2, delta)
    bounds = (call.kv_start, call.kv_end, call.cu_seqlens_q, call.cu_seqlens_k, *rotation.tensors)
    list_q, list_k = lists or (None, None)
    input_strides = (*map(strides_of, (q, k, v, do)), lse_strides(delta))
    bound_strides = (*call.bound_strides, *rotation.strides)
    numbers = (sizes.as_arguments(), call.scoring, call.window, rotation.positions)
    flags = {
        **call.widths,
        "FAR": far(q, k, v, do),
        "HALF": rotation.half,
        "INTERLEAVED": rotation.interleaved,
        "WALK": walks(call),
    }
    launches = []

    tile = tile_for("dkdv", q, v, call.softcap is not None or call.kv_end is not None)
    programs = cdiv(sizes.Sk, tile.BLOCK_N) * sizes.B * sizes.Hkv
    if lists is not None:
        programs = programs_for(sizes.Sk, sizes.B, sizes.Hkv, tile.BLOCK_N, walks(call))
    for pair in ((dk, None), (None, dv)) if tile.split else ((dk, dv),):
        if programs and pair != (None, None):
            pair_strides = map(optional_strides_of, pair)
            args = (*inputs, *pair, *bounds, list_k, *input_strides, *pair_strides, *bound_strides, *numbers)
            launches.append(Launch(_dkdv_kernel, (programs,), args, {**flags, **tile.launch_options}))

    tile = tile_for("dq", q, v, call.crowded or rotation.half > 0)
    programs = cdiv(sizes.Sq, tile.BLOCK_M) * sizes.B * sizes.Hq
    if lists is not None:
        programs = programs_for(sizes.Sq, sizes.B, sizes.Hq, tile.BLOCK_M, walks(call))
    if programs and dq is not None:
        args = (*inputs, dq, *bounds, list_q, *input_strides, strides_of(dq), *bound_strides, *numbers)
        launches.append(Launch(_dq_kernel, (programs,), args, {**flags, **tile.launch_options}))
    return launches


def launch_backward(
    call: AttentionCall, results: Results, wanted: Wanted, rotation: Rotation = Rotation()
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dsinks of `call`, by the kernels that dispatch.py says.

    rotation: of q and k before the call; dq and dk get its inverse before they are rounded.
    """
    sizes, do = call.sizes, results.do
    dq, dk, dv, dsinks = grads = empty_grads(call, wanted)
    if not (sizes.B and sizes.Hq and sizes.Sq):  # no program would write the gradients
        return tuple(grad.zero_() for grad in grads)
    outputs = [grad if need else None for grad, need in zip(grads[:3], wanted[:3], strict=True)]
    lists = tile_lists(call, of_keys=True)
    choice = dispatch.backward(call, do, wanted)
    dq_sum = None if choice.tile is None else empty_in_order_of(dq, dtype=torch.float32)
    fill = Fill(outputs[0], None, *outputs[1:])
    lse2, delta, dsinks = launch_delta(call, results, sizes, dsinks, dq_sum, lists, fill)
    if choice.tile is None or not hopper.try_backward(
        call, choice.tile, do, lse2, delta, dq_sum, dq, dk, dv, rotation, lists
    ):
        _launches(call, do, lse2, delta, *outputs, rotation, lists)
    return dq, dk, dv, dsinks
