"""RMSNorm, alone and fused with the residual add before it.

For a row s, which is x, or x + residual, with rstd = 1 / sqrt(mean(s^2) + eps) and xhat = s * rstd:

    y = xhat * (offset + weight)

and in the backward, with g = dy * (offset + weight):

    dx = rstd * (g - xhat * mean(g * xhat)) + ds    ds: the gradient of residual_out, which is s
    dweight = sum of dy * xhat over rows

In forward mode the tangents of x, weight and y are tx, tweight and ty.

A row is one vector over the last dimension. Every tensor is passed with the strides of up to three row dimensions, so
rows need not be contiguous: a norm of each head reads a packed projection in place.

The sections, from top to bottom, are the layers of an op, as in the other files of this folder: tiles, kernels,
launchers, registered ops, autograd, public functions. docs/architecture.md says what each layer is for.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from llama_kernels import reference
from llama_kernels.core.autograd import Differentiable, needs_grad, save
from llama_kernels.core.checks import check_eps, check_offset, check_tensors, message, shape_of
from llama_kernels.core.device import lanes_of, processors_of, shared_bytes_of
from llama_kernels.core.language import TRITON_VERSION, cast, inverse_root, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.registry import register, register_gradient
from llama_kernels.core.second_derivatives import pushforward, results_and_pullback, with_derivatives_of
from llama_kernels.core.tensors import (
    MAX_ROW_DIMS,
    cdiv,
    dense_in_order_of,
    empty_in_order_of,
    is_dense_in_order_of,
    last_dim_contiguous,
    next_power_of_2,
    require_contiguous,
    rows_of,
)
from llama_kernels.ops.cpu_norm import normalise, scale_of, through_norm
from llama_kernels.ops.partials import sum_partials

# --- tiles -----------------------------------------------------------------------------------------------------------


class RowTile(NamedTuple):
    """One program's tile: BLOCK_R rows of BLOCK_N columns. It takes a row longer than BLOCK_N in several steps."""

    BLOCK_R: int
    BLOCK_N: int
    threads: int
    programs: int  # that run on each SM, in kernels whose programs take one tile after another

    def options(self, N: int, device: torch.device) -> dict[str, int]:
        """The launch options for rows of N elements."""
        return {
            "N": N, "BLOCK_R": self.BLOCK_R, "BLOCK_N": self.BLOCK_N, "num_warps": self.threads // lanes_of(device)
        }  # fmt: skip

    def stages(self, device: torch.device, *tensors: torch.Tensor | None) -> int:
        """1 plus the number of tiles of `tensors` that a program loads ahead, which is at most two.

        The tiles of all programs of an SM fit into its shared memory.
        """
        tile_bytes = self.BLOCK_R * self.BLOCK_N * sum(t.element_size() for t in tensors if t is not None)
        return 1 + min(2, (shared_bytes_of(device) // self.programs - 2048) // tile_bytes)


@functools.cache
def row_tile(pass_: str, N: int, itemsize: int = 2) -> RowTile:
    """The tile for rows of N elements of at most `itemsize` bytes.

    pass_: "forward"; "backward", for dx, for dw where a row fits one tile, and for the tangent of y; or "weight_grad",
    for dw alone.
    """
    halves = max(itemsize // 2, 1)
    columns, rows = _ROW_TILES[pass_]
    width = max(next_power_of_2(N), 16)
    elements, threads, programs = next(row for up_to, *row in rows if up_to >= width * halves)
    BLOCK_N = min(width, elements // halves, columns)
    return RowTile(max(elements // halves // BLOCK_N, 1), BLOCK_N, threads, programs)


# pass: (most columns in a step, ((up to this width, elements in a tile, threads, programs on an SM), ...)). Widths and
# elements are counted in two bytes; an element of four bytes counts twice. A thread needs 16 bytes of a row for a
# 16-byte access. Short rows share a program; from 4096 on a program has one row.
_ROW_TILES = {
    # 32 elements a thread at 16384 and 32768: 58 and 63 registers on sm_90. 65536 would spill, so longer rows take
    # several steps.
    "forward": (
        32768,
        ((1024, 4096, 128, 1), (4096, 4096, 256, 1), (8192, 8192, 512, 1), (16384, 16384, 512, 1),
         (math.inf, 32768, 1024, 1)),
    ),
    # dw stays in registers beside x and dy. Short rows need many programs to hide the sums across a row; one program
    # with long rows fills an SM. At 16384 there is no room for the weight either, which is read again for each row.
    # Longer rows take several steps.
    "backward": (
        16384,
        ((256, 8192, 256, 4), (1024, 4096, 128, 4), (4096, 4096, 256, 2), (8192, 8192, 512, 1),
         (16384, 16384, 1024, 1), (math.inf, 4096, 256, 4)),
    ),
    # Blocks of columns, whose rows are divided among programs. 64 columns still make whole lines of 128 bytes.
    "weight_grad": (256, ((math.inf, 4096, 128, 4),)),
}  # fmt: skip

# Up to this width the weight stays in registers from row to row.
_WEIGHT_STAYS: tl.constexpr = tl.constexpr(8192)
# From Triton 3.8 on, the code for the backward of longer rows needs a few more registers than the 64 of a thread.
_TIGHT: tl.constexpr = tl.constexpr(TRITON_VERSION >= (3, 8))


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _row_starts(rows, row_sizes, strides):
    """The offset of each row, in elements. Rows are numbered over three dimensions; row_sizes: of the inner two."""
    inner = rows % row_sizes[1]
    middle = rows // row_sizes[1] % row_sizes[0]
    outer = rows // row_sizes[1] // row_sizes[0]
    return outer.to(tl.int64) * strides[0] + middle.to(tl.int64) * strides[1] + inner.to(tl.int64) * strides[2]


@triton.jit
def _load(row_ptrs, cols, mask):
    """The columns `cols` of rows, as float32; 0 outside the mask."""
    return tl.load(row_ptrs[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_columns(ptr, cols, N: tl.constexpr):
    """The columns `cols` of a vector of N elements, as float32 [1, BLOCK_N]; 0 past its end."""
    return tl.load(ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_scale(weight_ptr, cols, offset, N: tl.constexpr):
    """offset + weight as [1, BLOCK_N]; 1 where there is no weight."""
    if weight_ptr is None:
        scale = tl.full([1, 1], 1.0, tl.float32)
    else:
        scale = offset + _load_columns(weight_ptr, cols, N)
    return scale


@triton.jit
def _load_summed(x_rows, residual_rows, s_ptr, cols, mask):
    """s, float32: x, or x + residual rounded to the dtype of the residual, so that the norm reads what is stored."""
    s = _load(x_rows, cols, mask)
    if residual_rows is not None:
        s = cast(s + _load(residual_rows, cols, mask), s_ptr.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _store_normed(y_rows, live, s, rstd, scale, weight_ptr, offset, n, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store the columns of y from n on. scale: offset + weight; None: it is loaded here."""
    cols = n + tl.arange(0, BLOCK_N)
    if scale is None:
        scale = _load_scale(weight_ptr, cols, offset, N)
    y = cast(s * rstd[:, None] * scale, y_rows.dtype.element_ty)
    tl.store(y_rows[:, None] + cols[None, :], y, mask=live[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, s_ptr, rstd_ptr,
    x_strides, residual_strides, y_strides, s_strides, rstd_strides, row_sizes,
    M, eps, offset,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """s = x (+ residual);  rstd = 1 / sqrt(mean(s^2) + eps);  y = s * rstd * (offset + weight).

    A program computes BLOCK_R rows, in float32. x, residual, y, s: (M, N); weight: (N,); rstd: (M,) float32. residual
    and s, and weight, may be None.
    Bytes: x and residual in, y and s out, once each. Of rows longer than BLOCK_N all but the last step is read twice:
    x again, or s where there is a residual. FLOPs: 4 M N.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < M
    x_rows = x_ptr + _row_starts(rows, row_sizes, x_strides)
    y_rows = y_ptr + _row_starts(rows, row_sizes, y_strides)
    residual_rows = residual_ptr
    if residual_ptr is not None:
        residual_rows = residual_ptr + _row_starts(rows, row_sizes, residual_strides)
        s_rows = s_ptr + _row_starts(rows, row_sizes, s_strides)

    scale = None
    if N <= BLOCK_N and N <= _WEIGHT_STAYS:  # loaded while the squares are summed
        scale = _load_scale(weight_ptr, tl.arange(0, BLOCK_N), offset, N)
    s = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_R], tl.float32)
    for n in range(0, N, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        mask = live[:, None] & (cols < N)[None, :]
        s = _load_summed(x_rows, residual_rows, s_ptr, cols, mask)  # [BLOCK_R, BLOCK_N]
        squares += tl.sum(s * s, 1)
        if residual_ptr is not None:
            tl.store(s_rows[:, None] + cols[None, :], cast(s, s_ptr.dtype.element_ty), mask=mask)
    rstd = inverse_root(squares / N + eps)  # [BLOCK_R]
    tl.store(rstd_ptr + _row_starts(rows, row_sizes, rstd_strides), rstd, mask=live)

    last = (N - 1) // BLOCK_N * BLOCK_N
    _store_normed(y_rows, live, s, rstd, scale, weight_ptr, offset, last, N, BLOCK_N)
    if N > BLOCK_N:  # the last step is in registers; of the others, the later ones are likelier to be in L2
        if residual_ptr is not None:
            tl.debug_barrier()  # a thread may read elements of s that another thread wrote
            x_rows = s_rows
        for step in range(1, tl.cdiv(N, BLOCK_N)):
            n = last - step * BLOCK_N
            cols = n + tl.arange(0, BLOCK_N)
            s = _load(x_rows, cols, live[:, None] & (cols < N)[None, :])
            _store_normed(y_rows, live, s, rstd, None, weight_ptr, offset, n, N, BLOCK_N)


@triton.jit
def _store_dx(
    dx_rows, ds_rows, live, g, xhat, rstd, mean, eps, n, N: tl.constexpr, BLOCK_N: tl.constexpr,
    TIGHT: tl.constexpr = False,
):  # fmt: skip
    """Store the columns of dx from n on. g and xhat: of these columns; if TIGHT, g is rstd * g, and xhat is x."""
    cols = n + tl.arange(0, BLOCK_N)
    mask = live[:, None] & (cols < N)[None, :]
    if N == 1:
        dx = g * rstd * (eps * rstd * rstd)  # eps rstd^2 = 1 - xhat^2, which rounding would lose below
    elif TIGHT:
        dx = tl.fma(xhat * rstd, -rstd * mean, g)  # of g, a product, the compiler would hold the two factors
    else:
        dx = rstd * (g - xhat * mean)
    if ds_rows is not None:
        dx += _load(ds_rows, cols, mask)
    tl.store(dx_rows[:, None] + cols[None, :], cast(dx, dx_rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_backward_kernel(
    dy_ptr, ds_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dw_ptr,
    dy_strides, ds_strides, x_strides, rstd_strides, dx_strides, row_sizes,
    M, columns, eps, offset,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - xhat * mean(g * xhat)) (+ ds), xhat = x * rstd, g = dy * (offset + weight); dw = sum(dy * xhat).

    A program computes every num_programs-th tile of BLOCK_R rows, in float32. Where a row fits one tile, it loads
    STAGES - 1 tiles ahead, and sums its share of dw in registers, which it stores to its own row of dw_ptr
    (programs, N). ds, weight and dw may be None.
    `columns` is N as a number that the compiler does not know. With N, it would unroll the steps of a long row until
    the registers run out.
    Bytes: dy, x and ds in, dx out, once each. Of rows longer than BLOCK_N all but the last step of dy and x is read
    twice. FLOPs: 10 M N.
    """
    tl.static_assert(dw_ptr is None or N <= BLOCK_N, "dw is kept only where a row fits one tile")
    # If TIGHT, registers hold x in its dtype, two elements each, and no address of the weight while a row is summed.
    LONG: tl.constexpr = N <= BLOCK_N and N > _WEIGHT_STAYS
    TIGHT: tl.constexpr = _TIGHT and LONG and BLOCK_R == 1 and ds_ptr is not None and weight_ptr is not None
    first_cols = tl.arange(0, BLOCK_N)
    scale = None
    if N <= BLOCK_N and N <= _WEIGHT_STAYS:
        scale = _load_scale(weight_ptr, first_cols, offset, N)  # [1, BLOCK_N]
    dw = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    last = (N - 1) // BLOCK_N * BLOCK_N
    for start in tl.range(tl.program_id(0) * BLOCK_R, M, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_R)
        live = (rows < M) | TIGHT  # TIGHT: the program has one row, which exists
        dy_rows = dy_ptr + _row_starts(rows, row_sizes, dy_strides)
        x_rows = x_ptr + _row_starts(rows, row_sizes, x_strides)
        dx_rows = dx_ptr + _row_starts(rows, row_sizes, dx_strides)
        ds_rows = ds_ptr
        if ds_ptr is not None:
            ds_rows = ds_ptr + _row_starts(rows, row_sizes, ds_strides)
        rstd = tl.load(rstd_ptr + _row_starts(rows, row_sizes, rstd_strides), mask=live, other=0.0)[:, None]

        g = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        xhat = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        mean = tl.zeros([BLOCK_R], tl.float32)
        for n in range(0, N if N <= BLOCK_N else columns, BLOCK_N):
            cols = n + first_cols
            mask = live[:, None] & (cols < N)[None, :]
            xhat = _load(x_rows, cols, mask)  # [BLOCK_R, BLOCK_N]
            if not TIGHT:
                xhat *= rstd
            g = _load(dy_rows, cols, mask)
            weight_here = weight_ptr
            if TIGHT:
                g *= rstd
                weight_here += tl.multiple_of(tl.minimum(start, 0), 16)  # 0, unknown to the compiler
            if dw_ptr is not None:
                dw += g * xhat
            g *= _load_scale(weight_here, cols, offset, N) if scale is None else scale
            mean += tl.sum(g * xhat, 1)
        mean = mean[:, None] / N

        _store_dx(dx_rows, ds_rows, live, g, xhat, rstd, mean, eps, last, N, BLOCK_N, TIGHT)
        # The last step is in registers; of the others, the later ones are likelier to be in L2.
        for step in range(1, 1 if N <= BLOCK_N else tl.cdiv(columns, BLOCK_N)):
            n = last - step * BLOCK_N
            cols = n + first_cols
            mask = live[:, None] & (cols < N)[None, :]
            xhat = _load(x_rows, cols, mask) * rstd
            g = _load(dy_rows, cols, mask) * _load_scale(weight_ptr, cols, offset, N)
            _store_dx(dx_rows, ds_rows, live, g, xhat, rstd, mean, eps, n, N, BLOCK_N)

    if dw_ptr is not None:
        tl.store(dw_ptr + tl.program_id(0) * N + first_cols, tl.sum(dw, 0), mask=first_cols < N)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_weight_grad_kernel(
    dy_ptr, x_ptr, rstd_ptr, dw_ptr,
    dy_strides, x_strides, rstd_strides, row_sizes,
    M,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dw = sum(dy * x * rstd) over rows: for rows too long to keep dw in registers, or where dx is not needed.

    Program (c, p) sums BLOCK_N columns of every num_programs(1)-th tile of BLOCK_R rows, in float32, into row p of
    dw_ptr (programs, N). Bytes: dy and x in, once each. FLOPs: 3 M N.
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in tl.range(tl.program_id(1) * BLOCK_R, M, tl.num_programs(1) * BLOCK_R, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        rstd = tl.load(rstd_ptr + _row_starts(rows, row_sizes, rstd_strides), mask=rows < M, other=0.0)
        xhat = _load(x_ptr + _row_starts(rows, row_sizes, x_strides), cols, mask) * rstd[:, None]
        dw += _load(dy_ptr + _row_starts(rows, row_sizes, dy_strides), cols, mask) * xhat
    tl.store(dw_ptr + tl.program_id(1) * N + cols, tl.sum(dw, 0), mask=cols < N)


@triton.jit
def _tangent_of(tx, xhat, rstd, mean, weight_ptr, tweight_ptr, cols, eps, offset, N: tl.constexpr):
    """The tangent of y in the columns `cols`, where x has the tangent tx. mean: of tx * xhat over the row."""
    if N == 1:
        ty = tx * rstd * (eps * rstd * rstd)  # as in `_store_dx`
    else:
        ty = rstd * (tx - xhat * mean)
    ty *= _load_scale(weight_ptr, cols, offset, N)
    if tweight_ptr is not None:
        ty += xhat * _load_columns(tweight_ptr, cols, N)
    return ty


@triton.jit(do_not_specialize=["M"])
def _rms_norm_tangent_kernel(
    tx_ptr, x_ptr, weight_ptr, tweight_ptr, rstd_ptr, ty_ptr,
    tx_strides, x_strides, rstd_strides, ty_strides, row_sizes,
    M, columns, eps, offset,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ty = rstd * (tx - xhat * mean(tx * xhat)) * (offset + weight) + xhat * tweight, where xhat = x * rstd.

    ty is the tangent of y, where x has the tangent tx and the weight has the tangent tweight.
    A program computes BLOCK_R rows, in float32. tx, x, ty: (M, N); weight, tweight: (N,) or None; rstd: (M,) float32.
    `columns` is N, as in `_rms_norm_backward_kernel`.
    Bytes: tx and x in, ty out, once each. Of rows longer than BLOCK_N all but the last step of tx and x is read twice.
    FLOPs: 9 M N.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < M
    tx_rows = tx_ptr + _row_starts(rows, row_sizes, tx_strides)
    x_rows = x_ptr + _row_starts(rows, row_sizes, x_strides)
    ty_rows = ty_ptr + _row_starts(rows, row_sizes, ty_strides)
    dtype: tl.constexpr = ty_ptr.dtype.element_ty
    rstd = tl.load(rstd_ptr + _row_starts(rows, row_sizes, rstd_strides), mask=live, other=0.0)[:, None]

    tx = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    xhat = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_R], tl.float32)
    for n in range(0, N if N <= BLOCK_N else columns, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        mask = live[:, None] & (cols < N)[None, :]
        tx = _load(tx_rows, cols, mask)  # [BLOCK_R, BLOCK_N]
        xhat = _load(x_rows, cols, mask) * rstd
        mean += tl.sum(tx * xhat, 1)
    mean = mean[:, None] / N

    last = (N - 1) // BLOCK_N * BLOCK_N
    cols = last + tl.arange(0, BLOCK_N)
    ty = _tangent_of(tx, xhat, rstd, mean, weight_ptr, tweight_ptr, cols, eps, offset, N)
    tl.store(ty_rows[:, None] + cols[None, :], cast(ty, dtype), mask=live[:, None] & (cols < N)[None, :])
    # The last step is in registers; of the others, the later ones are likelier to be in L2.
    for step in range(1, 1 if N <= BLOCK_N else tl.cdiv(columns, BLOCK_N)):
        cols = last - step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = live[:, None] & (cols < N)[None, :]
        tx = _load(tx_rows, cols, mask)
        xhat = _load(x_rows, cols, mask) * rstd
        ty = _tangent_of(tx, xhat, rstd, mean, weight_ptr, tweight_ptr, cols, eps, offset, N)
        tl.store(ty_rows[:, None] + cols[None, :], cast(ty, dtype), mask=mask)


# --- launchers -------------------------------------------------------------------------------------------------------


class _Forward(NamedTuple):
    """The parameters of the op `rms_norm_forward`."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    eps: float
    offset: float


class _Backward(NamedTuple):
    """The parameters of the op `rms_norm_backward`."""

    dy: torch.Tensor
    ds: torch.Tensor | None  # the gradient of s, the sum that was normalised
    x: torch.Tensor  # what was normalised: s where there was a residual
    weight: torch.Tensor | None
    rstd: torch.Tensor
    eps: float
    offset: float
    grad_dtype: torch.dtype  # of dx
    need_dx: bool
    need_dw: bool


class _Tangent(NamedTuple):
    """The parameters of the op `rms_norm_tangent`."""

    tx: torch.Tensor  # the tangent of x
    x: torch.Tensor  # what was normalised: s where there was a residual
    weight: torch.Tensor | None
    tweight: torch.Tensor | None  # the tangent of the weight
    rstd: torch.Tensor
    eps: float
    offset: float
    dtype: torch.dtype  # of y and of its tangent


def _widest(*tensors: torch.Tensor | None) -> int:
    """Bytes of the widest element."""
    return max(t.element_size() for t in tensors if t is not None)


def _check_row_count(count: int) -> None:
    """The kernels number the rows in 32 bits. A loop over tiles goes past the last row, by less than 2^24."""
    if count > 2**31 - 2**24:
        raise ValueError(message("rms_norm", "x", f"a tensor of {count} rows", "at most 2^31 - 2^24 rows"))


@cached_launch
def _launch_forward(call: _Forward, y: torch.Tensor, s: torch.Tensor | None, rstd: torch.Tensor) -> list[Launch]:
    """The launch that fills y, rstd and, with a residual, s."""
    x, residual, weight, eps, offset = call
    if not x.numel():
        return []
    rows = rows_of(x, residual, y, s, rstd)
    _check_row_count(rows.count)
    require_contiguous(weight)
    tile = row_tile("forward", x.shape[-1], _widest(x, residual, weight))
    x, residual, *outs = rows.tensors
    args = (x, residual, weight, *outs, *rows.strides, rows.sizes, rows.count, eps, offset)
    options = tile.options(x.shape[-1], x.device)
    return [Launch(_rms_norm_forward_kernel, (cdiv(rows.count, tile.BLOCK_R),), args, options)]


class _Shares(NamedTuple):
    """How the work of a backward is divided among programs."""

    grid: int  # programs of the kernel that computes dx
    partials: int  # rows of partial sums of dw
    with_dx: bool  # whether the kernel that computes dx computes dw too


@functools.lru_cache(maxsize=1024)
def _shares(M: int, N: int, dx_itemsize: int, dw_itemsize: int, need_dx: bool, processors: int) -> _Shares:
    """The shares for M rows of N elements. dx_itemsize, dw_itemsize: the widest element that each kernel reads."""
    tile = row_tile("backward", N, dx_itemsize)
    grid = min(tile.programs * processors, cdiv(M, tile.BLOCK_R))
    if need_dx and tile.BLOCK_N >= N:
        return _Shares(grid, grid, True)
    tile = row_tile("weight_grad", N, dw_itemsize)
    return _Shares(grid, min(cdiv(tile.programs * processors, cdiv(N, tile.BLOCK_N)), cdiv(M, tile.BLOCK_R)), False)


@cached_launch
def _launch_backward(
    call: _Backward, shares: _Shares, dx: torch.Tensor, dw: torch.Tensor, partials: torch.Tensor | None
) -> list[Launch]:
    """The launches that fill dx and dw. partials: (shares.partials, N) float32, or None where dw is not needed."""
    weight, N, device = call.weight, call.x.shape[-1], call.x.device
    require_contiguous(weight)
    rows = rows_of(call.x, call.dy, call.ds, call.rstd, dx if call.need_dx else None)
    _check_row_count(rows.count)
    x, dy, ds, rstd, dx_rows = rows.tensors
    x_strides, dy_strides, ds_strides, rstd_strides, dx_strides = rows.strides
    launches = []
    if call.need_dx:
        tile = row_tile("backward", N, _widest(x, dy, ds, weight))
        args = (
            dy, ds, x, weight, rstd, dx_rows, partials if shares.with_dx else None,
            dy_strides, ds_strides, x_strides, rstd_strides, dx_strides, rows.sizes,
            rows.count, N, call.eps, call.offset,
        )  # fmt: skip
        stages = tile.stages(device, x, dy, ds, None if _WEIGHT_STAYS.value >= N else weight)
        options = {**tile.options(N, device), "STAGES": stages}
        launches.append(Launch(_rms_norm_backward_kernel, (shares.grid,), args, options))
    if partials is not None and not shares.with_dx:
        tile = row_tile("weight_grad", N, _widest(x, dy))
        weight_args = (dy, x, rstd, partials, dy_strides, x_strides, rstd_strides, rows.sizes, rows.count)
        options = {**tile.options(N, device), "STAGES": tile.stages(device, x, dy)}
        grid = (cdiv(N, tile.BLOCK_N), shares.partials)
        launches.append(Launch(_rms_norm_weight_grad_kernel, grid, weight_args, options))
    if partials is not None:
        launches.append(sum_partials(partials, dw))
    return launches


@cached_launch
def _launch_tangent(call: _Tangent, ty: torch.Tensor) -> list[Launch]:
    """The launch that fills ty, the tangent of y."""
    if not call.x.numel():
        return []
    rows = rows_of(call.x, call.tx, call.rstd, ty)
    _check_row_count(rows.count)
    require_contiguous(call.weight, call.tweight)
    N = call.x.shape[-1]
    tile = row_tile("backward", N, _widest(call.tx, call.x, call.weight))  # like the backward, it holds two rows
    x, tx, rstd, out = rows.tensors
    x_strides, tx_strides, rstd_strides, ty_strides = rows.strides
    args = (
        tx, x, call.weight, call.tweight, rstd, out, tx_strides, x_strides, rstd_strides, ty_strides, rows.sizes,
        rows.count, N, call.eps, call.offset,
    )  # fmt: skip
    return [Launch(_rms_norm_tangent_kernel, (cdiv(rows.count, tile.BLOCK_R),), args, tile.options(N, x.device))]


# --- registered ops --------------------------------------------------------------------------------------------------


def _forward_fake(call):
    x, residual = call.x, call.residual
    y = empty_in_order_of(x)
    s = x.new_empty(0) if residual is None else empty_in_order_of(residual)
    rstd = empty_in_order_of(x, (*x.shape[:-1], 1), torch.float32)
    return y, s, rstd


def _forward(call):
    y, s, rstd = _forward_fake(call)
    summed = s
    if call.residual is not None and call.x.ndim > MAX_ROW_DIMS + 1 and not is_dense_in_order_of(call.x, s):
        summed = empty_in_order_of(call.x, dtype=s.dtype)  # `rows_of` would copy s, and the kernel fill the copy
    _launch_forward(call, y, None if call.residual is None else summed, rstd)
    return y, s if summed is s else s.copy_(summed), rstd


def _forward_on_cpu(call):
    x, residual, weight, eps, offset = call
    if residual is None:
        s, s_out = x, x.new_empty(0)
    else:
        s = s_out = dense_in_order_of(residual, (x.float() + residual.float()).to(residual.dtype))
    y, rstd = normalise(s.float(), weight, eps, offset)
    return dense_in_order_of(x, y.to(x.dtype)), s_out, dense_in_order_of(x, rstd)


def _backward_fake(call):
    x, weight = call.x, call.weight
    dx = empty_in_order_of(x, dtype=call.grad_dtype) if call.need_dx else x.new_empty(0)
    dw = weight.new_empty(weight.shape) if call.need_dw else x.new_empty(0)
    return dx, dw


def _backward(call):
    dx, dw = _backward_fake(call)
    x, dy, N = call.x, call.dy, call.x.shape[-1]
    if not x.numel():
        return dx, dw.zero_()
    widths = _widest(x, dy, call.ds, call.weight), _widest(x, dy)
    shares = _shares(x.numel() // N, N, *widths, call.need_dx, processors_of(x.device))
    partials = x.new_empty((shares.partials, N), dtype=torch.float32) if call.need_dw else None
    _launch_backward(call, shares, dx, dw, partials)
    return dx, dw


def _backward_on_cpu(call):
    dx, dw = _backward_fake(call)
    dy, ds, x, weight, rstd, eps, offset, *_ = call
    xhat, g = x.float() * rstd, dy.float()
    if call.need_dw:
        dw.copy_((g * xhat).sum_to_size(weight.shape))
    if call.need_dx:
        g = g if weight is None else g * scale_of(weight, offset)
        if x.shape[-1] == 1:
            dx_ = g * rstd * (eps * rstd.square())  # as in `_store_dx`
        else:
            dx_ = through_norm(g, xhat, rstd)
        dx.copy_(dx_ if ds is None else dx_ + ds.float())
    return dx, dw


def _tangent_fake(call):
    return empty_in_order_of(call.x, dtype=call.dtype)


def _tangent(call):
    ty = _tangent_fake(call)
    _launch_tangent(call, ty)
    return ty


def _tangent_on_cpu(call):
    xhat, tx = call.x.float() * call.rstd, call.tx.float()
    if call.x.shape[-1] == 1:
        ty = tx * call.rstd * (call.eps * call.rstd.square())  # as in `_store_dx`
    else:
        ty = through_norm(tx, xhat, call.rstd)
    ty = ty if call.weight is None else ty * scale_of(call.weight, call.offset)
    ty = ty if call.tweight is None else ty + xhat * call.tweight.float()
    return _tangent_fake(call).copy_(ty)


# -> y, residual_out (empty without a residual), rstd (..., 1) float32
_rms_norm_forward = register(
    "rms_norm_forward(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    call=_Forward,
    kernel=_forward,
    reference=_forward_on_cpu,
    fake=_forward_fake,
)
# -> dx in grad_dtype, dw in the weight's dtype; empty where not needed
_rms_norm_backward = register(
    "rms_norm_backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, float eps, "
    "float offset, ScalarType grad_dtype, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
    call=_Backward,
    kernel=_backward,
    reference=_backward_on_cpu,
    fake=_backward_fake,
)


# -> the tangent of y, where x has the tangent tx and the weight the tangent tweight
_rms_norm_tangent = register(
    "rms_norm_tangent(Tensor tx, Tensor x, Tensor? weight, Tensor? tweight, Tensor rstd, float eps, float offset, "
    "ScalarType dtype) -> Tensor",
    call=_Tangent,
    kernel=_tangent,
    reference=_tangent_on_cpu,
    fake=_tangent_fake,
)


# --- autograd --------------------------------------------------------------------------------------------------------


class _RMSNorm(Differentiable):
    """A `_Forward` -> y, or (y, residual_out). Saves s, which is x or residual_out, the weight and rstd."""

    HIDDEN_RESULTS = 1
    TANGENT_INPUTS = 3  # x, residual and weight

    @staticmethod
    def forward(op, x, residual, weight, eps, offset):
        y, s, rstd = _rms_norm_forward(x, residual, weight, eps, offset)
        return (y, rstd) if residual is None else (y, s, rstd)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, x, residual, weight, ctx.eps, ctx.offset = inputs
        save(ctx, x if residual is None else output[1], weight, output[-1])
        ctx.set_materialize_grads(False)
        ctx.grad_dtypes = (x.dtype, None if residual is None else residual.dtype)

    @staticmethod
    def backward(ctx, dy, ds=None):
        return _gradients(ctx, ctx.saved_tensors, dy, ds)

    @staticmethod
    def jvp(ctx, tx, tresidual, tweight):
        return _tangents(ctx, ctx.saved_tensors, tx, tresidual, tweight)


class _RMSNormOp(Differentiable):
    """A `_Forward` -> (y, residual_out, rstd), each with a gradient, for calls of the registered op from elsewhere."""

    TANGENT_INPUTS = 3

    @staticmethod
    def forward(op, *call):
        return _rms_norm_forward(*call)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _RMSNorm.setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx, dy, ds, drstd):
        saved = s, _, rstd = ctx.saved_tensors
        if ctx.grad_dtypes[1] is None:  # no residual: residual_out is an empty tensor
            ds = None
        if drstd is not None:
            of_rstd = -drstd * rstd**3 / s.shape[-1] * s.float()
            ds = of_rstd if ds is None else of_rstd + ds.float()
        return _gradients(ctx, saved, dy, ds)

    @staticmethod
    def jvp(ctx, tx, tresidual, tweight):
        saved = s, _, rstd = ctx.saved_tensors
        ty, ts = (*_tangents(ctx, saved, tx, tresidual, tweight), None)[:2]
        trstd = -(rstd**3) * (s.float() * (tx if ts is None else ts).float()).mean(-1, keepdim=True)
        return ty, tx.new_empty(0) if ts is None else ts, trstd


def _gradients(ctx, saved, dy, ds):
    """What the backward of both Functions returns: a gradient, or None, for each input of `forward`.

    saved: s, weight and rstd. dy, ds: the gradients of y and of residual_out; None where a result was not used.
    """
    x, weight, rstd = saved
    x_dtype, residual_dtype = ctx.grad_dtypes
    need_x, need_residual, need_dw = ctx.needs_input_grad[1:4]
    if dy is None:  # only residual_out was used
        dx, dw = ds, None
    else:
        # x and residual have one gradient. Where their dtypes differ it is kept in the wider, and rounded once.
        grad_dtype = x_dtype if residual_dtype is None else torch.promote_types(x_dtype, residual_dtype)
        dy, ds = last_dim_contiguous(dy), None if ds is None else last_dim_contiguous(ds)
        need_dx = need_x or need_residual
        grads = _rms_norm_backward(dy, ds, x, weight, rstd, ctx.eps, ctx.offset, grad_dtype, need_dx, need_dw)
        grads = (grads[0] if need_dx else None, grads[1] if need_dw else None)
        dx, dw = with_derivatives_of(_Plain(ctx.eps, ctx.offset).gradients, grads, (dy, ds, x, weight))
    grads = (
        dx.to(x_dtype) if need_x and dx is not None else None,
        dx.to(residual_dtype) if need_residual and dx is not None else None,
        dw if need_dw else None,
    )
    return None, *grads, None, None


def _tangents(ctx, saved, tx, tresidual, tweight):
    """What the jvp of both Functions returns: the tangents of y and, with a residual, of residual_out."""
    s, weight, rstd = saved
    x_dtype, residual_dtype = ctx.grad_dtypes
    ts = tx if residual_dtype is None else (tx + tresidual).to(residual_dtype)
    t, tweight = last_dim_contiguous(ts), None if tweight is None else last_dim_contiguous(tweight)
    ty = _rms_norm_tangent(t, s, weight, tweight, rstd, ctx.eps, ctx.offset, x_dtype)
    (ty,) = with_derivatives_of(_Plain(ctx.eps, ctx.offset).tangent, (ty,), (t, tweight, s, weight))
    return (ty,) if residual_dtype is None else (ty, ts)


class _Plain(NamedTuple):
    """The gradients and tangents of y in plain PyTorch. Second derivatives are derivatives of these."""

    eps: float
    offset: float

    def y(self, s: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        return (reference.rms_norm(s.float(), weight, self.eps, offset=self.offset),)

    def gradients(self, constants: Any, dy: torch.Tensor, ds: Any, *inputs: torch.Tensor | None) -> Any:
        """dx and dweight. inputs: s and the weight, which may be None."""
        _, pullback = results_and_pullback(self.y, *(x for x in inputs if x is not None))
        dx, dw = (*pullback((dy.float(),)), None)[:2]
        return dx if ds is None else dx + ds.float(), dw

    def tangent(self, constants: Any, *given: torch.Tensor | None) -> Any:
        """That of y. given: the tangents of s and of the weight, then s and the weight."""
        tangents, inputs = ([x for x in pair if x is not None] for pair in (given[:2], given[2:]))
        return pushforward(self.y, inputs, tangents)


register_gradient(
    "rms_norm_forward",
    ("x", "residual", "weight"),
    by=lambda x, residual, *rest: _RMSNormOp.call(
        "rms_norm" if residual is None else "add_rms_norm", x, residual, *rest
    ),
)


# --- public functions ------------------------------------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    """Root-mean-square norm over the last dimension: y = x / sqrt(mean(x²) + eps) · (offset + weight).

    Computed in float32 and rounded once, to x.dtype. Zhang and Sennrich, arXiv 1910.07467.

    Args:
        x: (..., N), bfloat16, float16 or float32. Any strides; a last dimension that is not contiguous is
            copied.
        weight: (N,), in any of these dtypes, or None for no scaling.
        eps: added to the mean square; not negative. None is the default of torch.nn.functional.rms_norm: the eps of
            float32, 1.2e-7, for each of these dtypes.
        offset: added to the weight in float32. 1.0 for Gemma, whose weights are stored around zero.

    Returns:
        y, with x's shape, dtype and memory order.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of those above.
        ValueError: weight is not (N,), eps is negative, or devices differ.
    """
    return _normed("rms_norm", x, None, weight, eps, offset)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual add and RMSNorm in one pass: residual_out = x + residual; y = rms_norm(residual_out).

    The sum is rounded to residual.dtype before it is normalised. So y is what two separate ops would give, and the
    backward sees the same numbers as the forward.

    Args:
        x: (..., N), bfloat16, float16 or float32.
        residual: x's shape, in any of these dtypes.
        weight, eps, offset: as in `rms_norm`.

    Returns:
        y, in x's dtype and memory order, and residual_out, in residual's.

    Raises:
        TypeError, ValueError: as `rms_norm`; also if residual's shape is not x's.
    """
    y, residual_out = _normed("add_rms_norm", x, residual, weight, eps, offset)
    return y, residual_out


def _normed(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float | None,
    offset: float,
) -> tuple[torch.Tensor, ...]:
    """y and, with a residual, residual_out; through autograd where a gradient is wanted."""
    optional = ("residual", "weight") if op == "rms_norm" else ("weight",)
    check_tensors(op, optional=optional, x=x, residual=residual, weight=weight)
    if x.ndim == 0:
        raise ValueError(message(op, "x", "a scalar", "a tensor of at least one dimension"))
    if residual is not None and residual.shape != x.shape:
        raise ValueError(message(op, "residual", shape_of(residual), f"the shape of x, {tuple(x.shape)}"))
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(message(op, "weight", shape_of(weight), f"({x.shape[-1]},), one element per column of x"))
    x = last_dim_contiguous(x)
    residual = None if residual is None else last_dim_contiguous(residual)
    weight = None if weight is None else last_dim_contiguous(weight)
    eps = check_eps(op, eps)
    check_offset(op, offset)
    if needs_grad(x, residual, weight):
        return _RMSNorm.call(op, x, residual, weight, eps, offset)
    return _rms_norm_forward(x, residual, weight, eps, offset)[:2]
