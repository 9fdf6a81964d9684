"""Gradients from float32 sums: scaled, rotated by the inverse rotation if wanted, and rounded.

Two kernels write such sums: the Hopper backward, which adds up dq in memory, and `_dkdv_kernel` where several programs
share the query heads of a key head.
"""

from __future__ import annotations

import torch

from llama_kernels.core.language import tl, triton
from llama_kernels.core.launch_cache import Launch
from llama_kernels.core.tensors import cdiv, strides_of
from llama_kernels.ops.attention.call import Sizes, far, width_class
from llama_kernels.ops.attention.tile_list import programs_for
from llama_kernels.ops.attention.tiles import (
    PACKED_BLOCK,
    length,
    load_tile,
    matrix,
    query_tile,
    sequence,
    store_tile,
    tiles_of_program,
)
from llama_kernels.ops.rotation import Rotation, Tables, inverse_rotation


@triton.jit(do_not_specialize=["positions"])
def _round_sum_kernel(
    sum_ptr, grad_ptr, cu_seqlens_q_ptr, list_ptr, cos_ptr, sin_ptr, position_ids_ptr,
    sum_strides, grad_strides, cos_strides, sin_strides, position_strides,
    sizes, scale, positions,
    D: tl.constexpr, FAR: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad = sum * scale, rounded once, for BLOCK_M rows of one head.

    sum (B, Hq * PARTS, Sq, D) float32, grad (B, Hq, Sq, D); packed: (T, H, D). Bytes: sum in, grad out, once each.
    FLOPs: PARTS for each element, and 3 more with the rotation.
    Head h of grad is the sum of heads h * PARTS to h * PARTS + PARTS - 1 of `sum`, in this order. With HALF, q and k
    were rotated by the tables, and grad gets the inverse rotation.
    """
    for nth in tl.range(0, tiles_of_program(list_ptr, sizes.Hq, BLOCK_M, True), disable_licm=True):
        m, h, b = query_tile(list_ptr, nth, sizes, BLOCK_M)
        start, Sq = sequence(cu_seqlens_q_ptr, b, sizes.Sq, length(sizes.longest_q))
        grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for part in tl.range(0, PARTS):
            of_part = matrix(sum_ptr, sum_strides, b, h * PARTS + part, start)
            grad += load_tile(of_part, m, Sq, D, FAR, BLOCK_M, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        grad = grad * scale
        if HALF:
            s = m + tl.arange(0, BLOCK_M)
            tables = Tables(cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, positions)
            grad = inverse_rotation(grad, tables, b, start + s, s < Sq, HALF, INTERLEAVED, BLOCK_M, BLOCK_D)
        store_tile(matrix(grad_ptr, grad_strides, b, h, start), m, Sq, grad, D, FAR, BLOCK_M, BLOCK_D)


def round_launch(
    total: torch.Tensor, grad: torch.Tensor, cu_seqlens: torch.Tensor | None, list_q: torch.Tensor | None,
    sizes: Sizes, scale: float, by: Rotation,
) -> Launch:  # fmt: skip
    """grad = total * scale, with the inverse of the rotation `by`. sizes: of the rows of `grad`, in place of q's.

    total: float32, with a multiple of the heads of `grad`: the parts of a head, one after another, which are added up.
    """
    D, BLOCK_D = grad.shape[-1], width_class(grad.shape[-1])
    BLOCK_M = min(4096 // BLOCK_D, PACKED_BLOCK.value)  # 32 elements per thread
    args = (
        total, grad, cu_seqlens, list_q, *by.tensors, strides_of(total), strides_of(grad), *by.strides,
        sizes.as_arguments(), scale, by.positions,
    )  # fmt: skip
    options = {
        "D": D, "FAR": far(grad), "HALF": by.half, "INTERLEAVED": by.interleaved,
        "PARTS": total.shape[1] // grad.shape[1], "BLOCK_M": BLOCK_M, "BLOCK_D": BLOCK_D, "num_warps": 4,
    }  # fmt: skip
    programs = cdiv(sizes.Sq, BLOCK_M) * sizes.B * sizes.Hq
    if list_q is not None:
        programs = programs_for(sizes.Sq, sizes.B, sizes.Hq, BLOCK_M, persistent=True)
    return Launch(_round_sum_kernel, (programs,), args, options)
