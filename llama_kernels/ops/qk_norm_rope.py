"""RMSNorm of every head of q and k, then RoPE, in one pass: kernels, launchers, ops, autograd, public function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from llama_kernels import reference
from llama_kernels.core.checks import check_eps, check_tensors, message, shape_of
from llama_kernels.core.device import lanes_of, processors_of
from llama_kernels.core.language import cast, inverse_root, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.registry import Differentiable, needs_grad, refuse_double_backward, register, register_gradient
from llama_kernels.core.tensors import (
    cdiv,
    empty_in_order_of,
    last_dim_contiguous,
    next_power_of_2,
    sizes_of,
    strides_of,
)
from llama_kernels.ops.partials import sum_partials
from llama_kernels.ops.rotation import (
    angle_arguments,
    check_angles,
    check_heads,
    head_tile,
    load_angles,
    load_pairs,
    pairs_of,
    rotate,
    store_pairs,
    tokens_of,
)
from llama_kernels.reference.rope import rope_transpose

# Programs a processor in the backward, of 128 threads each: enough to hide the sums across a head.
_PROGRAMS = 4
# Steps that the backward loads ahead, and one.
_STAGES: tl.constexpr = tl.constexpr(2)

# --- kernels ---------------------------------------------------------------------------------------------------------


class Vectors(NamedTuple):
    """One element of every pair, and what lies past the rotated width."""

    x0: tl.tensor  # [BLOCK_T, BLOCK_H, BLOCK_R]
    x1: tl.tensor
    rest: tl.tensor  # [BLOCK_T, BLOCK_H, BLOCK_D], or one zero a vector where nothing does


@triton.jit
def _load_vectors(
    ptrs, there, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The vectors at ptrs, as float32."""
    x0, x1 = load_pairs(ptrs, there, HALF, INTERLEAVED, BLOCK_R)
    rest = tl.zeros([there.shape[0], there.shape[1], 1], tl.float32)
    if D > 2 * HALF:
        d = 2 * HALF + tl.arange(0, BLOCK_D)
        mask = there[:, :, None] & (d < D)[None, None, :]
        rest = tl.load(ptrs[:, :, None] + d[None, None, :], mask=mask, other=0.0).to(tl.float32)
    return Vectors(x0, x1, rest)


