"""Attention backward (arXiv 2307.08691): delta.py, then dkdv.py for a tile of keys, then dq.py for a tile of rows.

With P = exp(logits - lse), dP = do @ v^T and delta = rowsum(o * do) - dlse, the gradient of the logits is
dS = P * (dP - delta), and dv = P^T @ do, dk = dS^T @ q, dq = dS @ k. P is recomputed, never stored. There are
no atomics.
"""

from __future__ import annotations

import torch

from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv, empty_in_order_of, strides_of
from llama_kernels.ops.attention import dispatch, hopper
from llama_kernels.ops.attention.call import (
    AttentionCall,
    Grads,
    Results,
    Rotated,
    Wanted,
    empty_grads,
    far,
    lse_strides,
    optional_strides,
)
from llama_kernels.ops.attention.delta import launch_delta
from llama_kernels.ops.attention.dkdv import _dkdv_kernel
from llama_kernels.ops.attention.dq import _dq_kernel
from llama_kernels.ops.attention.tables import tile_for
from llama_kernels.ops.rotation import Rotation


@cached_launch
def _launches(call: AttentionCall, do, lse2, delta, dq, dk, dv, rotated: Rotated | None) -> list[Launch]:
    """dq, dk and dv are None where they are not wanted."""
    q, k, v, sizes = call.q, call.k, call.v, call.sizes
    rotation = Rotation() if rotated is None else Rotation(*rotated)
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
            args = (*inputs, *pair, *bounds, *input_strides, *map(optional_strides, pair), *bound_strides, *numbers)
            launches.append(Launch(_dkdv_kernel, (programs,), args, {**flags, **tile.launch_options}))

    tile = tile_for("dq", q, v, call.crowded or rotated is not None)
    programs = cdiv(call.longest_q, tile.BLOCK_M) * sizes.B * sizes.Hq
    if programs and dq is not None:
        args = (*inputs, dq, *bounds, *input_strides, strides_of(dq), *bound_strides, *numbers)
        launches.append(Launch(_dq_kernel, (programs,), args, {**flags, **tile.launch_options}))
    return launches


def launch_backward(call: AttentionCall, results: Results, wanted: Wanted, rotated: Rotated | None = None) -> Grads:
    """The gradients of `call`, by the kernels that dispatch.py says.

    rotated: q and k were rotated so; dq and dk get the inverse rotation before they are rounded.
    """
    grads, sizes, do = empty_grads(call, wanted), call.sizes, results.do
    if call.packed or not sizes.Hq:  # no program visits a token that no sequence owns, or keys that no head reads
        for grad in grads[:3]:
            grad.zero_()
    choice = dispatch.backward(call, do, wanted)
    dq_sum = None if choice.tile is None else empty_in_order_of(grads.dq, dtype=torch.float32)
    lse2, delta, dsinks = launch_delta(call, results, sizes, grads, dq_sum)
    grads = Grads(grads.dq, grads.dk, grads.dv, dsinks)
    if dq_sum is not None and hopper.try_backward(call, choice.tile, do, lse2, delta, dq_sum, grads, rotated):
        return grads
    needed = (grad if need else None for grad, need in zip(grads[:3], wanted[:3], strict=True))
    _launches(call, do, lse2, delta, *needed, rotated)
    return grads
