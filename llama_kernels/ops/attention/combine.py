"""Attention over chunks of the keys, combined into attention over all of them: the kernel and its launch.

The chunks are computed by decode.py, and by forward.py as key_split.py says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.core.language import LN2, LOG2E, cast, tl, triton
from llama_kernels.core.launch_cache import Launch
from llama_kernels.core.tensors import next_power_of_2, strides_of
from llama_kernels.ops.attention.call import AttentionCall, lse_strides
from llama_kernels.ops.attention.softmax import SoftmaxState

_CHUNKS_PER_STEP = 32  # of the sum over the chunks


class Parts(NamedTuple):
    """Attention over each chunk of the keys: out (B, Hq, Sq, chunks, DV) and lse2 (B, Hq, Sq, chunks), float32.

    lse2 is in base 2. Where it is -inf, out is not read. Strides are those of batch, head, row and chunk.
    """

    out: torch.Tensor
    lse2: torch.Tensor
    out_strides: tuple[int, int, int, int]
    lse2_strides: tuple[int, int, int, int]
    chunks: int


@triton.jit
def _add_chunks(state, part, lse2):
    """`state` of one row, acc [BLOCK_DV], after BLOCK_C more chunks: part [BLOCK_C, BLOCK_DV] and lse2 [BLOCK_C]."""
    peak = tl.maximum(state.peak, tl.max(lse2))
    base = tl.where(peak == float("-inf"), 0.0, peak)  # no key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) is NaN
    weight, shrink = tl.exp2(lse2 - base), tl.exp2(state.peak - base)
    acc = state.acc * shrink + tl.sum(part * weight[:, None], 0)
    return SoftmaxState(acc, state.mass * shrink + tl.sum(weight), peak)


@triton.jit
def _combine_kernel(
    part_ptr, lse2_ptr, o_ptr, lse_ptr, sinks_ptr,
    part_strides, lse2_strides, o_strides, lse_strides,
    sizes, chunks,
    DV: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o = sum(part exp2(lse2)) / sum(exp2(lse2)) over the chunks of one row, and lse = log(sum(exp2(lse2))).

    part (B, Hq, Sq, chunks, DV) and lse2 float32, whose strides of batch, head, row and chunk are given -> o
    (B, Hq, Sq, DV), lse (B, Hq, Sq) float32, natural logarithm. The sum includes the sink of the head. The order of the
    chunks is fixed, BLOCK_C at a time. Bytes: part and lse2 in, o and lse out, once each. FLOPs: 2 DV for each
    row and chunk.
    """
    pid = tl.program_id(0)
    i, h, b = pid % sizes.Sq, pid // sizes.Sq % sizes.Hq, pid // (sizes.Sq * sizes.Hq)
    b, h, i = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(i, tl.int64)
    part_row = part_ptr + b * part_strides[0] + h * part_strides[1] + i * part_strides[2]
    lse2_row = lse2_ptr + b * lse2_strides[0] + h * lse2_strides[1] + i * lse2_strides[2]
    dv = tl.arange(0, BLOCK_DV)
    peak, mass = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
    if sinks_ptr is not None:  # one more logit, whose value is 0
        peak, mass = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E, mass + 1.0
    state = SoftmaxState(tl.zeros([BLOCK_DV], tl.float32), mass, peak)
    for first in tl.range(0, chunks, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lse2 = tl.load(lse2_row + c * lse2_strides[3], mask=c < chunks, other=float("-inf"))  # [BLOCK_C]
        written = (lse2 > float("-inf"))[:, None] & (dv < DV)[None, :]
        part = tl.load(
            part_row + c[:, None] * part_strides[3] + dv[None, :], mask=written, other=0.0
        )  # [BLOCK_C, BLOCK_DV]
        state = _add_chunks(state, part, lse2)
    mass = tl.where(state.mass == 0.0, 1.0, state.mass)
    o_row = o_ptr + b * o_strides[0] + h * o_strides[1] + i * o_strides[2]
    tl.store(o_row + dv, cast(state.acc * (1.0 / mass), o_ptr.dtype.element_ty), mask=dv < DV)
    tl.store(lse_ptr + b * lse_strides[0] + h * lse_strides[1] + i, (state.peak + tl.log2(mass)) * LN2)


def combine_launch(parts: Parts, call: AttentionCall, o: torch.Tensor, lse: torch.Tensor, many: bool) -> Launch:
    """The launch that fills o and lse of `call` from its parts. The sinks of the call count here, not in the parts.

    many: whether there are enough rows to fill a GPU. A program, which computes one row, then has fewer warps.
    """
    sizes, widths = call.sizes, call.widths
    BLOCK_C = min(next_power_of_2(parts.chunks), _CHUNKS_PER_STEP)
    warps = min(max(BLOCK_C * widths["BLOCK_DV"] // 1024, 1), 4) if many else 4
    args = (
        parts.out, parts.lse2, o, lse, call.sinks,
        parts.out_strides, parts.lse2_strides, strides_of(o), lse_strides(lse), sizes, parts.chunks,
    )  # fmt: skip
    options = {"DV": widths["DV"], "BLOCK_C": BLOCK_C, "BLOCK_DV": widths["BLOCK_DV"], "num_warps": warps}
    return Launch(_combine_kernel, (sizes.B * sizes.Hq * sizes.Sq,), args, options)
