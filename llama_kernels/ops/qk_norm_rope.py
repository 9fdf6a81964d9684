"""RMSNorm of every head of q and k, then RoPE, in one pass.

For a head x, with rstd = 1 / sqrt(mean(x^2) + eps) and xhat = x * rstd:

    y = rotate(xhat * (offset + weight))

and in the backward, with u = rotate^T(dy) and g = u * (offset + weight):

    dx = rstd * (g - xhat * mean(g * xhat))
    dweight = sum of u * xhat over tokens and heads

rotation.py has the device code of the rotation, which rope.py shares. The sections are those of rms_norm.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llama_kernels import reference
from llama_kernels.core.autograd import Differentiable, needs_grad, save
from llama_kernels.core.checks import check_eps, check_flag, check_offset, check_tensors, message, shape_of
from llama_kernels.core.device import lanes_of, processors_of
from llama_kernels.core.language import cast, inverse_root, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.registry import register, register_gradient
from llama_kernels.core.second_derivatives import pushforward, results_and_pullback, with_derivatives_of
from llama_kernels.core.tensors import (
    cdiv,
    dense_in_order_of,
    empty_in_order_of,
    last_dim_contiguous,
    next_power_of_2,
    optional_strides_of,
    require_contiguous,
    sizes_of,
)
from llama_kernels.ops.cpu_norm import normalise, rstd_of, scale_of, through_norm
from llama_kernels.ops.cpu_rotation import rotate_on_cpu
from llama_kernels.ops.partials import sum_partials
from llama_kernels.ops.rotation import (
    Axes,
    HeadTensor,
    HeadTile,
    Rotation,
    Tables,
    head_tile,
    load_angles,
    load_pairs,
    pairs_of,
    rotate,
    store_pairs,
    token_ptrs,
)
from llama_kernels.ops.rotation_checks import check_angles, check_heads, tokens_of
from llama_kernels.reference.rope import OptionalTensor

# --- tiles -----------------------------------------------------------------------------------------------------------
#
# A tile is that of rotation.py: BLOCK_T tokens by BLOCK_H heads.

# Programs on an SM in the backward, of 128 threads each. While one waits for a sum across a head, the others have work.
_PROGRAMS = 4
# The backward loads one tile ahead of the one at work.
_STAGES: tl.constexpr = tl.constexpr(2)

# --- kernels ---------------------------------------------------------------------------------------------------------


class Vectors(NamedTuple):
    """Heads of tokens in registers: the elements of the pairs, and those past the rotated width."""

    x0: tl.tensor  # [BLOCK_T, BLOCK_H, BLOCK_R]
    x1: tl.tensor
    rest: tl.tensor  # [BLOCK_T, BLOCK_H, BLOCK_D], or one zero for each vector where there are none


class VectorShape(NamedTuple):
    """The shapes of `Vectors` at compile time: D elements, of which HALF pairs are rotated."""

    D: tl.constexpr
    HALF: tl.constexpr
    INTERLEAVED: tl.constexpr
    BLOCK_T: tl.constexpr
    BLOCK_H: tl.constexpr
    BLOCK_R: tl.constexpr
    BLOCK_D: tl.constexpr


@triton.jit
def _load_vectors(ptrs, present, SHAPE: tl.constexpr):
    """The vectors at ptrs [BLOCK_T, BLOCK_H], as float32; zeros where not present."""
    x0, x1 = load_pairs(ptrs, present, SHAPE.HALF, SHAPE.INTERLEAVED, SHAPE.BLOCK_R)
    rest = tl.zeros([present.shape[0], present.shape[1], 1], tl.float32)
    if SHAPE.D > 2 * SHAPE.HALF:
        d = 2 * SHAPE.HALF + tl.arange(0, SHAPE.BLOCK_D)
        mask = present[:, :, None] & (d < SHAPE.D)[None, None, :]
        rest = tl.load(ptrs[:, :, None] + d[None, None, :], mask=mask, other=0.0).to(tl.float32)
    return Vectors(x0, x1, rest)


@triton.jit
def _store_vectors(ptrs, present, x, SHAPE: tl.constexpr):
    """Store x, rounded once."""
    dtype: tl.constexpr = ptrs.dtype.element_ty
    x0, x1 = cast(x.x0, dtype), cast(x.x1, dtype)
    store_pairs(ptrs, present, x0, x1, SHAPE.HALF, SHAPE.INTERLEAVED, SHAPE.BLOCK_R)
    if SHAPE.D > 2 * SHAPE.HALF:
        d = 2 * SHAPE.HALF + tl.arange(0, SHAPE.BLOCK_D)
        mask = present[:, :, None] & (d < SHAPE.D)[None, None, :]
        tl.store(ptrs[:, :, None] + d[None, None, :], cast(x.rest, dtype), mask=mask)


@triton.jit
def _load_scales(weight_ptr, offset, SHAPE: tl.constexpr):
    """offset + weight for each vector of a tile; 1 where there is no weight.

    The weight is loaded once for each vector. Loaded as one vector, with one element a thread, it would give the whole
    tile that layout.
    """
    one = tl.full([1, 1, 1], 1.0, tl.float32)
    scales = Vectors(one, one, one)
    if weight_ptr is not None:
        ptrs = weight_ptr + tl.zeros([SHAPE.BLOCK_T, SHAPE.BLOCK_H], tl.int32)
        w = _load_vectors(ptrs, tl.full([SHAPE.BLOCK_T, SHAPE.BLOCK_H], True, tl.int1), SHAPE)
        scales = Vectors(offset + w.x0, offset + w.x1, offset + w.rest)
    return scales


@triton.jit
def _inner_products(a, b):
    """The inner product of each vector of a with that of b: [BLOCK_T, BLOCK_H, 1]."""
    total = tl.sum(a.x0 * b.x0 + a.x1 * b.x1, 2)
    total += tl.sum(a.rest * b.rest, 2)
    return total[:, :, None]


@triton.jit
def _scaled(x, by):
    """x * by, element by element. by: Vectors."""
    return Vectors(x.x0 * by.x0, x.x1 * by.x1, x.rest * by.rest)


@triton.jit
def _times(x, number):
    """x * number. number: one for each vector."""
    return Vectors(x.x0 * number, x.x1 * number, x.rest * number)


@triton.jit
def _tangent_of(x, tx, rstd, scales, tscales, D: tl.constexpr):
    """The tangent of x * rstd * scales, where x has the tangent tx and scales have the tangent tscales."""
    xhat = _times(x, rstd)
    mean = _inner_products(tx, xhat) / D
    ty = Vectors(tx.x0 - xhat.x0 * mean, tx.x1 - xhat.x1 * mean, tx.rest - xhat.rest * mean)
    ty = _scaled(_times(ty, rstd), scales)
    return Vectors(ty.x0 + xhat.x0 * tscales.x0, ty.x1 + xhat.x1 * tscales.x1, ty.rest + xhat.rest * tscales.rest)


@triton.jit
def _forward_heads(
    x, tx, weight_ptr, tweight_ptr, y, b, s, live, angles, H, eps, offset, SHAPE: tl.constexpr
):  # fmt: skip
    """Normalise and rotate every head of the tokens (b, s) of x, and store it in y. x, tx, y: `HeadTensor`.

    With tx, the tangent of x, store the tangent of that result instead. Without, tx.ptr is None.
    """
    if SHAPE.D == 2 * SHAPE.HALF:
        scales = _load_scales(weight_ptr, offset, SHAPE)
    x_tokens, y_tokens = token_ptrs(x, b, s), token_ptrs(y, b, s)  # [BLOCK_T, 1]
    for h0 in range(0, H, SHAPE.BLOCK_H):
        h = h0 + tl.arange(0, SHAPE.BLOCK_H)
        present = live[:, None] & (h < H)[None, :]
        x_ptrs = x_tokens + h.to(tl.int64)[None, :] * x.strides[1]  # [BLOCK_T, BLOCK_H]
        y_ptrs = y_tokens + h.to(tl.int64)[None, :] * y.strides[1]
        vectors = _load_vectors(x_ptrs, present, SHAPE)
        rstd = inverse_root(_inner_products(vectors, vectors) / SHAPE.D + eps)
        if SHAPE.D > 2 * SHAPE.HALF:  # registers do not hold the weights of both parts from head to head
            scales = _load_scales(weight_ptr, offset, SHAPE)
        if tx.ptr is None:
            normed = _scaled(_times(vectors, rstd), scales)
        else:
            tx_ptrs = token_ptrs(tx, b, s) + h.to(tl.int64)[None, :] * tx.strides[1]
            tx_vectors = _load_vectors(tx_ptrs, present, SHAPE)
            zero = tl.zeros([1, 1, 1], tl.float32)
            tscales = Vectors(zero, zero, zero)
            if tweight_ptr is not None:
                tscales = _load_scales(tweight_ptr, 0.0, SHAPE)
            normed = _tangent_of(vectors, tx_vectors, rstd, scales, tscales, SHAPE.D)
        y0, y1 = rotate(normed.x0, normed.x1, angles)
        _store_vectors(y_ptrs, present, Vectors(y0, y1, normed.rest), SHAPE)


@triton.jit(do_not_specialize=["S", "Hq", "Hkv", "positions", "axes_count"])
def _qk_norm_rope_forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ids_ptr, axes_ptr,
    tq_ptr, tk_ptr, tq_weight_ptr, tk_weight_ptr,
    q_strides, k_strides, q_out_strides, k_out_strides, cos_strides, sin_strides, position_strides, axes_strides,
    tq_strides, tk_strides,
    S, Hq, Hkv, positions, axes_count, eps, offset,
    D: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = rotate(x * rstd * (offset + weight)), rstd = 1 / sqrt(mean(x^2) + eps), for every head x of q and of k.

    A program computes all heads of BLOCK_T tokens of one sequence, in float32, and rounds once. q, k: (B, H, S, D);
    weights: (D,) or None; k may be None. `Tables` and `load_angles` describe the tables.
    Given tq and tk, the tangents of q and k, the results are the tangents of y instead. tq_weight and tk_weight, the
    tangents of the weights, may be None.
    Bytes: q and k in and out, tq and tk in, and each table row once for all heads. FLOPs: 7 an element; 14 of tangents.
    """
    blocks = tl.cdiv(S, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    live = s < S
    tables = Tables(cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, positions)
    axes = None
    if axes_ptr is not None:
        axes = Axes(axes_ptr, axes_strides[0], axes_strides[1], axes_count)
    angles = load_angles(tables, axes, b, s, live, HALF, FULL, INTERLEAVED, False, BLOCK_R)
    SHAPE: tl.constexpr = VectorShape(D, HALF, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_R, BLOCK_D)
    _forward_heads(
        HeadTensor(q_ptr, q_strides), HeadTensor(tq_ptr, tq_strides), q_weight_ptr, tq_weight_ptr,
        HeadTensor(q_out_ptr, q_out_strides), b, s, live, angles, Hq, eps, offset, SHAPE,
    )  # fmt: skip
    if k_ptr is not None:
        _forward_heads(
            HeadTensor(k_ptr, k_strides), HeadTensor(tk_ptr, tk_strides), k_weight_ptr, tk_weight_ptr,
            HeadTensor(k_out_ptr, k_out_strides), b, s, live, angles, Hkv, eps, offset, SHAPE,
        )  # fmt: skip


@triton.jit
def _backward_heads(
    dy_heads, x_heads, weight_ptr, dx_heads, dw_ptr, tables, axes,
    first, programs, B, S, H, eps, offset, FULL: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """dx of every `programs`-th tile of BLOCK_T tokens by BLOCK_H heads, from tile `first` on. *_heads: `HeadTensor`.

    The sum of these tiles for dweight goes to row `first` of dw (programs, D).
    """
    BLOCK_T: tl.constexpr = SHAPE.BLOCK_T
    BLOCK_H: tl.constexpr = SHAPE.BLOCK_H
    scales = _load_scales(weight_ptr, offset, SHAPE)
    zeros = tl.zeros([BLOCK_T, BLOCK_H, SHAPE.BLOCK_R], tl.float32)
    rest = tl.zeros([BLOCK_T, BLOCK_H, 1], tl.float32)
    if SHAPE.D > 2 * SHAPE.HALF:
        rest = tl.zeros([BLOCK_T, BLOCK_H, SHAPE.BLOCK_D], tl.float32)
    dw = Vectors(zeros, zeros, rest)
    groups, blocks = tl.cdiv(H, BLOCK_H), tl.cdiv(S, BLOCK_T)
    for tile_index in tl.range(first, B * blocks * groups, programs, num_stages=_STAGES):
        h = tile_index % groups * BLOCK_H + tl.arange(0, BLOCK_H)
        b = tl.cast(tile_index // groups // blocks, tl.int64)
        s = tile_index // groups % blocks * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        live = s < S
        present = live[:, None] & (h < H)[None, :]
        angles = load_angles(tables, axes, b, s, live, SHAPE.HALF, FULL, SHAPE.INTERLEAVED, True, SHAPE.BLOCK_R)
        heads = h.to(tl.int64)[None, :]
        x_ptrs = token_ptrs(x_heads, b, s) + heads * x_heads.strides[1]
        dy_ptrs = token_ptrs(dy_heads, b, s) + heads * dy_heads.strides[1]
        dx_ptrs = token_ptrs(dx_heads, b, s) + heads * dx_heads.strides[1]
        x = _load_vectors(x_ptrs, present, SHAPE)
        dy = _load_vectors(dy_ptrs, present, SHAPE)
        g0, g1 = rotate(dy.x0, dy.x1, angles)
        g = Vectors(g0, g1, dy.rest)
        rstd = inverse_root(_inner_products(x, x) / SHAPE.D + eps)
        rstd = tl.where(present[:, :, None], rstd, 0.0)  # absent vectors get 0, even if eps is 0
        xhat = _times(x, rstd)
        if dw_ptr is not None:
            dw = Vectors(dw.x0 + g.x0 * xhat.x0, dw.x1 + g.x1 * xhat.x1, dw.rest + g.rest * xhat.rest)
        g = _scaled(g, scales)
        mean = _inner_products(g, xhat) / SHAPE.D
        dx = Vectors(g.x0 - xhat.x0 * mean, g.x1 - xhat.x1 * mean, g.rest - xhat.rest * mean)
        dx = _times(dx, rstd)
        _store_vectors(dx_ptrs, present, dx, SHAPE)
    if dw_ptr is not None:
        total = Vectors(
            tl.sum(tl.sum(dw.x0, 0), 0)[None, None, :], tl.sum(tl.sum(dw.x1, 0), 0)[None, None, :],
            tl.sum(tl.sum(dw.rest, 0), 0)[None, None, :],
        )  # fmt: skip
        row = dw_ptr + tl.cast(first, tl.int64) * SHAPE.D + tl.zeros([1, 1], tl.int32)
        _store_vectors(row, tl.full([1, 1], True, tl.int1), total, SHAPE)


@triton.jit(do_not_specialize=["B", "S", "Hq", "Hkv", "positions", "axes_count", "q_programs"])
def _qk_norm_rope_backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, q_partials_ptr, k_partials_ptr,
    cos_ptr, sin_ptr, position_ids_ptr, axes_ptr,
    dq_out_strides, dk_out_strides, q_strides, k_strides, dq_strides, dk_strides,
    cos_strides, sin_strides, position_strides, axes_strides,
    B, S, Hq, Hkv, positions, axes_count, q_programs, eps, offset,
    D: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - xhat * mean(g * xhat)), xhat = x * rstd, g = u * (offset + weight), and
    dweight = sum(u * xhat) over tokens and heads, where u is dy times the transpose of the rotation.

    For q, x is q, dy is dq_out, the gradient of the result, and dx is dq; for k likewise. All are (B, H, S, D).

    The first q_programs programs compute the tiles of q, the others those of k, in float32. A program sums its part of
    dweight in registers and stores it to its own row of (programs, D) float32; `sum_partials` adds up the rows. rstd is
    computed again, since x is read anyway. k, its gradients, the weights and their gradients may be None.
    Bytes: x and dy in, dx out, once each; table rows once a tile. FLOPs: 14 an element.
    """
    pid = tl.program_id(0)
    tables = Tables(cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, positions)
    axes = None
    if axes_ptr is not None:
        axes = Axes(axes_ptr, axes_strides[0], axes_strides[1], axes_count)
    SHAPE: tl.constexpr = VectorShape(D, HALF, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_R, BLOCK_D)
    if pid < q_programs:
        _backward_heads(
            HeadTensor(dq_out_ptr, dq_out_strides), HeadTensor(q_ptr, q_strides), q_weight_ptr,
            HeadTensor(dq_ptr, dq_strides), q_partials_ptr, tables, axes,
            pid, q_programs, B, S, Hq, eps, offset, FULL, SHAPE,
        )  # fmt: skip
    elif k_ptr is not None:
        _backward_heads(
            HeadTensor(dk_out_ptr, dk_out_strides), HeadTensor(k_ptr, k_strides), k_weight_ptr,
            HeadTensor(dk_ptr, dk_strides), k_partials_ptr, tables, axes,
            pid - q_programs, tl.num_programs(0) - q_programs, B, S, Hkv, eps, offset, FULL, SHAPE,
        )  # fmt: skip


# --- launchers -------------------------------------------------------------------------------------------------------


class _Forward(NamedTuple):
    """The parameters of the op `qk_norm_rope`. `rotation` has those of the rotation."""

    q: torch.Tensor
    k: torch.Tensor | None
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    position_ids: torch.Tensor | None
    eps: float
    offset: float
    interleaved: bool
    axes: torch.Tensor | None = None

    @property
    def rotation(self) -> Rotation:
        return Rotation(self.cos, self.sin, self.position_ids, self.interleaved, axes=self.axes)


class _Tangents(NamedTuple):
    """The tangents of q, k and the weights."""

    q: torch.Tensor
    k: torch.Tensor | None
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None


class _Backward(NamedTuple):
    """The parameters of the op `qk_norm_rope_backward`. `rotation` is that of the forward."""

    dq_out: torch.Tensor  # the gradients of the results
    dk_out: torch.Tensor | None
    q: torch.Tensor
    k: torch.Tensor | None
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    position_ids: torch.Tensor | None
    eps: float
    offset: float
    interleaved: bool
    need_dw: bool
    axes: torch.Tensor | None = None

    @property
    def rotation(self) -> Rotation:
        return Rotation(self.cos, self.sin, self.position_ids, self.interleaved, axes=self.axes)


class _Grads(NamedTuple):
    """The gradients of q, k and the weights: the results of the backward. An empty tensor: there is none, or none is
    needed."""

    q: torch.Tensor
    k: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor


def _sizes(call: _Forward | _Backward) -> tuple[int, int, int, int]:
    """B, S, Hq, Hkv."""
    B, Hq, S = sizes_of(call.q)
    return B, S, Hq, 0 if call.k is None else sizes_of(call.k)[1]


def _tile(call: _Forward | _Backward) -> HeadTile:
    _, _, Hq, Hkv = _sizes(call)
    return head_tile(pairs_of(call.cos, call.q.shape[-1])["HALF"], max(min(Hq, Hkv or Hq), 1), lanes_of(call.q.device))


def _options(call: _Forward | _Backward) -> dict[str, int]:
    """The kernels' compile-time options. BLOCK_D: a power of two that holds the elements past the rotated width."""
    D = call.q.shape[-1]
    pairs = pairs_of(call.cos, D)
    BLOCK_D = max(next_power_of_2(D - 2 * pairs["HALF"]), 16)
    return {"D": D, **pairs, "INTERLEAVED": call.interleaved, **_tile(call)._asdict(), "BLOCK_D": BLOCK_D}


@cached_launch
def _launch_forward(
    call: _Forward, q_out: torch.Tensor, k_out: torch.Tensor | None, tangents: _Tangents | None = None
) -> list[Launch]:
    """With tangents, q_out and k_out get the tangents of the results."""
    B, S, Hq, Hkv = _sizes(call)
    if not B * S * max(Hq, Hkv):
        return []
    heads, rotation = (call.q, call.k, q_out, k_out), call.rotation
    rotation.require_rows(S)
    tangents = _Tangents(None, None, None, None) if tangents is None else tangents
    require_contiguous(call.q_weight, call.k_weight, *tangents)
    args = (
        call.q, call.k, call.q_weight, call.k_weight, q_out, k_out, *rotation.tensors_and_axes, *tangents,
        *map(optional_strides_of, heads), *rotation.strides_and_axes, *map(optional_strides_of, tangents[:2]),
        S, Hq, Hq if call.k is None else Hkv, rotation.positions, rotation.positions_of_token, call.eps, call.offset,
    )  # fmt: skip
    return [Launch(_qk_norm_rope_forward_kernel, (B * cdiv(S, _tile(call).BLOCK_T),), args, _options(call))]


@cached_launch
def _launch_backward(
    call: _Backward,
    grads: _Grads,
    q_partials: torch.Tensor | None,
    k_partials: torch.Tensor | None,
    programs: tuple[int, int],
) -> list[Launch]:
    """q_partials, k_partials: each program's sum for the gradient of a weight, (programs, D) float32; None: not needed.

    programs: how many compute q, and how many k.
    """
    require_contiguous(call.q_weight, call.k_weight)
    rotation = call.rotation
    rotation.require_rows(_sizes(call)[1])
    heads = (call.dq_out, call.dk_out, call.q, call.k, grads.q, None if call.k is None else grads.k)
    args = (
        *heads[:4], call.q_weight, call.k_weight, *heads[4:], q_partials, k_partials, *rotation.tensors_and_axes,
        *map(optional_strides_of, heads), *rotation.strides_and_axes,
        *_sizes(call), rotation.positions, rotation.positions_of_token, programs[0], call.eps, call.offset,
    )  # fmt: skip
    sums = ((q_partials, grads.q_weight), (k_partials, grads.k_weight))
    return [
        Launch(_qk_norm_rope_backward_kernel, (sum(programs),), args, _options(call)),
        *(sum_partials(partials, dw) for partials, dw in sums if partials is not None),
    ]


# --- registered ops --------------------------------------------------------------------------------------------------


def _forward_fake(call):
    return empty_in_order_of(call.q), call.q.new_empty(0) if call.k is None else empty_in_order_of(call.k)


def _forward(call):
    q_out, k_out = _forward_fake(call)
    _launch_forward(call, q_out, None if call.k is None else k_out)
    return q_out, k_out


def _forward_on_cpu(call):
    sides = (call.q, call.q_weight), (call.k, call.k_weight)
    normed = (None if x is None else normalise(x.float(), weight, call.eps, call.offset)[0] for x, weight in sides)
    return _dense_results(call, *rotate_on_cpu(call.rotation, *normed))


def _dense_results(call, q, k):
    """The results q and k, float32, in the dtype and the memory order of the call's q and k."""
    pairs = (call.q, q), (call.k, k)
    return tuple(call.q.new_empty(0) if x is None else dense_in_order_of(x, y.to(x.dtype)) for x, y in pairs)


def _tangent_fake(*args):
    return _forward_fake(_Forward(*args[4:]))


def _tangent(*args):
    tangents, call = _Tangents(*args[:4]), _Forward(*args[4:])
    q_out, k_out = _forward_fake(call)
    _launch_forward(call, q_out, None if call.k is None else k_out, tangents)
    return q_out, k_out


def _tangent_on_cpu(*args):
    tangents, call = _Tangents(*args[:4]), _Forward(*args[4:])
    ty_of_q = _tangent_of_norm(call, call.q, call.q_weight, tangents.q, tangents.q_weight)
    ty_of_k = None if call.k is None else _tangent_of_norm(call, call.k, call.k_weight, tangents.k, tangents.k_weight)
    return _dense_results(call, *rotate_on_cpu(call.rotation, ty_of_q, ty_of_k))


def _tangent_of_norm(call, x, weight, tx, tweight):
    rows = x.float()
    rstd = rstd_of(rows, call.eps)
    xhat = rows * rstd
    ty = through_norm(tx.float(), xhat, rstd)
    ty = ty if weight is None else ty.mul_(scale_of(weight, call.offset))
    return ty if tweight is None else ty.add_(xhat * tweight.float())


def _backward_fake(call):
    empty = call.q.new_empty(0)
    dw = (empty if w is None or not call.need_dw else w.new_empty(w.shape) for w in (call.q_weight, call.k_weight))
    return _Grads(empty_in_order_of(call.q), empty if call.k is None else empty_in_order_of(call.k), *dw)


def _backward(call):
    grads = _backward_fake(call)
    B, S, *heads = _sizes(call)
    tile = _tile(call)
    tiles = [B * cdiv(S, tile.BLOCK_T) * cdiv(H, tile.BLOCK_H) for H in heads]
    # In proportion to the tiles of q and of k, at least one for each that has any.
    most = _PROGRAMS * processors_of(call.q.device)
    programs = tuple(min(n, max(1, most * n // sum(tiles))) if n else 0 for n in tiles)
    partials = []
    for dw, n in zip((grads.q_weight, grads.k_weight), programs, strict=True):
        partials.append(dw.new_empty((n, *dw.shape), dtype=torch.float32) if n and dw.numel() else None)
        if not n:
            dw.zero_()
    if sum(tiles):
        _launch_backward(call, grads, *partials, programs)
    return grads


def _backward_on_cpu(call):
    dys = (None if dy is None else dy.float() for dy in (call.dq_out, call.dk_out))
    gs = rotate_on_cpu(call.rotation.transposed, *dys)
    sides = (call.q, call.q_weight), (call.k, call.k_weight)
    (dq, dq_weight), (dk, dk_weight) = (
        _gradients_of_norm(call, g, x, weight) for g, (x, weight) in zip(gs, sides, strict=True)
    )
    return _Grads(*_dense_results(call, dq, dk), dq_weight, dk_weight)


def _gradients_of_norm(call, g, x, weight):
    """dx in float32, None without x, and dweight, empty where not needed. g: the gradient of the norm's result."""
    no_dweight = call.q.new_empty(0)
    if x is None:
        return None, no_dweight
    rows = x.float()
    rstd = rstd_of(rows, call.eps)
    xhat = rows * rstd
    if weight is None:
        return through_norm(g, xhat, rstd), no_dweight
    dweight = (g * xhat).sum_to_size(weight.shape).to(weight.dtype) if call.need_dw else no_dweight
    return through_norm(g * scale_of(weight, call.offset), xhat, rstd), dweight


# -> q, k (empty without k)
_qk_norm_rope = register(
    "qk_norm_rope(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
    "Tensor? position_ids, float eps, float offset, bool interleaved, Tensor? axes=None) -> (Tensor, Tensor)",
    call=_Forward,
    kernel=_forward,
    reference=_forward_on_cpu,
    fake=_forward_fake,
)
# -> the tangents of q and k (empty without k)
_qk_norm_rope_tangent = register(
    "qk_norm_rope_tangent(Tensor tq, Tensor? tk, Tensor? tq_weight, Tensor? tk_weight, Tensor q, Tensor? k, "
    "Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? position_ids, float eps, float offset, "
    "bool interleaved, Tensor? axes=None) -> (Tensor, Tensor)",
    kernel=_tangent,
    reference=_tangent_on_cpu,
    fake=_tangent_fake,
)
# -> dq, dk, dq_weight, dk_weight; empty where there is none, or none is needed. need_dw is an int in the schema since
# DTensor remembers results by tensors, and by other arguments from the first int on only.
_qk_norm_rope_backward = register(
    "qk_norm_rope_backward(Tensor dq_out, Tensor? dk_out, Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, "
    "Tensor cos, Tensor sin, Tensor? position_ids, float eps, float offset, bool interleaved, int need_dw, "
    "Tensor? axes=None) -> (Tensor, Tensor, Tensor, Tensor)",
    call=_Backward,
    kernel=_backward,
    reference=_backward_on_cpu,
    fake=_backward_fake,
)


# --- autograd --------------------------------------------------------------------------------------------------------


class _QKNormRope(Differentiable):
    """A `_Forward` -> q and k normed and rotated, or q alone. Saves q, k, the weights and the tables."""

    TANGENT_INPUTS = 4  # q, k and the weights

    @staticmethod
    def forward(op, q, k, *rest):
        q_out, k_out = _qk_norm_rope(q, k, *rest)
        return (q_out,) if k is None else (q_out, k_out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, *tensors, eps, offset, interleaved, axes = inputs
        save(ctx, *tensors, axes)
        ctx.options = (eps, offset, interleaved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dq_out, dk_out=None):
        needed = ctx.needs_input_grad[1:5]
        *tensors, axes = ctx.saved_tensors
        dys = [_gradient_of(x, dx) for x, dx in zip(tensors, (dq_out, dk_out), strict=False)]
        grads = _qk_norm_rope_backward(*dys, *tensors, *ctx.options, any(needed[2:]), axes)
        grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
        inputs, angles = tensors[:4], (*tensors[4:], axes)
        grads = with_derivatives_of(_Plain(*ctx.options).gradients, grads, (*dys, *inputs), angles)
        return None, *grads, *[None] * (len(_Forward._fields) - len(inputs))

    @staticmethod
    def jvp(ctx, *tangents):
        tangents = [None if t is None else last_dim_contiguous(t) for t in tangents]
        *tensors, axes = ctx.saved_tensors
        results = _qk_norm_rope_tangent(*tangents, *tensors, *ctx.options, axes)
        inputs, angles = tensors[:4], (*tensors[4:], axes)
        results = results[: 1 if inputs[1] is None else 2]
        return with_derivatives_of(_Plain(*ctx.options).tangents, results, (*tangents, *inputs), angles)


def _gradient_of(x: torch.Tensor | None, dx: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient `dx` of the result for x; zeros where that result was not used.

    PyTorch would make a plain tensor of zeros where x is a DTensor.
    """
    if x is None:
        return None
    return torch.zeros_like(x) if dx is None else last_dim_contiguous(dx)


class _Plain(NamedTuple):
    """The gradients and tangents of a call in plain PyTorch. Second derivatives are derivatives of these.

    angles: cos, sin, position_ids and axes. inputs: q, k, q_weight and k_weight, each of which may be None but q.
    """

    eps: float
    offset: float
    interleaved: bool

    def gradients(self, angles: Any, dq_out: Any, dk_out: Any, *inputs: torch.Tensor | None) -> Any:
        """The gradients of the inputs; None for one that is None."""
        _, pullback = results_and_pullback(self._of(inputs, angles), *(x for x in inputs if x is not None))
        grads = iter(pullback(tuple(dy.float() for dy in (dq_out, dk_out) if dy is not None)))
        return tuple(None if x is None else next(grads) for x in inputs)

    def tangents(self, angles: Any, *given: torch.Tensor | None) -> Any:
        """The tangents of the results. given: the tangents of the inputs, then the inputs."""
        tangents, inputs = given[:4], given[4:]
        pairs = [(x, t) for x, t in zip(inputs, tangents, strict=True) if x is not None]
        return pushforward(self._of(inputs, angles), *zip(*pairs, strict=True))

    def _of(self, inputs: tuple[torch.Tensor | None, ...], angles: Any) -> Any:
        """The op as a function of those inputs that are not None. Its results are float32."""

        def results(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            each = iter(tensors)
            q, k, *weights = (None if x is None else next(each) for x in inputs)
            heads: Any = (None if x is None else x.float() for x in (q, k))
            options: Any = {"eps": self.eps, "offset": self.offset, "interleaved": self.interleaved}
            *tables, axes = angles
            outs: Any = reference.qk_norm_rope(*heads, *weights, *tables, axes=axes, **options)
            return tuple(x for x in outs if x is not None)

        return results


register_gradient(
    "qk_norm_rope",
    ("q", "k", "q_weight", "k_weight"),
    by=lambda q, *rest: (*_QKNormRope.call("qk_norm_rope", q, *rest), q.new_empty(0))[:2],
)


# --- public function -------------------------------------------------------------------------------------------------


def qk_norm_rope(
    q: torch.Tensor,
    k: OptionalTensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    axes: torch.Tensor | None = None,
    eps: float | None = 1e-6,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[torch.Tensor, OptionalTensor]:
    """RMSNorm of every head of q and k, then RoPE: rope(rms_norm(q, q_weight), rms_norm(k, k_weight)) in one pass.

    For attention as in Qwen3 and Gemma 3. (OLMo 2 norms all heads together: that is `rms_norm`.) It moves half the
    bytes of separate calls in the forward, and three fifths in the backward. Computed in float32 and rounded once;
    separate calls also round the result of the norm.

    Args:
        q: (B, Hq, S, D) or packed (T, Hq, D), bfloat16, float16 or float32. Any strides; a last dimension that is not
            contiguous is copied.
        k: likewise with Hkv heads, or None.
        q_weight, k_weight: (D,), in any of these dtypes, or None for no scaling.
        cos, sin, position_ids, axes, interleaved: as in `rope`. Elements past the rotated width are normed too.
        eps, offset: as in `rms_norm`; offset=1.0 for Gemma.

    Returns:
        q and k, of the same shape, dtype and memory order; k is None where it was None.

    Raises:
        TypeError, ValueError: as `rope` and `rms_norm`; also if k_weight is given without k.
    """
    op = "qk_norm_rope"
    check_flag(op, "interleaved", interleaved)
    check_heads(op, q, k)
    check_tensors(op, optional=("q_weight", "k_weight"), q=q, q_weight=q_weight, k_weight=k_weight)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != q.shape[-1:]:
            raise ValueError(
                message(op, name, shape_of(weight), f"({q.shape[-1]},), one element per dimension of a head")
            )
    if k is None and k_weight is not None:
        raise ValueError(message(op, "k_weight", "given without k", "None where k is None"))
    check_angles(op, "q", q, tokens_of(q), q.shape[-1], cos, sin, position_ids, axes)
    eps = check_eps(op, eps)
    check_offset(op, offset)
    heads_and_weights = [None if x is None else last_dim_contiguous(x) for x in (q, k, q_weight, k_weight)]
    call = (*heads_and_weights, cos, sin, position_ids, eps, offset, interleaved, axes)  # fields of _Forward
    q_out: torch.Tensor
    k_out: Any
    if needs_grad(q, k, q_weight, k_weight):
        q_out, k_out = (*_QKNormRope.call(op, *call), None)[:2]
    else:
        q_out, k_out = _qk_norm_rope(*call)
    return q_out, k if k is None else k_out
