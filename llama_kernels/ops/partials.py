"""The last step of a weight's gradient, which is a sum over all rows: it adds up the sums that programs wrote.

The order of the additions is fixed and there are no atomics, so the same call gives the same bits.
"""

from __future__ import annotations

import torch

from llama_kernels.core.device import lanes_of
from llama_kernels.core.language import cast, tl, triton
from llama_kernels.core.launch_cache import Launch
from llama_kernels.core.tensors import cdiv

_BLOCK_P, _BLOCK_N, _THREADS = 128, 32, 256  # 32 columns of float32 are a line of 128 bytes


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(partials_ptr, out_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """out = sum of the P rows of partials (P, N), for BLOCK_N columns. Bytes: partials in, out out. FLOPs: P N."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for p in range(0, P, BLOCK_P):
        rows = p + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        total += tl.load(partials_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, cast(tl.sum(total, 0), out_ptr.dtype.element_ty), mask=cols < N)


def sum_partials(partials: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch of out (N,) = partials (P, N) float32, summed over P and rounded once to the dtype of out."""
    P, N = partials.shape
    options = {"BLOCK_P": _BLOCK_P, "BLOCK_N": _BLOCK_N, "num_warps": _THREADS // lanes_of(out.device)}
    return Launch(_sum_partials_kernel, (cdiv(N, _BLOCK_N),), (partials, out, P, N), options)
