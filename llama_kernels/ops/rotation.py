"""What the ops that rotate share: the tile, pairs in registers, the angles of a token, their arguments and checks."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from llama_kernels.core.checks import KERNEL_DTYPES, check_tensors, message, shape_of, values_are_checked
from llama_kernels.core.language import tl, triton
from llama_kernels.core.registry import is_differentiated
from llama_kernels.core.tensors import next_power_of_2, sizes_of

TABLE_DTYPES = (*KERNEL_DTYPES, torch.float64)

# --- tiles -----------------------------------------------------------------------------------------------------------


class HeadTile(NamedTuple):
    """One step of a program: BLOCK_T tokens by BLOCK_H heads by BLOCK_R pairs. It steps over the heads."""

    BLOCK_T: int
    BLOCK_H: int
    BLOCK_R: int
    num_warps: int


@functools.cache
def head_tile(half: int, heads: int, lanes: int) -> HeadTile:
    """The tile for `half` pairs a head, where the smaller of q and k has `heads` heads and a warp has `lanes` threads.

    128 threads with 8 pairs each: two 16-byte reads and writes in bfloat16. Tokens fill what the heads leave.
    """
    BLOCK_R = max(next_power_of_2(half), 8)
    vectors = max(1024 // BLOCK_R, 1)  # (token, head) pairs of half-width vectors a step
    BLOCK_H = min(next_power_of_2(heads), vectors)
    return HeadTile(vectors // BLOCK_H, BLOCK_H, BLOCK_R, num_warps=128 // lanes)


# --- on the device ----------------------------------------------------------------------------------------------------


@triton.jit
def load_pairs(vectors, there, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
    """The first and the second element of each pair of the vectors, as float32 [BLOCK_T, BLOCK_H, BLOCK_R]."""
    if INTERLEAVED:
        # Both in one run, parted in registers: loading every second element would need twice the accesses.
        run = tl.arange(0, 2 * BLOCK_R)
        mask = there[:, :, None] & (run < 2 * HALF)[None, None, :]
        x = tl.load(vectors[:, :, None] + run[None, None, :], mask=mask, other=0.0)
        x0, x1 = tl.split(x.reshape(x.shape[0], x.shape[1], BLOCK_R, 2))
    else:
        pair = tl.arange(0, BLOCK_R)
        mask = there[:, :, None] & (pair < HALF)[None, None, :]
        x0 = tl.load(vectors[:, :, None] + pair[None, None, :], mask=mask, other=0.0)
        x1 = tl.load(vectors[:, :, None] + (pair + HALF)[None, None, :], mask=mask, other=0.0)
    return x0.to(tl.float32), x1.to(tl.float32)


@triton.jit
def store_pairs(vectors, there, y0, y1, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
    if INTERLEAVED:
        run = tl.arange(0, 2 * BLOCK_R)
        mask = there[:, :, None] & (run < 2 * HALF)[None, None, :]
        y = tl.join(y0, y1)  # [BLOCK_T, BLOCK_H, BLOCK_R, 2]
        tl.store(vectors[:, :, None] + run[None, None, :], y.reshape(y.shape[0], y.shape[1], 2 * BLOCK_R), mask=mask)
    else:
        pair = tl.arange(0, BLOCK_R)
        mask = there[:, :, None] & (pair < HALF)[None, None, :]
        tl.store(vectors[:, :, None] + pair[None, None, :], y0, mask=mask)
        tl.store(vectors[:, :, None] + (pair + HALF)[None, None, :], y1, mask=mask)


class Angles(NamedTuple):
    """cos and sin of the first and of the second element of each pair, float32 [BLOCK_T, 1, BLOCK_R]. A table of half
    width has one entry for both."""

    cos0: tl.tensor
    cos1: tl.tensor
    sin0: tl.tensor
    sin1: tl.tensor


@triton.jit
def _load_entries(ptr, rows, stride, mask, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of rows of a table, the entries of the first and of the second element of each pair, as float32."""
    columns = tl.arange(0, mask.shape[1]).to(tl.int64)
    if FULL and INTERLEAVED:
        columns *= 2
    first = tl.load(ptr + rows[:, None] + (columns * stride)[None, :], mask=mask, other=0.0).to(tl.float32)
    second = first
    if FULL:
        columns += 1 if INTERLEAVED else HALF
        second = tl.load(ptr + rows[:, None] + (columns * stride)[None, :], mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, b, s, live, positions,
    HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Angles of the tokens (b, s): of row position_ids[b, s], kept inside the table, or s. Strides of tables are of
    batch, row and entry. FULL: tables of full width. INVERSE: of the transpose, which turns by the negative angle where
    the entries of a pair agree."""
    row = s
    if position_ids_ptr is not None:
        row = tl.load(position_ids_ptr + b * position_strides[0] + s * position_strides[1], mask=live, other=0)
        row = tl.minimum(tl.maximum(row.to(tl.int64), 0), positions - 1)
    mask = live[:, None] & (tl.arange(0, BLOCK_R) < HALF)[None, :]
    cos_rows, sin_rows = b * cos_strides[0] + row * cos_strides[1], b * sin_strides[0] + row * sin_strides[1]
    cos0, cos1 = _load_entries(cos_ptr, cos_rows, cos_strides[2], mask, HALF, FULL, INTERLEAVED)
    sin0, sin1 = _load_entries(sin_ptr, sin_rows, sin_strides[2], mask, HALF, FULL, INTERLEAVED)
    if INVERSE:
        sin0, sin1 = -sin1, -sin0
    return Angles(cos0[:, None, :], cos1[:, None, :], sin0[:, None, :], sin1[:, None, :])


@triton.jit
def rotate(x0, x1, angles):
    """Each pair rotated by its angle."""
    return x0 * angles.cos0 - x1 * angles.sin0, x1 * angles.cos1 + x0 * angles.sin1


@triton.jit
def _inverse_rotation_of_pairs(
    x0, x1, cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, b, s, live, positions,
    HALF: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The pairs x0, x1 [BLOCK, PAIRS] of the tokens (b, s) rotated by their negative angles, from HALF on as they are.
    32 of a token at once: beside x there are registers for so many angles."""
    if PAIRS > 32:
        SOME: tl.constexpr = PAIRS // 2
        y0, z0 = tl.split(x0.reshape(BLOCK, 2, SOME).permute(0, 2, 1))
        y1, z1 = tl.split(x1.reshape(BLOCK, 2, SOME).permute(0, 2, 1))
        y0, y1 = _inverse_rotation_of_pairs(
            y0, y1, cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides,
            b, s, live, positions, HALF, BLOCK, SOME,
        )  # fmt: skip
        if HALF > SOME:
            z0, z1 = _inverse_rotation_of_pairs(
                z0, z1, cos_ptr + SOME * tl.cast(cos_strides[2], tl.int64),
                sin_ptr + SOME * tl.cast(sin_strides[2], tl.int64), position_ids_ptr, cos_strides, sin_strides,
                position_strides, b, s, live, positions, HALF - SOME, BLOCK, SOME,
            )  # fmt: skip
        y0 = tl.join(y0, z0).permute(0, 2, 1).reshape(BLOCK, PAIRS)
        y1 = tl.join(y1, z1).permute(0, 2, 1).reshape(BLOCK, PAIRS)
    else:
        angles = load_angles(
            cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, b, s, live, positions,
            HALF, False, False, True, PAIRS,
        )  # fmt: skip
        cos, sin = angles.cos0.reshape(BLOCK, PAIRS), angles.sin0.reshape(BLOCK, PAIRS)
        if HALF < PAIRS:  # there the sine is 0 already
            cos = tl.where((tl.arange(0, PAIRS) < HALF)[None, :], cos, 1.0)
        y0, y1 = rotate(x0, x1, Angles(cos, cos, sin, sin))
    return y0, y1


@triton.jit
def inverse_rotation(
    x, cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, b, s, live, positions,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """float32 x [BLOCK, BLOCK_D], a head of the tokens (b, s), rotated by their negative angles, of tables of half
    width; what lies past the rotated width stays.

    For the end of a kernel whose x is a sum of products. The pairs are told apart by reshaping, which leaves every
    element where it is: the thread that has one of a pair has the other too, however tensor cores lay x out.
    `rotates_in_registers` says which pairs it takes.
    """
    PAIRS: tl.constexpr = BLOCK_D // 2
    RUNS: tl.constexpr = PAIRS // HALF  # of 2 HALF elements, where pairs are halves: the first is rotated
    if INTERLEAVED:
        x0, x1 = tl.split(x.reshape(BLOCK, PAIRS, 2))
    else:
        x0, x1 = tl.split(x.reshape(BLOCK, RUNS, 2, HALF).permute(0, 1, 3, 2))
        x0, x1 = x0.reshape(BLOCK, PAIRS), x1.reshape(BLOCK, PAIRS)
    y0, y1 = _inverse_rotation_of_pairs(
        x0, x1, cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides,
        tl.cast(b, tl.int64), s, live, positions, HALF, BLOCK, PAIRS,
    )  # fmt: skip
    if INTERLEAVED:
        y = tl.join(y0, y1)
    else:
        y = tl.join(y0.reshape(BLOCK, RUNS, HALF), y1.reshape(BLOCK, RUNS, HALF)).permute(0, 1, 3, 2)
    return y.reshape(BLOCK, BLOCK_D)


# --- on the host -----------------------------------------------------------------------------------------------------


def row_strides(x: torch.Tensor | None, batched: bool) -> tuple[int, int] | None:
    """Of batch and row, for what holds one row a token, or a table of rows that the whole batch shares."""
    if x is None:
        return None
    if not batched:
        return 0, x.stride(0)
    return (0 if x.shape[0] == 1 else x.stride(0)), x.stride(1)


def full_width(cos: torch.Tensor, head_dim: int) -> bool:
    """Whether tables hold an entry for each element of a head, not for each pair: wherever they are too wide for the
    latter."""
    return 2 * cos.shape[-1] > head_dim


def pairs_of(cos: torch.Tensor, head_dim: int) -> dict[str, Any]:
    """HALF, the pairs of a head that are rotated, and FULL, whether the tables are of full width."""
    full = full_width(cos, head_dim)
    return {"HALF": cos.shape[-1] // 2 if full else cos.shape[-1], "FULL": full}


def angle_arguments(
    cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None
) -> tuple[tuple[torch.Tensor | None, ...], tuple[tuple[int, ...] | None, ...]]:
    """What `load_angles` takes: the three tensors, and the strides of each."""
    tables = ((*row_strides(table, table.ndim == 3), table.stride(-1)) for table in (cos, sin))
    positions = row_strides(position_ids, position_ids is not None and position_ids.ndim == 2)
    return (cos, sin, position_ids), (*tables, positions)


class Rotation(NamedTuple):
    """What a kernel that ends with `inverse_rotation` is launched with: tables of half width."""

    tensors: tuple[torch.Tensor | None, ...] = (None, None, None)  # cos, sin, position_ids
    strides: tuple[tuple[int, ...] | None, ...] = (None, None, None)
    positions: int | None = None
    half: int = 0
    interleaved: bool = False


def rotation_of(cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None, interleaved: bool) -> Rotation:
    return Rotation(*angle_arguments(cos, sin, position_ids), cos.shape[-2], cos.shape[-1], interleaved)


def rotates_in_registers(half: int, interleaved: bool) -> bool:
    """Whether `inverse_rotation` takes tables of `half` pairs.

    At most 64: for more angles there are too few registers beside the widest x. Where the pairs are not interleaved,
    only a power of two, since reshaping tells them apart.
    """
    return half <= 64 and (interleaved or half & (half - 1) == 0)


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor | None, **others: torch.Tensor | None) -> None:
    """q and k are heads of the same tokens; `others` are tensors of any shape beside them."""
    check_tensors(op, q=q, k=k, **others)
    if q.ndim not in (3, 4):
        raise ValueError(message(op, "q", shape_of(q), "(B, Hq, S, D), or (T, Hq, D) where tokens are packed"))
    if k is None:
        return
    if k.ndim != q.ndim or sizes_of(k)[::2] != sizes_of(q)[::2] or k.shape[-1] != q.shape[-1]:
        wanted = f"of q's shape {tuple(q.shape)} but for the number of heads"
        raise ValueError(message(op, "k", shape_of(k), wanted))
    if k.dtype != q.dtype:
        raise TypeError(message(op, "k", k.dtype, f"the dtype of q, {q.dtype}"))


def tokens_of(q: torch.Tensor) -> tuple[int | None, int]:
    """Batch and tokens of heads; None for the batch where tokens are packed."""
    return (q.shape[0], q.shape[2]) if q.ndim == 4 else (None, q.shape[0])


def check_angles(
    op: str,
    name: str,
    x: torch.Tensor,
    tokens: tuple[int | None, int],
    head_dim: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> None:
    """cos, sin and position_ids fit the heads of `head_dim` that x, the argument `name`, holds of `tokens`."""
    check_tensors(op, None, **{name: x, "cos": cos, "sin": sin})
    B, S = tokens
    per_token = cos.ndim == 3
    if sin.shape != cos.shape:
        raise ValueError(message(op, "sin", shape_of(sin), f"the shape of cos, {tuple(cos.shape)}"))
    if cos.dtype not in TABLE_DTYPES:
        raise TypeError(message(op, "cos", cos.dtype, " or ".join(map(str, TABLE_DTYPES))))
    if sin.dtype != cos.dtype:
        raise TypeError(message(op, "sin", sin.dtype, f"the dtype of cos, {cos.dtype}"))
    if cos.ndim not in (2, 3) or (per_token and (B is None or cos.shape[0] not in (1, B) or cos.shape[1] != S)):
        rows = "(positions, R/2)" if B is None else f"(positions, R/2) or a row a token, ({B}, {S}, R/2)"
        raise ValueError(message(op, "cos", shape_of(cos), f"{rows}; R in place of R/2 for an angle an element"))
    width = cos.shape[-1]
    if not 0 < width <= head_dim or (full_width(cos, head_dim) and width % 2):
        wanted = f"an angle a pair, 1 to D/2 = {head_dim // 2} of them in the last dimension, or an angle an element, "
        wanted += f"an even number of them up to D = {head_dim}"
        raise ValueError(message(op, "cos", shape_of(cos), wanted))
    for table, angles in (("cos", cos), ("sin", sin)):
        if torch.is_grad_enabled() and is_differentiated(angles):
            fix = f"Pass {table}.detach(), or use llama_kernels.reference.{op} to train the angles."
            raise ValueError(message(op, table, "a tensor that requires grad", "a constant table", fix))

    if position_ids is None:
        if not per_token and cos.shape[0] < S:
            raise ValueError(message(op, "cos", shape_of(cos), f"a table of at least {S} positions, one a token"))
        return
    if per_token:
        fix = "A row a token already says which angles each token gets."
        raise ValueError(message(op, "position_ids", "given beside cos of a row a token", "None", fix))
    if S and not cos.shape[0]:
        raise ValueError(message(op, "cos", shape_of(cos), "a table of at least one position"))
    check_rows(op, "position_ids", position_ids, name, x, tokens, cos.shape[0], "rows of the table")


def check_rows(
    op: str,
    name: str,
    rows: torch.Tensor,
    of: str,
    x: torch.Tensor,
    tokens: tuple[int | None, int],
    count: int,
    what: str,
) -> None:
    """`rows`, the argument `name`, is an integer a token of x, the argument `of`; where values are checked, each is one
    of `count` `what`."""
    B, S = tokens
    if not isinstance(rows, torch.Tensor):
        raise TypeError(message(op, name, f"a {type(rows).__name__}", "a torch.Tensor"))
    if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
        raise TypeError(message(op, name, rows.dtype, "a tensor of integers"))
    if rows.device != x.device:
        raise ValueError(message(op, name, f"on {rows.device}", f"the device of {of}, {x.device}"))
    shapes = ((S,),) if B is None else ((S,), (1, S), (B, S))
    if tuple(rows.shape) not in shapes:
        raise ValueError(message(op, name, shape_of(rows), " or ".join(map(str, shapes))))
    if values_are_checked(rows) and rows.numel():
        first, last = (int(row) for row in rows.aminmax())
        if first < 0 or last >= count:
            raise ValueError(message(op, name, f"from {first} to {last}", f"{what}, 0 to {count - 1}"))
