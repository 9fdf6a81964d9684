"""What the ops that rotate share: the tile, device code for pairs and angles, and `Rotation`, the host's structure.

Sections: tiles; heads, where they lie; pairs, their loads and stores; angles, from the tables; `inverse_rotation`, with
which the kernels of dq and dk end in `rope_attention`; and on the host `Rotation`: tables, positions and how pairs lie.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from llama_kernels.core.checks import message, shape_of
from llama_kernels.core.language import tl, triton
from llama_kernels.core.tensors import next_power_of_2

# --- tiles -----------------------------------------------------------------------------------------------------------


class HeadTile(NamedTuple):
    """One step of a program: BLOCK_T tokens by BLOCK_H heads by BLOCK_R pairs. A program steps over the heads."""

    BLOCK_T: int
    BLOCK_H: int
    BLOCK_R: int
    num_warps: int


@functools.cache
def head_tile(half: int, heads: int, lanes: int) -> HeadTile:
    """The tile for heads with `half` pairs. heads: of q or k, whichever has fewer. lanes: threads in a warp.

    128 threads hold 8 pairs each, two 16-byte accesses in bfloat16. Where all heads of one token do not fill a tile, it
    takes several tokens.
    """
    BLOCK_R = max(next_power_of_2(half), 8)
    vectors = max(1024 // BLOCK_R, 1)  # heads of tokens in one step
    BLOCK_H = min(next_power_of_2(heads), vectors)
    return HeadTile(vectors // BLOCK_H, BLOCK_H, BLOCK_R, num_warps=128 // lanes)


# --- heads -----------------------------------------------------------------------------------------------------------


class HeadTensor(NamedTuple):
    """A tensor (B, H, S, D) of heads on the device."""

    ptr: tl.tensor  # or None: there is no such tensor
    strides: tl.tuple  # of batch, head and token


@triton.jit
def token_ptrs(x, b, s):
    """Pointers [BLOCK_T, 1] to the first head of the tokens s of sequence b, both int64."""
    return x.ptr + (b * x.strides[0] + s * x.strides[2])[:, None]


# --- pairs -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_pairs(vectors, present, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
    """The first and the second elements of the pairs of each vector, as float32 [BLOCK_T, BLOCK_H, BLOCK_R].

    vectors: pointers [BLOCK_T, BLOCK_H]. present: which of them to load; the others give zeros.
    """
    if INTERLEAVED:
        # One contiguous load, split in registers: loading every second element would take twice the accesses.
        run = tl.arange(0, 2 * BLOCK_R)
        mask = present[:, :, None] & (run < 2 * HALF)[None, None, :]
        x = tl.load(vectors[:, :, None] + run[None, None, :], mask=mask, other=0.0)
        x0, x1 = tl.split(x.reshape(x.shape[0], x.shape[1], BLOCK_R, 2))
    else:
        pair = tl.arange(0, BLOCK_R)
        mask = present[:, :, None] & (pair < HALF)[None, None, :]
        x0 = tl.load(vectors[:, :, None] + pair[None, None, :], mask=mask, other=0.0)
        x1 = tl.load(vectors[:, :, None] + (pair + HALF)[None, None, :], mask=mask, other=0.0)
    return x0.to(tl.float32), x1.to(tl.float32)


@triton.jit
def store_pairs(vectors, present, y0, y1, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
    """Store what `load_pairs` loads, already in the dtype of `vectors`."""
    if INTERLEAVED:
        run = tl.arange(0, 2 * BLOCK_R)
        mask = present[:, :, None] & (run < 2 * HALF)[None, None, :]
        y = tl.join(y0, y1)  # [BLOCK_T, BLOCK_H, BLOCK_R, 2]
        tl.store(vectors[:, :, None] + run[None, None, :], y.reshape(y.shape[0], y.shape[1], 2 * BLOCK_R), mask=mask)
    else:
        pair = tl.arange(0, BLOCK_R)
        mask = present[:, :, None] & (pair < HALF)[None, None, :]
        tl.store(vectors[:, :, None] + pair[None, None, :], y0, mask=mask)
        tl.store(vectors[:, :, None] + (pair + HALF)[None, None, :], y1, mask=mask)


# --- angles ----------------------------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """The tables of a call on the device, and how its tokens index them.

    A table's strides are of batch, row and entry; those of position_ids are of batch and token.
    """

    cos_ptr: tl.tensor
    sin_ptr: tl.tensor
    position_ids_ptr: tl.tensor  # or None: token s takes row s
    cos_strides: tl.tuple
    sin_strides: tl.tuple
    position_strides: tl.tuple
    positions: tl.tensor  # rows of a table


class Angles(NamedTuple):
    """cos and sin for the first and the second elements of the pairs, float32 [BLOCK_T, 1, BLOCK_R].

    Both are the same where a table has one entry per pair.
    """

    cos0: tl.tensor
    cos1: tl.tensor
    sin0: tl.tensor
    sin1: tl.tensor


class Axes(NamedTuple):
    """Which position of a token gives the angle in each column of the tables, where a token has several positions."""

    ptr: tl.tensor  # (columns,)
    stride: tl.tensor
    position_stride: tl.tensor  # from one axis to the next in position_ids
    count: tl.tensor  # positions of a token


@triton.jit
def _columns(HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
    """The columns of a table for the first and the second elements of the pairs, int64 [BLOCK_R]."""
    first = tl.arange(0, BLOCK_R).to(tl.int64)
    if FULL and INTERLEAVED:
        first *= 2
    second = first
    if FULL:
        second = first + (1 if INTERLEAVED else HALF)
    return first, second


@triton.jit
def _rows_of_columns(tables, axes, b, s, columns, mask):
    """The row of each token s [BLOCK_T] of sequence b in each of `columns`, clamped: int64 [BLOCK_T, BLOCK_R]."""
    axis = tl.load(axes.ptr + columns[None, :] * axes.stride + tl.zeros(mask.shape, tl.int32), mask=mask, other=0)
    axis = tl.minimum(tl.maximum(axis.to(tl.int64), 0), axes.count - 1)
    positions = tables.position_ids_ptr + b * tables.position_strides[0] + s * tables.position_strides[1]
    rows = tl.load(positions[:, None] + axis * axes.position_stride, mask=mask, other=0)
    return tl.minimum(tl.maximum(rows.to(tl.int64), 0), tables.positions - 1)


@triton.jit
def _load_entries(
    ptr, first_rows, second_rows, stride, mask, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """The entries of a table for the first and the second elements of the pairs, float32.

    first_rows, second_rows: the offsets of the rows in which they are.
    """
    columns, others = _columns(HALF, FULL, INTERLEAVED, mask.shape[1])
    first = tl.load(ptr + first_rows + (columns * stride)[None, :], mask=mask, other=0.0).to(tl.float32)
    second = first
    if FULL:
        second = tl.load(ptr + second_rows + (others * stride)[None, :], mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def load_angles(
    tables, axes, b, s, live,
    HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The angles of the tokens s [BLOCK_T] of sequence b. live: which of these tokens exist.

    A token's row is position_ids[b, s], clamped into the table, or s. With `axes`, not None, its row in a column is
    position_ids[axes[column], b, s], where the axis is clamped too. FULL: the tables have an entry for each element
    of a head, not for each pair. INVERSE: the angles of the transposed rotation, which is the inverse rotation where
    both elements of a pair have the same entry.
    """
    if axes is None:
        row = s
        if tables.position_ids_ptr is not None:
            positions = tables.position_ids_ptr + b * tables.position_strides[0] + s * tables.position_strides[1]
            row = tl.load(positions, mask=live, other=0)
            row = tl.minimum(tl.maximum(row.to(tl.int64), 0), tables.positions - 1)
        mask = live[:, None] & (tl.arange(0, BLOCK_R) < HALF)[None, :]
        cos_rows = (b * tables.cos_strides[0] + row * tables.cos_strides[1])[:, None]
        sin_rows = (b * tables.sin_strides[0] + row * tables.sin_strides[1])[:, None]
        other_cos_rows, other_sin_rows = cos_rows, sin_rows
    else:
        mask = live[:, None] & (tl.arange(0, BLOCK_R) < HALF)[None, :]
        columns, others = _columns(HALF, FULL, INTERLEAVED, BLOCK_R)
        row = _rows_of_columns(tables, axes, b, s, columns, mask)  # [BLOCK_T, BLOCK_R]
        other_row = row
        if FULL:
            other_row = _rows_of_columns(tables, axes, b, s, others, mask)
        cos_rows, sin_rows = row * tables.cos_strides[1], row * tables.sin_strides[1]
        other_cos_rows, other_sin_rows = other_row * tables.cos_strides[1], other_row * tables.sin_strides[1]
    cos0, cos1 = _load_entries(
        tables.cos_ptr, cos_rows, other_cos_rows, tables.cos_strides[2], mask, HALF, FULL, INTERLEAVED
    )  # fmt: skip
    sin0, sin1 = _load_entries(
        tables.sin_ptr, sin_rows, other_sin_rows, tables.sin_strides[2], mask, HALF, FULL, INTERLEAVED
    )  # fmt: skip
    if INVERSE:
        sin0, sin1 = -sin1, -sin0
    return Angles(cos0[:, None, :], cos1[:, None, :], sin0[:, None, :], sin1[:, None, :])