@triton.jit
def _store_vectors(
    ptrs, there, x, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`x` rounded once."""
    dtype: tl.constexpr = ptrs.dtype.element_ty
    store_pairs(ptrs, there, cast(x.x0, dtype), cast(x.x1, dtype), HALF, INTERLEAVED, BLOCK_R)
    if D > 2 * HALF:
        d = 2 * HALF + tl.arange(0, BLOCK_D)
        mask = there[:, :, None] & (d < D)[None, None, :]
        tl.store(ptrs[:, :, None] + d[None, None, :], cast(x.rest, dtype), mask=mask)


@triton.jit
def _load_scales(
    weight_ptr, offset, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """offset + weight in the shape of a tile's vectors; 1 where there is no weight.

    Every thread loads what its vector needs: loaded as one vector, which has one element a thread, the weight would
    draw the whole tile into that layout.
    """
    one = tl.full([1, 1, 1], 1.0, tl.float32)
    scales = Vectors(one, one, one)
    if weight_ptr is not None:
        ptrs = weight_ptr + tl.zeros([BLOCK_T, BLOCK_H], tl.int32)
        w = _load_vectors(
            ptrs, tl.full([BLOCK_T, BLOCK_H], True, tl.int1), D, HALF, INTERLEAVED, BLOCK_R, BLOCK_D
        )  # fmt: skip
        scales = Vectors(offset + w.x0, offset + w.x1, offset + w.rest)
    return scales


@triton.jit
def _sum(a, b):
    """a . b, a number a vector: [BLOCK_T, BLOCK_H, 1]."""
    total = tl.sum(a.x0 * b.x0 + a.x1 * b.x1, 2)
    total += tl.sum(a.rest * b.rest, 2)
    return total[:, :, None]


@triton.jit
def _scaled(x, by):
    return Vectors(x.x0 * by.x0, x.x1 * by.x1, x.rest * by.rest)


@triton.jit
def _times(x, number):
    return Vectors(x.x0 * number, x.x1 * number, x.rest * number)


@triton.jit
def _forward_heads(
    x_ptr, weight_ptr, y_ptr, x_strides, y_strides, b, s, live, angles, H, eps, offset,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every head of the tokens (b, s)."""
    if D == 2 * HALF:
        scales = _load_scales(weight_ptr, offset, D, HALF, INTERLEAVED, live.shape[0], BLOCK_H, BLOCK_R, BLOCK_D)
    x_tokens = x_ptr + (b * x_strides[0] + s * x_strides[2])[:, None]  # [BLOCK_T, 1], int64
    y_tokens = y_ptr + (b * y_strides[0] + s * y_strides[2])[:, None]
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        there = live[:, None] & (h < H)[None, :]
        x_ptrs = x_tokens + h.to(tl.int64)[None, :] * x_strides[1]  # [BLOCK_T, BLOCK_H]
        y_ptrs = y_tokens + h.to(tl.int64)[None, :] * y_strides[1]
        x = _load_vectors(x_ptrs, there, D, HALF, INTERLEAVED, BLOCK_R, BLOCK_D)
        rstd = inverse_root(_sum(x, x) / D + eps)
        if D > 2 * HALF:  # no room for two vectors of weights beside two of x
            scales = _load_scales(weight_ptr, offset, D, HALF, INTERLEAVED, live.shape[0], BLOCK_H, BLOCK_R, BLOCK_D)
        y = _scaled(_times(x, rstd), scales)
        y0, y1 = rotate(y.x0, y.x1, angles)
        _store_vectors(y_ptrs, there, Vectors(y0, y1, y.rest), D, HALF, INTERLEAVED, BLOCK_R, BLOCK_D)


@triton.jit(do_not_specialize=["S", "Hq", "Hkv", "positions"])
def _qk_norm_rope_forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ids_ptr,
    q_strides, k_strides, q_out_strides, k_out_strides, cos_strides, sin_strides, position_strides,
    S, Hq, Hkv, positions, eps, offset,
    D: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = rotated(x * rstd * (offset + weight)), rstd = 1 / sqrt(mean(x^2) + eps), for every head x of BLOCK_T tokens.

    q, k: (B, H, S, D) by strides; weights (D,) or None; cos, sin: rows of HALF entries, or with FULL of 2 HALF, of row
    position_ids[b, s] or s. k may be None. float32 inside, rounded once.
    Bytes: q and k in and out, each table row once for all heads. FLOPs: 7 a element.
    """
    blocks = tl.cdiv(S, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    live = s < S
    angles = load_angles(
        cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, b, s, live, positions,
        HALF, FULL, INTERLEAVED, False, BLOCK_R,
    )  # fmt: skip
    _forward_heads(
        q_ptr, q_weight_ptr, q_out_ptr, q_strides, q_out_strides, b, s, live, angles, Hq, eps, offset,
        D, HALF, INTERLEAVED, BLOCK_H, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    if k_ptr is not None:
        _forward_heads(
            k_ptr, k_weight_ptr, k_out_ptr, k_strides, k_out_strides, b, s, live, angles, Hkv, eps, offset,
            D, HALF, INTERLEAVED, BLOCK_H, BLOCK_R, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _backward_heads(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, dw_ptr, cos_ptr, sin_ptr, position_ids_ptr,
    dy_strides, x_strides, dx_strides, cos_strides, sin_strides, position_strides,
    first, programs, B, S, H, positions, eps, offset,
    D: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th tile of BLOCK_T tokens by BLOCK_H heads, from tile `first` on."""
    scales = _load_scales(weight_ptr, offset, D, HALF, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_R, BLOCK_D)
    zeros = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_R], tl.float32)
    rest = tl.zeros([BLOCK_T, BLOCK_H, 1], tl.float32)
    if D > 2 * HALF:
        rest = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
    dw = Vectors(zeros, zeros, rest)
    groups, blocks = tl.cdiv(H, BLOCK_H), tl.cdiv(S, BLOCK_T)
    for tile in tl.range(first, B * blocks * groups, programs, num_stages=_STAGES):
        h = tile % groups * BLOCK_H + tl.arange(0, BLOCK_H)
        b = tl.cast(tile // groups // blocks, tl.int64)
        s = tile // groups % blocks * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        live = s < S
        there = live[:, None] & (h < H)[None, :]
        angles = load_angles(
            cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, b, s, live, positions,
            HALF, FULL, INTERLEAVED, True, BLOCK_R,
        )  # fmt: skip
        heads = h.to(tl.int64)[None, :]
        x_ptrs = x_ptr + (b * x_strides[0] + s * x_strides[2])[:, None] + heads * x_strides[1]
        dy_ptrs = dy_ptr + (b * dy_strides[0] + s * dy_strides[2])[:, None] + heads * dy_strides[1]
        dx_ptrs = dx_ptr + (b * dx_strides[0] + s * dx_strides[2])[:, None] + heads * dx_strides[1]
        x = _load_vectors(x_ptrs, there, D, HALF, INTERLEAVED, BLOCK_R, BLOCK_D)
        dy = _load_vectors(dy_ptrs, there, D, HALF, INTERLEAVED, BLOCK_R, BLOCK_D)
        g0, g1 = rotate(dy.x0, dy.x1, angles)
        g = Vectors(g0, g1, dy.rest)
        rstd = tl.where(there[:, :, None], inverse_root(_sum(x, x) / D + eps), 0.0)  # beyond: 0, also where eps is 0
        xhat = _times(x, rstd)
        if dw_ptr is not None:
            dw = Vectors(dw.x0 + g.x0 * xhat.x0, dw.x1 + g.x1 * xhat.x1, dw.rest + g.rest * xhat.rest)
        g = _scaled(g, scales)
        mean = _sum(g, xhat) / D
        dx = Vectors(
            rstd * (g.x0 - xhat.x0 * mean), rstd * (g.x1 - xhat.x1 * mean), rstd * (g.rest - xhat.rest * mean)
        )  # fmt: skip
        _store_vectors(dx_ptrs, there, dx, D, HALF, INTERLEAVED, BLOCK_R, BLOCK_D)
    if dw_ptr is not None:
        total = Vectors(
            tl.sum(tl.sum(dw.x0, 0), 0)[None, None, :], tl.sum(tl.sum(dw.x1, 0), 0)[None, None, :],
            tl.sum(tl.sum(dw.rest, 0), 0)[None, None, :],
        )  # fmt: skip
        row = dw_ptr + tl.cast(first, tl.int64) * D + tl.zeros([1, 1], tl.int32)
        _store_vectors(row, tl.full([1, 1], True, tl.int1), total, D, HALF, INTERLEAVED, BLOCK_R, BLOCK_D)


@triton.jit(do_not_specialize=["B", "S", "Hq", "Hkv", "positions", "q_programs"])
def _qk_norm_rope_backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, dq_out_ptr, dk_out_ptr, dq_weight_ptr, dk_weight_ptr,
    cos_ptr, sin_ptr, position_ids_ptr,
    dq_strides, dk_strides, q_strides, k_strides, dq_out_strides, dk_out_strides,
    cos_strides, sin_strides, position_strides,
    B, S, Hq, Hkv, positions, q_programs, eps, offset,
    D: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - xhat * mean(g * xhat)), xhat = x * rstd, g = turned back(dy) * (offset + weight);
    dweight = sum(turned back(dy) * xhat) over tokens and heads.

    The first q_programs programs take the heads of q, the others those of k: each every so-many-th tile. A program
    keeps its share of dweight in registers and writes it once, to its own row of (programs, D) float32. rstd is
    computed anew: x is read anyway. k, its gradient and the weights' may be None. float32 inside.
    Bytes: x and dy in, dx out, once each; table rows once a tile. FLOPs: 17 a element.
    """
    pid = tl.program_id(0)
    if pid < q_programs:
        _backward_heads(
            dq_ptr, q_ptr, q_weight_ptr, dq_out_ptr, dq_weight_ptr, cos_ptr, sin_ptr, position_ids_ptr,
            dq_strides, q_strides, dq_out_strides, cos_strides, sin_strides, position_strides,
            pid, q_programs, B, S, Hq, positions, eps, offset,
            D, HALF, FULL, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    elif k_ptr is not None:
        _backward_heads(
            dk_ptr, k_ptr, k_weight_ptr, dk_out_ptr, dk_weight_ptr, cos_ptr, sin_ptr, position_ids_ptr,
            dk_strides, k_strides, dk_out_strides, cos_strides, sin_strides, position_strides,
            pid - q_programs, tl.num_programs(0) - q_programs, B, S, Hkv, positions, eps, offset,
            D, HALF, FULL, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_R, BLOCK_D,
        )  # fmt: skip


# --- launchers -------------------------------------------------------------------------------------------------------


def _widths(q: torch.Tensor, cos: torch.Tensor) -> dict[str, int]:
    """D, HALF, FULL, and the power of two that holds what lies past the rotated width."""
    D = q.shape[-1]
    pairs = pairs_of(cos, D)
    return {"D": D, **pairs, "BLOCK_D": max(next_power_of_2(D - 2 * pairs["HALF"]), 16)}


def _blocks(heads: int, half: int, device: torch.device) -> dict[str, int]:
    tile = head_tile(half, heads, lanes_of(device))
    return {name: getattr(tile, name) for name in ("BLOCK_T", "BLOCK_H", "BLOCK_R", "num_warps")}


def _optional_strides(x: torch.Tensor | None) -> tuple[int, int, int] | None:
    return None if x is None else strides_of(x)


@cached_launch
def _plan_forward(
    q, k, q_weight, k_weight, q_out, k_out, cos, sin, position_ids, eps, offset, interleaved
) -> Iterator[Launch]:
    B, Hq, S = sizes_of(q)
    Hkv = Hq if k is None else sizes_of(k)[1]
    if not B * S * max(Hq, Hkv):
        return
    angles, angle_strides = angle_arguments(cos, sin, position_ids)
    blocks = _blocks(max(min(Hq, Hkv), 1), pairs_of(cos, q.shape[-1])["HALF"], q.device)
    yield Launch(
        _qk_norm_rope_forward_kernel,
        (B * cdiv(S, blocks["BLOCK_T"]),),
        (
            q, k, q_weight, k_weight, q_out, k_out, *angles,
            *map(_optional_strides, (q, k, q_out, k_out)), *angle_strides,
            S, Hq, Hkv, cos.shape[0], eps, offset,
        ),
        {"INTERLEAVED": interleaved, **_widths(q, cos), **blocks},
    )  # fmt: skip


def _forward(q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved):
    outs = _forward_fake(q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved)
    k_out = None if k is None else outs[1]
    _plan_forward(q, k, q_weight, k_weight, outs[0], k_out, cos, sin, position_ids, eps, offset, interleaved)
    return outs


@cached_launch
def _plan_backward(
    dq, dk, q, k, q_weight, k_weight, dq_out, dk_out, dq_weight, dk_weight, q_partials, k_partials,
    cos, sin, position_ids, eps, offset, interleaved, programs,
) -> Iterator[Launch]:  # fmt: skip
    """The weights' gradients and their partial sums are None where none is needed. programs: for q, and for k."""
    B, Hq, S = sizes_of(q)
    Hkv = 0 if k is None else sizes_of(k)[1]
    angles, angle_strides = angle_arguments(cos, sin, position_ids)
    yield Launch(
        _qk_norm_rope_backward_kernel,
        (sum(programs),),
        (
            dq, dk, q, k, q_weight, k_weight, dq_out, dk_out, q_partials, k_partials, *angles,
            *map(_optional_strides, (dq, dk, q, k, dq_out, dk_out)), *angle_strides,
            B, S, Hq, Hkv, cos.shape[0], programs[0], eps, offset,
        ),
        {"INTERLEAVED": interleaved, **_widths(q, cos), **_backward_blocks(q, k, cos)},
    )  # fmt: skip
    for partials, dw in ((q_partials, dq_weight), (k_partials, dk_weight)):
        if partials is not None and len(partials):
            yield sum_partials(partials, dw)


