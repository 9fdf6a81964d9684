"""Tensors as the copy engine addresses them: a tile of one head, by coordinates.

A descriptor has the tensor's own strides; nothing is copied or flattened. The hardware checks the bounds: what a tile
has past the end of its sequence, or of its head, is loaded as zeros and never stored. So the last tile is no special
case, a head of width 80 is one of 128 with zeros, and a sequence of a packed batch never loads its neighbour's keys.
"""

from __future__ import annotations

import functools

import torch

from llama_kernels.ops.attention.hopper.gluon import TensorDescriptor, gl, jit

# Dense tensors are (B, H, S, D), and a sequence ends with the tensor. In a packed tensor sequences end inside it. Its
# descriptor therefore has five dimensions, (_ENDLESS, _ENDLESS, H, _ROWS, D). With `token` the stride of a token, the
# strides of the first two are 2^34 - token and token. Row r of the `length` tokens from `start` on has the coordinates
# (2^30, start + length, h, 2^30 - length + r). Coordinate 2^30 of the first dimension adds 2^64 - 2^30 token to the
# address, and 2^64 is 0. So the address is that of token start + r, and r >= length is out of bounds of the fourth
# dimension. (The idea is that of triton.tools.ragged_tma.) With kv_start or kv_end, the keys of a tile end inside a
# dense tensor too, which is then addressed likewise.
_ROWS: gl.constexpr = gl.constexpr(2**30)
_ENDLESS = 0x7FFF0000


def describe(x: torch.Tensor, rows: int, width: int, as_packed: bool = False) -> TensorDescriptor:
    """Tiles of `rows` x `width` of x, (B, H, S, D) or packed (T, H, D).

    as_packed: a dense x is addressed like a packed tensor whose sequence b begins at token b * tokens_apart(x).
    """
    shape, (*strides, _) = x.shape, _copied_strides(x)
    if x.ndim == 4 and not as_packed:
        return TensorDescriptor(x, list(shape), [*strides, 1], *_block(rows, width, x.dtype, 4))
    H, D = shape[-3 if x.ndim == 4 else -2], shape[-1]
    head, token = strides[1:] if x.ndim == 4 else reversed(strides)
    return TensorDescriptor(
        x, [_ENDLESS, _ENDLESS, H, _ROWS.value, D], [2**34 - token, token, head, token, 1],
        *_block(rows, width, x.dtype, 3),
    )  # fmt: skip


def tokens_apart(x: torch.Tensor) -> int | None:
    """How many tokens the sequences of x (B, H, S, D) are apart, in strides of a token.

    None: it is no whole number, or the sequences have more tokens than `describe(x, as_packed=True)` can address.
    """
    sequence, _, token, _ = _copied_strides(x)
    tokens, rest = divmod(sequence if x.shape[0] > 1 else 0, token)
    return None if rest or (x.shape[0] - 1) * tokens + x.shape[2] >= _ENDLESS else tokens


def _copied_strides(x: torch.Tensor) -> list[int]:
    """The strides of x. That of a dimension of size 1 is never used, but the hardware checks it."""
    return [stride if size > 1 else 8 for size, stride in zip(x.shape, x.stride(), strict=True)]


def describe_rows(x: torch.Tensor, count: int) -> TensorDescriptor:
    """Tiles of `count` rows of a dense x (..., rows), addressed by (flat index of the leading dimensions, row)."""
    rows = x.shape[-1]
    block, layout = _block(1, count, x.dtype, 2)
    return TensorDescriptor(x, [x.numel() // rows, rows], [rows, 1], block, layout)


@functools.cache
def _block(rows: int, width: int, dtype: torch.dtype, ndim: int):
    block = [1] * {2: 0, 3: 3, 4: 2}[ndim] + [rows, width]
    return block, gl.NVMMASharedLayout.get_default_for(block, getattr(gl, str(dtype)[6:]))


@jit
def coordinates(desc, b, h, start, length, row, column=0):
    """Coordinates of the tile from `row` on, of head h of the sequence of `length` tokens from token `start` on."""
    if len(desc.block_shape) == 4:
        at = (b, h, start + row, column)
    else:
        at = (_ROWS, start + length, h, _ROWS - length + row, column)
    return at