@triton.jit
def rotate(x0, x1, angles):
    """Each pair (x0, x1) rotated by its angle."""
    return x0 * angles.cos0 - x1 * angles.sin0, x1 * angles.cos1 + x0 * angles.sin1


# --- the inverse rotation of what is in registers --------------------------------------------------------------------


@triton.jit
def _inverse_rotation_of_pairs(
    x0, x1, tables, b, s, live, HALF: tl.constexpr, BLOCK_T: tl.constexpr, PAIRS: tl.constexpr
):
    """The pairs x0, x1 [BLOCK_T, PAIRS] rotated by their negative angles. Pairs from HALF on stay as they are.

    It works on 32 pairs of a token at a time, since beside x there are no registers for more angles.
    """
    if PAIRS > 32:
        SOME: tl.constexpr = PAIRS // 2
        y0, z0 = tl.split(x0.reshape(BLOCK_T, 2, SOME).permute(0, 2, 1))
        y1, z1 = tl.split(x1.reshape(BLOCK_T, 2, SOME).permute(0, 2, 1))
        y0, y1 = _inverse_rotation_of_pairs(y0, y1, tables, b, s, live, HALF, BLOCK_T, SOME)
        if HALF > SOME:
            later = Tables(
                tables.cos_ptr + SOME * tl.cast(tables.cos_strides[2], tl.int64),
                tables.sin_ptr + SOME * tl.cast(tables.sin_strides[2], tl.int64), tables.position_ids_ptr,
                tables.cos_strides, tables.sin_strides, tables.position_strides, tables.positions,
            )  # fmt: skip
            z0, z1 = _inverse_rotation_of_pairs(z0, z1, later, b, s, live, HALF - SOME, BLOCK_T, SOME)
        y0 = tl.join(y0, z0).permute(0, 2, 1).reshape(BLOCK_T, PAIRS)
        y1 = tl.join(y1, z1).permute(0, 2, 1).reshape(BLOCK_T, PAIRS)
    else:
        angles = load_angles(tables, None, b, s, live, HALF, False, False, True, PAIRS)
        cos, sin = angles.cos0.reshape(BLOCK_T, PAIRS), angles.sin0.reshape(BLOCK_T, PAIRS)
        if HALF < PAIRS:  # the sine is 0 there already
            cos = tl.where((tl.arange(0, PAIRS) < HALF)[None, :], cos, 1.0)
        y0, y1 = rotate(x0, x1, Angles(cos, cos, sin, sin))
    return y0, y1