def _backward_blocks(q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor) -> dict[str, int]:
    Hq, Hkv = sizes_of(q)[1], 0 if k is None else sizes_of(k)[1]
    return _blocks(max(min(Hq, Hkv or Hq), 1), pairs_of(cos, q.shape[-1])["HALF"], q.device)


def _backward(dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved, need_dw):
    outs = _backward_fake(dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved, need_dw)
    B, Hq, S = sizes_of(q)
    Hkv = 0 if k is None else sizes_of(k)[1]
    blocks = _backward_blocks(q, k, cos)
    tiles = [B * cdiv(S, blocks["BLOCK_T"]) * cdiv(H, blocks["BLOCK_H"]) for H in (Hq, Hkv)]
    if not sum(tiles):
        for dw in outs[2:]:
            dw.zero_()
        return outs
    # Programs in proportion to the tiles of q and of k, at least one for each that there is.
    most = _PROGRAMS * processors_of(q.device)
    programs = tuple(min(n, max(1, most * n // sum(tiles))) for n in tiles)
    partials, grads = [], []
    for w, dw, n in ((q_weight, outs[2], programs[0]), (k_weight, outs[3], programs[1])):
        wanted = need_dw and w is not None
        partials.append(q.new_empty((n, q.shape[-1]), dtype=torch.float32) if wanted else None)
        grads.append(dw if wanted else None)
        if wanted and not n:
            dw.zero_()
    _plan_backward(
        dq, dk, q, k, q_weight, k_weight, outs[0], None if k is None else outs[1], *grads, *partials,
        cos, sin, position_ids, eps, offset, interleaved, programs,
    )  # fmt: skip
    return outs


# --- the same from plain PyTorch, for CPU tensors --------------------------------------------------------------------


def _forward_reference(q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved):
    outs = _forward_fake(q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved)
    options = {"eps": eps, "offset": offset, "interleaved": interleaved}
    results = reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, position_ids, **options)
    for out, result in zip(outs, results, strict=True):
        if result is not None:
            out.copy_(result)
    return outs


def _backward_reference(dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved, need_dw):
    outs = _backward_fake(dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved, need_dw)
    for i, (dy, x, weight) in enumerate(((dq, q, q_weight), (dk, k, k_weight))):
        if x is None:
            continue
        g, _ = rope_transpose(dy.float(), None, cos, sin, position_ids, interleaved=interleaved)
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        xhat = x.float() * rstd
        if weight is not None:
            if need_dw:
                outs[2 + i].copy_((g * xhat).sum_to_size(weight.shape))
            g = g * (offset + weight.float())
        outs[i].copy_(rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True)))
    return outs


