"""Tensors as the copy engine sees them: tiles of one head by coordinates, with the hardware minding every edge.

A descriptor lies on the tensor's own strides; nothing is copied or flattened. What a tile has past the end of its
sequence, or of its head, reads as zeros and is not written: the last tile is no special case, a head of 80 is one of
128 with zeros, and a sequence of a packed batch never sees its neighbour's keys, which may be anything.
"""

from __future__ import annotations

import functools

import torch

from llama_kernels.ops.attention.hopper.gluon import TensorDescriptor, gl, jit

# Dense: (B, H, S, D), the end of a sequence being that of the tensor. Packed tokens have their ends inside of it, and
# there is one dimension left to say so: (_ENDLESS, _ENDLESS, H, _ROWS, D), the first two striding by -1 and by 1 token,
# the first in units of 2^30 and modulo 2^64. Row r of `length` tokens from `start` on is then (2^30, start + length, h,
# 2^30 - length + r): its address is start + r, and r >= length is out of bounds. (triton.tools.ragged_tma's idea.)
_ROWS: gl.constexpr = gl.constexpr(2**30)
_ENDLESS = 0x7FFF0000


def describe(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles of `rows` x `width` of x, (B, H, S, D) or packed (T, H, D)."""
    shape, strides = x.shape, x.stride()
    block, layout = _tile(rows, width, x.dtype, len(shape))
    if len(shape) == 4:
        # A dimension of one block has no stride that matters, but the hardware checks it.
        strides = [s if n > 1 else 8 for n, s in zip(shape[:3], strides[:3], strict=True)]
        return TensorDescriptor(x, list(shape), [*strides, 1], block, layout)
    T, H, D = shape
    token, head = strides[0] if T > 1 else 8, strides[1] if H > 1 else 8
    return TensorDescriptor(
        x, [_ENDLESS, _ENDLESS, H, _ROWS.value, D], [2**34 - token, token, head, token, 1], block, layout
    )


def describe_rows(x: torch.Tensor, count: int) -> TensorDescriptor:
    """Runs of `count` numbers a row, of a dense x (..., rows); `x` is addressed by (its heads, flat; row)."""
    rows = x.shape[-1]
    block, layout = _tile(1, count, x.dtype, 2)
    return TensorDescriptor(x, [x.numel() // rows, rows], [rows, 1], block, layout)


@functools.cache
def _tile(rows: int, width: int, dtype: torch.dtype, ndim: int):
    block = [1] * {2: 0, 3: 3, 4: 2}[ndim] + [rows, width]
    return block, gl.NVMMASharedLayout.get_default_for(block, getattr(gl, str(dtype)[6:]))


@jit
def coordinates(desc, b, h, start, length, row, column=0):
    """Of the tile from `row` on, of head h of the sequence of `length` tokens from `start` on."""
    if len(desc.block_shape) == 4:
        at = (b, h, row, column)
    else:
        at = (_ROWS, start + length, h, _ROWS - length + row, column)
    return at


@jit
def ring(desc, COUNT: gl.constexpr):
    """Shared memory for COUNT of its tiles; `tile` takes one as rows x width."""
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_shape, desc.layout)  # noqa: RUF005


@jit
def tile(ring, slot):
    at = ring.index(slot)
    return at.reshape([at.shape[-2], at.shape[-1]])