@triton.jit
def inverse_rotation(
    x, tables, b, s, live, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """float32 x [BLOCK_T, BLOCK_D], one head of the tokens s of sequence b, rotated by the tokens' negative angles.

    The tables are of half width. Elements past the rotated width stay as they are.

    For the end of a kernel whose x is a sum of matrix products. Pairs are separated by reshaping, which moves no
    element: in the layouts of the tensor cores, the thread that holds one element of a pair holds the other too.
    `rotates_in_registers` says which widths this supports.
    """
    PAIRS: tl.constexpr = BLOCK_D // 2
    RUNS: tl.constexpr = PAIRS // HALF  # of 2 HALF elements, where pairs are not interleaved: the first is rotated
    if INTERLEAVED:
        x0, x1 = tl.split(x.reshape(BLOCK_T, PAIRS, 2))
    else:
        x0, x1 = tl.split(x.reshape(BLOCK_T, RUNS, 2, HALF).permute(0, 1, 3, 2))
        x0, x1 = x0.reshape(BLOCK_T, PAIRS), x1.reshape(BLOCK_T, PAIRS)
    y0, y1 = _inverse_rotation_of_pairs(x0, x1, tables, tl.cast(b, tl.int64), s, live, HALF, BLOCK_T, PAIRS)
    if INTERLEAVED:
        y = tl.join(y0, y1)
    else:
        y = tl.join(y0.reshape(BLOCK_T, RUNS, HALF), y1.reshape(BLOCK_T, RUNS, HALF)).permute(0, 1, 3, 2)
    return y.reshape(BLOCK_T, BLOCK_D)


# --- on the host -----------------------------------------------------------------------------------------------------


def row_strides(rows: torch.Tensor | None) -> tuple[int, int] | None:
    """Strides of batch and token, for (B, S), (1, S) or (S,): one integer a token."""
    return None if rows is None else _row_strides(rows, rows.ndim == 2)


def _row_strides(x: torch.Tensor, batched: bool) -> tuple[int, int]:
    if not batched:
        return 0, x.stride(0)
    return (0 if x.shape[0] == 1 else x.stride(0)), x.stride(1)


def full_width(cos: torch.Tensor, head_dim: int) -> bool:
    """Whether tables have one entry per element of a head, not per pair: they are too wide to have one per pair."""
    return 2 * cos.shape[-1] > head_dim


def pairs_of(cos: torch.Tensor, head_dim: int) -> dict[str, int]:
    """HALF, the pairs of a head that are rotated, and FULL, whether the tables are of full width."""
    full = full_width(cos, head_dim)
    return {"HALF": cos.shape[-1] // 2 if full else cos.shape[-1], "FULL": full}


Strides = tuple[int, ...]


def _table_strides(table: torch.Tensor | None) -> Strides | None:
    """Strides of batch, row and entry."""
    return None if table is None else (*_row_strides(table, table.ndim == 3), table.stride(-1))


class Rotation(NamedTuple):
    """How heads are rotated: the arguments of the op `rope` after q and k, in its order.

    Without tables, heads are not rotated. On the device, `Tables` and `Axes` take its place.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    interleaved: bool = False
    inverse: bool = False  # by the transpose of the rotation, as gradients are rotated
    axes: torch.Tensor | None = None

    @property
    def transposed(self) -> Rotation:
        # Every backward waits for this; `_replace` takes more than twice as long.
        return Rotation(self.cos, self.sin, self.position_ids, self.interleaved, not self.inverse, self.axes)

    @property
    def positions(self) -> int | None:
        """Rows of a table."""
        return None if self.cos is None else self.cos.shape[-2]

    @property
    def positions_of_token(self) -> int | None:
        """How many positions a token has; None: one, without axes."""
        return None if self.axes is None or self.position_ids is None else self.position_ids.shape[0]

    def require_rows(self, tokens: int) -> None:
        """Raise a ValueError if token i has no row i, which it takes without position_ids.

        Public functions check this. Calls of torch.ops.llama_kernels may pass other tables, and a kernel would read
        past their end.
        """
        if self.cos is not None and self.position_ids is None and self.cos.shape[-2] < tokens:
            raise ValueError(message("rope", "cos", shape_of(self.cos), f"a row for each of {tokens} tokens"))

    # --- for kernels that rotate heads which they load ---

    @property
    def tensors_and_axes(self) -> tuple[torch.Tensor | None, ...]:
        return self.cos, self.sin, self.position_ids, self.axes

    @property
    def strides_and_axes(self) -> tuple[Strides | None, ...]:
        """The strides of `tensors_and_axes`. Those of axes: its own, and that of position_ids from axis to axis."""
        if self.axes is None or self.position_ids is None:
            return *self.strides, None
        one = self._replace(position_ids=self.position_ids[0])
        return *one.strides, (self.axes.stride(0), self.position_ids.stride(0))

    # --- for kernels that end with `inverse_rotation`: tables of half width, no axes ---

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.cos, self.sin, self.position_ids

    @property
    def strides(self) -> tuple[Strides | None, ...]:
        """The strides of `tensors`, as `Tables` has them."""
        return _table_strides(self.cos), _table_strides(self.sin), row_strides(self.position_ids)

    @property
    def half(self) -> int:
        """Pairs of a head that are rotated."""
        return 0 if self.cos is None else self.cos.shape[-1]


def rotates_in_registers(half: int, interleaved: bool) -> bool:
    """Whether `inverse_rotation` supports tables of `half` pairs.

    At most 64, since there are no registers for more angles beside the widest x. If not interleaved, a power of two,
    since pairs are separated by reshaping.
    """
    return half <= 64 and (interleaved or half & (half - 1) == 0)