# --- registered ops --------------------------------------------------------------------------------------------------


def _forward_fake(q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved):
    return empty_in_order_of(q), q.new_empty(0) if k is None else empty_in_order_of(k)


def _backward_fake(dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved, need_dw):
    weights = (w if need_dw else None for w in (q_weight, k_weight))
    return (
        empty_in_order_of(q),
        q.new_empty(0) if k is None else empty_in_order_of(k),
        *(q.new_empty(0) if w is None else w.new_empty(w.shape) for w in weights),
    )


# -> q, k (empty without k)
_qk_norm_rope = register(
    "qk_norm_rope(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
    "Tensor? position_ids, float eps, float offset, bool interleaved) -> (Tensor, Tensor)",
    kernel=_forward,
    reference=_forward_reference,
    fake=_forward_fake,
)
# -> dq, dk, dq_weight, dk_weight; empty where there is none, or none is needed
_qk_norm_rope_backward = register(
    "qk_norm_rope_backward(Tensor dq, Tensor? dk, Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos, "
    "Tensor sin, Tensor? position_ids, float eps, float offset, bool interleaved, bool need_dw) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    reference=_backward_reference,
    fake=_backward_fake,
)


# --- autograd --------------------------------------------------------------------------------------------------------


class _QKNormRope(Differentiable):
    """(q, k or None) -> normed and rotated, or q alone. Saves q, k, the weights and the tables: nothing it made."""

    @staticmethod
    def forward(op, q, k, *rest):
        q_out, k_out = _qk_norm_rope(q, k, *rest)
        return (q_out,) if k is None else (q_out, k_out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, *tensors, eps, offset, interleaved = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = (eps, offset, interleaved)

    @staticmethod
    def backward(ctx, dq, dk=None):
        q, k, *rest = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:5]
        dq, dk = [None if g is None else last_dim_contiguous(g) for g in (dq, dk)]
        grads = _qk_norm_rope_backward(dq, dk, q, k, *rest, *ctx.options, any(needed[2:]))
        grads = [g if need else None for g, need in zip(grads, needed, strict=True)]
        grads = refuse_double_backward(ctx.op, grads, (dq, dk, q, k, *rest[:2]))
        return None, *grads, *[None] * 6


