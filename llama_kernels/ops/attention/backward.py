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
from llama_kernels.ops.rotation import Rotation


@cached_launch
def _launches(call: AttentionCall, do, lse2, delta, dq, dk, dv, rotation: Rotation) -> list[Launch]:
    """dq, dk and dv are None where they are not wanted."""
    q, k, v, sizes = call.q, call.k, call.v, call.sizes
    # What both kernels take, in their order: before the gradients, after them, after the gradients' strides.
    inputs = (q, k, v, do, lse2, delta)
    bounds = (call.kv_start, call.kv_end, call.cu_seqlens_q, call.cu_seqlens_k, *rotation.tensors)
    input_strides = (*map(strides_of, (q, k, v, do)), lse_strides(delta))
    bound_strides = (*call.bound_strides, *rotation.strides)
    numbers = (sizes.as_arguments(), call.scoring, call.window, rotation.positions)
    flags = {**call.widths, "FAR": far(q, k, v, do), "HALF": rotation.half, "INTERLEAVED": rotation.interleaved}
    launches = []

    tile = tile_for("dkdv", q, v, call.softcap is not None or call.kv_end is not None)
    programs = cdiv(call.longest_k, tile.BLOCK_N) * sizes.B * sizes.Hkv
    for pair in ((dk, None), (None, dv)) if tile.split else ((dk, dv),):
        if programs and pair != (None, None):
            args = (*inputs, *pair, *bounds, *input_strides, *map(optional_strides_of, pair), *bound_strides, *numbers)
            launches.append(Launch(_dkdv_kernel, (programs,), args, {**flags, **tile.launch_options}))

    tile = tile_for("dq", q, v, call.crowded or rotation.half > 0)
    programs = cdiv(call.longest_q, tile.BLOCK_M) * sizes.B * sizes.Hq
    if programs and dq is not None:
        args = (*inputs, dq, *bounds, *input_strides, strides_of(dq), *bound_strides, *numbers)
        launches.append(Launch(_dq_kernel, (programs,), args, {**flags, **tile.launch_options}))
    return launches


def launch_backward(
    call: AttentionCall, results: Results, wanted: Wanted, rotation: Rotation = Rotation()
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dsinks of `call`, by the kernels that dispatch.py says.

    rotation: of q and k before the call; dq and dk get its inverse before they are rounded.
    """
    sizes, do = call.sizes, results.do
    dq, dk, dv, dsinks = empty_grads(call, wanted)
    if call.packed or not sizes.Hq:  # no program visits a token that no sequence owns, or keys that no head reads
        for grad in (dq, dk, dv):
            grad.zero_()
    choice = dispatch.backward(call, do, wanted)
    dq_sum = None if choice.tile is None else empty_in_order_of(dq, dtype=torch.float32)
    lse2, delta, dsinks = launch_delta(call, results, sizes, dsinks, dq_sum)
    if choice.tile is None or not hopper.try_backward(call, choice.tile, do, lse2, delta, dq_sum, dq, dk, dv, rotation):
        _launches(
            call, do, lse2, delta,
            dq if wanted.dq else None, dk if wanted.dk else None, dv if wanted.dv else None, rotation,
        )  # fmt: skip
    return dq, dk, dv, dsinks
