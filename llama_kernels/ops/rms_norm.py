"""RMSNorm, alone and behind a residual add: tiles, kernels, launchers, registered ops, autograd, public functions.

A row is one vector over the last dimension. Rows may lie anywhere: every tensor travels with the strides of up to three
row dimensions, so a per-head norm reads a packed projection in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from llama_kernels import reference
from llama_kernels.core.checks import check_eps, check_tensors, message, shape_of
from llama_kernels.core.device import lanes_of, processors_of, shared_bytes_of
from llama_kernels.core.language import TRITON_VERSION, cast, inverse_root, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.registry import Differentiable, needs_grad, refuse_double_backward, register, register_gradient
from llama_kernels.core.tensors import cdiv, empty_in_order_of, last_dim_contiguous, next_power_of_2
from llama_kernels.ops.partials import sum_partials

# --- tiles -----------------------------------------------------------------------------------------------------------


class RowTile(NamedTuple):
    """One program's tile: BLOCK_R rows of BLOCK_N columns. A row longer than BLOCK_N is walked in steps."""

    BLOCK_R: int
    BLOCK_N: int
    threads: int
    programs: int  # a processor, of those that stay and take row after row

    def stages(self, element_bytes: int, shared_bytes: int) -> int:
        """1 and how many tiles are loaded ahead, at most two: what the programs that share a processor leave one
        another of its `shared_bytes`, where a column of a row takes `element_bytes`."""
        return 1 + min(2, (shared_bytes // self.programs - 2048) // (self.BLOCK_R * self.BLOCK_N * element_bytes))


@functools.cache
def row_tile(pass_: str, N: int, itemsize: int = 2) -> RowTile:
    """The tile for rows of N elements of at most `itemsize` bytes in `pass_`: "forward", "backward" (dx, and dw beside
    it) or "weight_grad"."""
    halves = max(itemsize // 2, 1)
    columns, rows = _ROW_TILES[pass_]
    width = max(next_power_of_2(N), 16)
    elements, threads, programs = next(row for up_to, *row in rows if up_to >= width * halves)
    BLOCK_N = min(width, elements // halves, columns)
    return RowTile(max(elements // halves // BLOCK_N, 1), BLOCK_N, threads, programs)


# pass: (most columns a step, ((up to this width, elements a program, threads, programs a processor), ...)), in elements
# of two bytes: one of four counts twice. A thread needs 16 bytes in a row for a 16-byte access. Many short rows share a
# program; one row a program from 4096 on.
_ROW_TILES = {
    # 32 elements a thread at 16384 and 32768: 58 and 63 registers on sm_90. 65536 spills, so longer rows are walked.
    "forward": (
        32768,
        (
            (1024, 4096, 128, 1),
            (4096, 4096, 256, 1),
            (8192, 8192, 512, 1),
            (16384, 16384, 512, 1),
            (math.inf, 32768, 1024, 1),
        ),
    ),
    # dw stays in registers beside x and dy. Short rows need many programs to hide the sums across a row, long rows fill
    # a processor with one. At 16384 the weight has no room either and is read anew for each row. Longer rows are
    # walked.
    "backward": (
        16384,
        (
            (256, 2048, 128, 8),
            (1024, 2048, 128, 4),
            (4096, 4096, 256, 2),
            (8192, 8192, 512, 1),
            (16384, 16384, 1024, 1),
            (math.inf, 4096, 256, 4),
        ),
    ),
    # Column blocks, rows split over programs: narrow enough that 64 columns still make whole 128-byte lines.
    "weight_grad": (256, ((math.inf, 4096, 128, 4),)),
}

# Up to this width the weight stays in registers while the rows pass.
_WEIGHT_STAYS: tl.constexpr = tl.constexpr(8192)
# Whether the compiler is one for whose code 64 registers a thread are a few too little, in the backward of longer rows.
_TIGHT: tl.constexpr = tl.constexpr(TRITON_VERSION >= (3, 9))


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _row_starts(rows, row_sizes, strides):
    """Where each row starts, in elements. `rows` counts over three dimensions, the last two of sizes `row_sizes`."""
    inner = rows % row_sizes[1]
    middle = rows // row_sizes[1] % row_sizes[0]
    outer = rows // row_sizes[1] // row_sizes[0]
    return outer.to(tl.int64) * strides[0] + middle.to(tl.int64) * strides[1] + inner.to(tl.int64) * strides[2]


@triton.jit
def _load(row_ptrs, cols, mask):
    return tl.load(row_ptrs[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_scale(weight_ptr, cols, offset, N: tl.constexpr):
    """offset + weight as [1, BLOCK_N]; 1 where there is no weight."""
    if weight_ptr is None:
        scale = tl.full([1, 1], 1.0, tl.float32)
    else:
        scale = offset + tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return scale


@triton.jit
def _load_summed(x_rows, residual_rows, s_ptr, cols, mask):
    """x, or x + residual as the residual stream will hold it: rounded to its dtype before it is normalised."""
    s = _load(x_rows, cols, mask)
    if residual_rows is not None:
        s = cast(s + _load(residual_rows, cols, mask), s_ptr.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _store_normed(y_rows, live, s, rstd, scale, weight_ptr, offset, n, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """y of the columns from n on; `scale` is None where it is still to be loaded."""
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
    """s = x (+ residual);  rstd = 1 / sqrt(mean(s^2) + eps);  y = s * rstd * (offset + weight), for BLOCK_R rows.

    x, residual, y, s: (M, N); weight: (N,); rstd: (M,), float32. residual, s and weight may be None. float32 inside.
    Bytes: x, residual in, y, s out, once each; of rows longer than BLOCK_N all but the last step is read again, as s
    where there is a residual. FLOPs: 4 M N.
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
    if N <= BLOCK_N and N <= _WEIGHT_STAYS:  # on its way while the squares are summed
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
    if N > BLOCK_N:  # the last step is still in registers; of the others the latest is the likeliest to be in the L2
        if residual_ptr is not None:
            tl.debug_barrier()  # the sum is read back, by other threads maybe than wrote it
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
    """dx of the columns from n on, g and xhat being theirs; if TIGHT, rstd g and x."""
    cols = n + tl.arange(0, BLOCK_N)
    mask = live[:, None] & (cols < N)[None, :]
    if N == 1:
        dx = g * rstd * (eps * rstd * rstd)  # 1 - xhat^2, which the difference below would cancel away
    elif TIGHT:
        dx = g - xhat * rstd * (rstd * mean)
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

    A program takes every num_programs-th tile of BLOCK_R rows and, where a row fits one tile, loads STAGES - 1 of them
    ahead, keeps its share of dw in registers and writes it once to its own row of dw_ptr (programs, N). ds, weight and
    dw may be None. float32 inside.
    `columns` is N as a number that the compiler does not know: it would unroll a walk until the registers run out.
    Bytes: dy, x (and ds) in, dx out, once each; of rows longer than BLOCK_N all but the last step of dy and x is read
    again. FLOPs: 10 M N.
    """
    tl.static_assert(dw_ptr is None or N <= BLOCK_N, "dw is kept only where a row fits one tile")
    # Then what stays in registers while a row is summed is x, two to a register, and no address of the weight.
    LONG: tl.constexpr = N <= BLOCK_N and N > _WEIGHT_STAYS
    TIGHT: tl.constexpr = _TIGHT and LONG and ds_ptr is not None and weight_ptr is not None
    first_cols = tl.arange(0, BLOCK_N)
    scale = None
    if N <= BLOCK_N and N <= _WEIGHT_STAYS:
        scale = _load_scale(weight_ptr, first_cols, offset, N)  # [1, BLOCK_N]
    dw = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    last = (N - 1) // BLOCK_N * BLOCK_N
    for start in tl.range(tl.program_id(0) * BLOCK_R, M, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_R)
        live = rows < M
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
                weight_here += tl.multiple_of(tl.minimum(start, 0), 16)  # 0, which the compiler cannot know
            if dw_ptr is not None:
                dw += g * xhat
            g *= _load_scale(weight_here, cols, offset, N) if scale is None else scale
            mean += tl.sum(g * xhat, 1)
        mean = mean[:, None] / N

        _store_dx(dx_rows, ds_rows, live, g, xhat, rstd, mean, eps, last, N, BLOCK_N, TIGHT)
        for step in range(
            1, 1 if N <= BLOCK_N else tl.cdiv(columns, BLOCK_N)
        ):  # the last step is still in registers, the latest in the L2
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
    """dw = sum(dy * x * rstd) over rows, alone: for rows too long to keep dw beside them, or where dx is not needed.

    Program (c, p) sums BLOCK_N columns over every num_programs(1)-th tile of BLOCK_R rows into row p of dw_ptr.
    Bytes: dy and x in, once each. FLOPs: 3 M N.
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


# --- launchers -------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The rows of tensors that share their leading dimensions, as up to three dimensions with strides of their own."""

    tensors: tuple[torch.Tensor | None, ...]
    count: int
    sizes: tuple[int, int]  # of the two inner dimensions
    strides: tuple[tuple[int, int, int] | None, ...]  # a tensor


def _rows_of(lead: torch.Tensor, *others: torch.Tensor | None) -> _Rows:
    """Merge leading dimensions wherever every tensor lets them, in the memory order of `lead`."""
    tensors = (lead, *others)
    merged = _merged(lead.shape[:-1], tuple(None if t is None else t.stride() for t in tensors))
    if merged is None:
        # More dimensions than a kernel walks: copy what is not dense in the order of `lead`, which merges into one.
        return _rows_of(*(None if t is None else _dense_in_order_of(lead, t) for t in tensors))
    return _Rows(tensors, *merged)


@functools.lru_cache(maxsize=1024)
def _merged(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...] | None, ...]
) -> tuple[int, tuple[int, int], tuple[tuple[int, int, int] | None, ...]] | None:
    """count, sizes and strides of `_Rows`, or None where more than three dimensions are left."""
    lead, present = strides[0], [s for s in strides if s is not None]
    merged: list[tuple[int, list[int]]] = []  # (size, strides of the tensors present), outermost first
    for d in sorted(range(len(shape)), key=lambda d: lead[d] or math.inf, reverse=True):
        size, steps = shape[d], [s[d] for s in present]
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    if len(merged) > 3:
        return None
    merged += [(1, [0] * len(present))] * (3 - len(merged))
    sizes, steps = zip(*merged, strict=True)
    each = iter(zip(*steps, strict=True))
    return math.prod(sizes), sizes[1:], tuple(None if s is None else next(each) for s in strides)


def _dense_in_order_of(lead: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dense = empty_in_order_of(lead, x.shape, x.dtype)
    return x if x.stride() == dense.stride() else dense.copy_(x)


def _widest(*tensors: torch.Tensor | None) -> int:
    return max(t.element_size() for t in tensors if t is not None)


def _element_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.element_size() for t in tensors if t is not None)


@cached_launch
def _plan_forward(x, residual, weight, y, s, rstd, eps, offset) -> Iterator[Launch]:
    rows = _rows_of(x, residual, y, s, rstd)
    if not rows.count or not x.shape[-1]:
        return
    x_, residual_, y_, s_, rstd_ = rows.tensors
    tile = row_tile("forward", x.shape[-1], _widest(x, residual, weight))
    yield Launch(
        _rms_norm_forward_kernel,
        (cdiv(rows.count, tile.BLOCK_R),),
        (x_, residual_, weight, y_, s_, rstd_, *rows.strides, rows.sizes, rows.count, eps, offset),
        {
            "N": x.shape[-1], "BLOCK_R": tile.BLOCK_R, "BLOCK_N": tile.BLOCK_N,
            "num_warps": tile.threads // lanes_of(x.device),
        },
    )  # fmt: skip


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, s, rstd = _forward_fake(x, residual, weight, eps, offset)
    _plan_forward(x, residual, weight, y, None if residual is None else s, rstd, eps, offset)
    return y, s, rstd


class _Backward(NamedTuple):
    """How a backward is shared out: programs of the pass that makes dx, and rows of partial sums of dw."""

    grid: int
    partials: int
    with_dx: bool  # dw falls out of the pass that makes dx


@functools.lru_cache(maxsize=1024)
def _shares(M: int, N: int, dx_itemsize: int, dw_itemsize: int, need_dx: bool, processors: int) -> _Backward:
    tile = row_tile("backward", N, dx_itemsize)
    grid = min(tile.programs * processors, cdiv(M, tile.BLOCK_R))
    if need_dx and tile.BLOCK_N >= N:
        return _Backward(grid, grid, True)
    tile = row_tile("weight_grad", N, dw_itemsize)
    return _Backward(grid, min(cdiv(tile.programs * processors, cdiv(N, tile.BLOCK_N)), cdiv(M, tile.BLOCK_R)), False)


@cached_launch
def _plan_backward(x, dy, ds, weight, rstd, dx, dw, partials, shares, eps, offset) -> Iterator[Launch]:
    """dx and dw are None where not needed, dw's partial sums with it."""
    N = x.shape[-1]
    rows = _rows_of(x, dy, ds, rstd, dx)
    x_, dy_, ds_, rstd_, dx_ = rows.tensors
    x_strides, dy_strides, ds_strides, rstd_strides, dx_strides = rows.strides
    lanes, shared = lanes_of(x.device), shared_bytes_of(x.device)
    if dx is not None:
        tile = row_tile("backward", N, _widest(x, dy, ds, weight))
        ahead = (x, dy, ds) if _WEIGHT_STAYS.value >= N else (x, dy, ds, weight)
        yield Launch(
            _rms_norm_backward_kernel,
            (shares.grid,),
            (
                dy_, ds_, x_, weight, rstd_, dx_, partials if shares.with_dx else None,
                dy_strides, ds_strides, x_strides, rstd_strides, dx_strides, rows.sizes, rows.count, N, eps, offset,
            ),
            {
                "N": N, "BLOCK_R": tile.BLOCK_R, "BLOCK_N": tile.BLOCK_N,
                "STAGES": tile.stages(_element_bytes(*ahead), shared), "num_warps": tile.threads // lanes,
            },
        )  # fmt: skip
    if dw is not None and not shares.with_dx:
        tile = row_tile("weight_grad", N, _widest(x, dy))
        yield Launch(
            _rms_norm_weight_grad_kernel,
            (cdiv(N, tile.BLOCK_N), shares.partials),
            (dy_, x_, rstd_, partials, dy_strides, x_strides, rstd_strides, rows.sizes, rows.count),
            {
                "N": N, "BLOCK_R": tile.BLOCK_R, "BLOCK_N": tile.BLOCK_N,
                "STAGES": tile.stages(_element_bytes(x, dy), shared), "num_warps": tile.threads // lanes,
            },
        )  # fmt: skip
    if dw is not None:
        yield sum_partials(partials, dw)


def _backward(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
    offset: float,
    grad_dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dw = _backward_fake(dy, ds, x, weight, rstd, eps, offset, grad_dtype, need_dx, need_dw)
    N = x.shape[-1]
    if not x.numel():
        return dx, dw.zero_()
    widths = _widest(x, dy, ds, weight), _widest(x, dy)
    shares = _shares(x.numel() // N, N, *widths, need_dx, processors_of(x.device))
    partials = x.new_empty((shares.partials, N), dtype=torch.float32) if need_dw else None
    wanted = dx if need_dx else None, dw if need_dw else None
    _plan_backward(x, dy, ds, weight, rstd, *wanted, partials, shares, eps, offset)
    return dx, dw


# --- the same from plain PyTorch, for CPU tensors --------------------------------------------------------------------


def _forward_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, s, rstd = _forward_fake(x, residual, weight, eps, offset)
    if residual is None:
        s_ = x
        y.copy_(reference.rms_norm(x, weight, eps, offset=offset))
    else:
        y_, s_ = reference.add_rms_norm(x, residual, weight, eps, offset=offset)
        y.copy_(y_)
        s.copy_(s_)
    rstd.copy_(torch.rsqrt(s_.float().pow(2).mean(-1, keepdim=True) + eps))
    return y, s, rstd


def _backward_reference(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
    offset: float,
    grad_dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dw = _backward_fake(dy, ds, x, weight, rstd, eps, offset, grad_dtype, need_dx, need_dw)
    xhat, g = x.float() * rstd, dy.float()
    if need_dw:
        dw.copy_((g * xhat).sum_to_size(weight.shape))
    if need_dx:
        g = g if weight is None else g * (offset + weight.float())
        if x.shape[-1] == 1:
            dx_ = g * rstd * (eps * rstd.square())  # 1 - xhat^2, which the difference below would cancel away
        else:
            dx_ = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
        dx.copy_(dx_ if ds is None else dx_ + ds.float())
    return dx, dw


# --- registered ops --------------------------------------------------------------------------------------------------


def _forward_fake(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = empty_in_order_of(x)
    s = x.new_empty(0) if residual is None else empty_in_order_of(residual)
    rstd = empty_in_order_of(x, (*x.shape[:-1], 1), torch.float32)
    return y, s, rstd


def _backward_fake(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
    offset: float,
    grad_dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = empty_in_order_of(x, dtype=grad_dtype) if need_dx else x.new_empty(0)
    dw = weight.new_empty(weight.shape) if need_dw else x.new_empty(0)
    return dx, dw


# -> y, residual_out (empty without a residual), rstd (..., 1) float32
_rms_norm_forward = register(
    "rms_norm_forward(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    kernel=_forward,
    reference=_forward_reference,
    fake=_forward_fake,
)
# -> dx in grad_dtype, dw in the weight's; empty where not needed
_rms_norm_backward = register(
    "rms_norm_backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, float eps, "
    "float offset, ScalarType grad_dtype, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
    kernel=_backward,
    reference=_backward_reference,
    fake=_backward_fake,
)


# --- autograd --------------------------------------------------------------------------------------------------------


class _RMSNorm(Differentiable):
    """(x, residual or None, weight or None) -> y, or (y, residual_out). Saves what it normalised, weight and rstd."""

    KEPT = 1

    @staticmethod
    def forward(op, x, residual, weight, eps, offset):
        y, s, rstd = _rms_norm_forward(x, residual, weight, eps, offset)
        return (y, rstd) if residual is None else (y, s, rstd)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, x, residual, weight, ctx.eps, ctx.offset = inputs
        ctx.save_for_backward(x if residual is None else output[1], weight, output[-1])
        ctx.set_materialize_grads(False)
        ctx.grad_dtypes = (x.dtype, None if residual is None else residual.dtype)

    @staticmethod
    def backward(ctx, dy, ds=None):
        return _gradients(ctx, dy, ds)


class _RMSNormOp(Differentiable):
    """The registered op: (y, residual_out, rstd), each with a gradient."""

    @staticmethod
    def forward(op, x, residual, weight, eps, offset):
        return _rms_norm_forward(x, residual, weight, eps, offset)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _RMSNorm.setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx, dy, ds, drstd):
        s, _, rstd = ctx.saved_tensors
        ds = None if ctx.grad_dtypes[1] is None else ds  # without a residual, of a tensor that has no elements
        if drstd is not None:
            of_rstd = -drstd * rstd**3 / s.shape[-1] * s.float()
            ds = of_rstd if ds is None else of_rstd + ds.float()
        return _gradients(ctx, dy, ds)


def _gradients(ctx, dy, ds):
    """What the backward of both returns; ds is the gradient of the sum."""
    x, weight, rstd = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.grad_dtypes
    need_x, need_residual, need_dw = ctx.needs_input_grad[1:4]
    need_dx = need_x or need_residual
    if dy is None:  # only residual_out was used
        dx, dw = ds, None
    else:
        # x and residual have one gradient; where their dtypes differ it is kept in the wider and rounded once.
        grad_dtype = x_dtype if residual_dtype is None else torch.promote_types(x_dtype, residual_dtype)
        dy = last_dim_contiguous(dy)
        ds = None if ds is None else last_dim_contiguous(ds)
        dx, dw = _rms_norm_backward(dy, ds, x, weight, rstd, ctx.eps, ctx.offset, grad_dtype, need_dx, need_dw)
    grads = (
        dx.to(x_dtype) if need_x and dx is not None else None,
        dx.to(residual_dtype) if need_residual and dx is not None else None,
        dw if need_dw else None,
    )
    return None, *refuse_double_backward(ctx.op, grads, (dy, ds, x, weight)), None, None


register_gradient(
    "rms_norm_forward",
    ("x", "residual", "weight"),
    by=lambda *args: _RMSNormOp.call("rms_norm" if args[1] is None else "add_rms_norm", *args),
)


# --- public functions ------------------------------------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    """Root-mean-square norm over the last dimension: y = x / sqrt(mean(x²) + eps) · (offset + weight).

    Computed in float32 and rounded once, to x.dtype. Zhang and Sennrich, arXiv 1910.07467.

    Args:
        x: (..., N), bfloat16, float16 or float32, N from 1 on. Any strides; a last dimension that is not contiguous is
            copied.
        weight: (N,) in any of these dtypes, or None for no scaling.
        eps: added to the mean square; not negative. None is the default of torch.nn.functional.rms_norm: float32's eps,
            1.2e-7, for each of these dtypes.
        offset: added to the weight in float32; 1.0 for Gemma, whose weights are stored around zero.

    Returns:
        y, of x's shape, dtype and memory order.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: weight is not (N,), eps is negative, or devices differ.
    """
    _check("rms_norm", x, None, weight)
    eps = check_eps("rms_norm", eps)
    return _apply("rms_norm", x, None, weight, eps, offset)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual add and RMSNorm in one pass: residual_out = x + residual; y = rms_norm(residual_out).

    The sum is rounded to residual.dtype before it is normalised, so y is what two separate ops would give and the
    backward sees the same numbers as the forward.

    Args:
        x: (..., N), bfloat16, float16 or float32.
        residual: of x's shape, in any of these dtypes.
        weight, eps, offset: as in `rms_norm`.

    Returns:
        y, in x's dtype and memory order, and residual_out, in residual's.

    Raises:
        TypeError, ValueError: as `rms_norm`; also where residual's shape is not x's.
    """
    _check("add_rms_norm", x, residual, weight)
    eps = check_eps("add_rms_norm", eps)
    return _apply("add_rms_norm", x, residual, weight, eps, offset)


def _apply(op, x, residual, weight, eps, offset):
    """y and, with a residual, residual_out; through autograd where a gradient is wanted."""
    x = last_dim_contiguous(x)
    residual = None if residual is None else last_dim_contiguous(residual)
    weight = None if weight is None else last_dim_contiguous(weight)
    if needs_grad(x, residual, weight):
        return _RMSNorm.call(op, x, residual, weight, eps, offset)
    return _rms_norm_forward(x, residual, weight, eps, offset)[:2]


def _check(op: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None) -> None:
    check_tensors(op, x=x, residual=residual, weight=weight)
    if x.ndim == 0:
        raise ValueError(message(op, "x", "a scalar", "a tensor of at least one dimension"))
    if residual is not None and residual.shape != x.shape:
        raise ValueError(message(op, "residual", shape_of(residual), f"the shape of x, {tuple(x.shape)}"))
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(message(op, "weight", shape_of(weight), f"({x.shape[-1]},), one element a column of x"))