register_gradient(
    "qk_norm_rope",
    ("q", "k", "q_weight", "k_weight"),
    by=lambda q, *rest: (*_QKNormRope.call("qk_norm_rope", q, *rest), q.new_empty(0))[:2],
)


# --- public function -------------------------------------------------------------------------------------------------


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    eps: float | None = 1e-6,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """RMSNorm of every head of q and k, then RoPE: rope(rms_norm(q, q_weight), rms_norm(k, k_weight)) in one pass.

    As the attention of Qwen3, Gemma 3 and others has it (a norm over all heads together, as OLMo 2's, is `rms_norm`).
    Half the bytes of separate calls forward, three fifths backward. Computed in float32 and rounded once, where
    separate calls round the norm's result too.

    Args:
        q: (B, Hq, S, D) or packed (T, Hq, D), bfloat16, float16 or float32. Any strides; a last dimension that is not
            contiguous is copied.
        k: likewise with Hkv heads, or None.
        q_weight, k_weight: (D,) in any of these dtypes, or None for no scaling.
        cos, sin, position_ids, interleaved: as in `rope`. Dims past the rotated width are normed too.
        eps, offset: as in `rms_norm`; offset=1.0 for Gemma.

    Returns:
        q and k, of the same shape, dtype and memory order; k is None where it was None.

    Raises:
        TypeError, ValueError: as `rope` and `rms_norm`; also for a k_weight without k.
    """
    _check(q, k, q_weight, k_weight, cos, sin, position_ids)
    eps = check_eps("qk_norm_rope", eps)
    tensors = (None if x is None else last_dim_contiguous(x) for x in (q, k, q_weight, k_weight))
    q, k, q_weight, k_weight = tensors
    if needs_grad(q, k, q_weight, k_weight):
        tensors = (q, k, q_weight, k_weight, cos, sin, position_ids)
        return (*_QKNormRope.call("qk_norm_rope", *tensors, eps, offset, interleaved), None)[:2]
    q_out, k_out = _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved)
    return q_out, None if k is None else k_out


def _check(q, k, q_weight, k_weight, cos, sin, position_ids) -> None:
    op = "qk_norm_rope"
    check_heads(op, q, k)
    check_tensors(op, q=q, q_weight=q_weight, k_weight=k_weight)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != q.shape[-1:]:
            raise ValueError(message(op, name, shape_of(weight), f"({q.shape[-1]},), one element a dim of a head"))
    if k is None and k_weight is not None:
        raise ValueError(message(op, "k_weight", "given without k", "None where k is None"))
    check_angles(op, "q", q, tokens_of(q), q.shape[-1], cos, sin, position_ids)
