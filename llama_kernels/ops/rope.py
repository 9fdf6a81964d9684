"""RoPE: tiles, kernel, launcher, registered ops, autograd, public function."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from llama_kernels import reference
from llama_kernels.language import cast, tl, triton
from llama_kernels.runtime import (
    cdiv,
    check_tensors,
    distinct,
    empty_in_order_of,
    lanes_of,
    last_dim_contiguous,
    message,
    needs_grad,
    next_power_of_2,
    on_device_of,
    refuse_double_backward,
    register,
    shape_of,
    sizes_of,
    strides_of,
    values_are_checked,
)

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


# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_pairs(vectors, there, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
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
def _store_pairs(vectors, there, y0, y1, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
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


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, x_strides, y_strides, b, s, live, cos, sin, H,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INPLACE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Every head of the tokens (b, s): the pairs are rotated, what lies past the rotated width is copied."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x_tokens = x_ptr + (b * x_strides[0] + s * x_strides[2])[:, None]  # [BLOCK_T, 1], int64
    y_tokens = y_ptr + (b * y_strides[0] + s * y_strides[2])[:, None]
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        there = live[:, None] & (h < H)[None, :]
        x_vectors = x_tokens + h.to(tl.int64)[None, :] * x_strides[1]  # [BLOCK_T, BLOCK_H]
        y_vectors = y_tokens + h.to(tl.int64)[None, :] * y_strides[1]
        x0, x1 = _load_pairs(x_vectors, there, HALF, INTERLEAVED, BLOCK_R)  # [BLOCK_T, BLOCK_H, BLOCK_R]
        y0, y1 = cast(x0 * cos - x1 * sin, dtype), cast(x1 * cos + x0 * sin, dtype)
        _store_pairs(y_vectors, there, y0, y1, HALF, INTERLEAVED, BLOCK_R)
        if not INPLACE:
            for d0 in range(2 * HALF, D, 2 * BLOCK_R):
                d = d0 + tl.arange(0, 2 * BLOCK_R)
                mask = there[:, :, None] & (d < D)[None, None, :]
                rest = tl.load(x_vectors[:, :, None] + d[None, None, :], mask=mask, other=0.0)
                tl.store(y_vectors[:, :, None] + d[None, None, :], rest, mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ids_ptr,
    q_strides, k_strides, q_out_strides, k_out_strides, cos_strides, sin_strides, position_strides,
    S, Hq, Hkv, positions,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, INPLACE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(y0, y1) = (x0 cos - x1 sin, x1 cos + x0 sin) for every pair of every head of BLOCK_T tokens of q and of k.

    q, k: (B, H, S, D) by strides; cos, sin: rows of HALF float32. A token's row is position_ids[b, s], kept inside the
    table, or s. INVERSE rotates by the negative angle, which is the backward. k may be None. float32 inside.
    Bytes: q and k in and out, each table row once for all heads. FLOPs: 3 a element.
    """
    blocks = tl.cdiv(S, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    live = s < S
    if position_ids_ptr is None:
        row = s
    else:
        row = tl.load(position_ids_ptr + b * position_strides[0] + s * position_strides[1], mask=live, other=0)
        row = tl.minimum(tl.maximum(row.to(tl.int64), 0), positions - 1)
    pairs = tl.arange(0, BLOCK_R)
    mask = live[:, None] & (pairs < HALF)[None, :]
    cos = tl.load(cos_ptr + (b * cos_strides[0] + row * cos_strides[1])[:, None] + pairs[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (b * sin_strides[0] + row * sin_strides[1])[:, None] + pairs[None, :], mask=mask, other=0.0)
    cos, sin = cos.to(tl.float32)[:, None, :], sin.to(tl.float32)[:, None, :]  # [BLOCK_T, 1, BLOCK_R]
    if INVERSE:
        sin = -sin
    _rotate_heads(
        q_ptr, q_out_ptr, q_strides, q_out_strides, b, s, live, cos, sin, Hq,
        D, HALF, INTERLEAVED, INPLACE, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    if k_ptr is not None:
        _rotate_heads(
            k_ptr, k_out_ptr, k_strides, k_out_strides, b, s, live, cos, sin, Hkv,
            D, HALF, INTERLEAVED, INPLACE, BLOCK_H, BLOCK_R,
        )  # fmt: skip


# --- launcher --------------------------------------------------------------------------------------------------------


def _row_strides(x: torch.Tensor, batched: bool) -> tuple[int, int]:
    """Of batch and row, for what holds one row a token, or a table of rows that the whole batch shares."""
    if not batched:
        return 0, x.stride(0)
    return (0 if x.shape[0] == 1 else x.stride(0)), x.stride(1)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    B, Hq, S = sizes_of(q)
    Hkv = Hq if k is None else sizes_of(k)[1]
    if not B * S * max(Hq, Hkv):
        return
    D, half = q.shape[-1], cos.shape[-1]
    tile = head_tile(half, max(min(Hq, Hkv), 1), lanes_of(q.device))
    with on_device_of(q):
        _rope_kernel[(B * cdiv(S, tile.BLOCK_T),)](
            q, k, q_out, k_out, cos, sin, position_ids,
            *(None if x is None else strides_of(x) for x in (q, k, q_out, k_out)),
            _row_strides(cos, cos.ndim == 3), _row_strides(sin, sin.ndim == 3),
            None if position_ids is None else _row_strides(position_ids, position_ids.ndim == 2),
            S, Hq, Hkv, cos.shape[0],
            D=D, HALF=half, INTERLEAVED=interleaved, INVERSE=inverse, INPLACE=q is q_out,
            BLOCK_T=tile.BLOCK_T, BLOCK_H=tile.BLOCK_H, BLOCK_R=tile.BLOCK_R, num_warps=tile.num_warps,
        )  # fmt: skip


# --- registered ops --------------------------------------------------------------------------------------------------


def _fake(q, k, cos, sin, position_ids, interleaved, inverse):
    return empty_in_order_of(q), q.new_empty(0) if k is None else empty_in_order_of(k)


def _rotated(q, k, cos, sin, position_ids, interleaved, inverse):
    q_out, k_out = _fake(q, k, cos, sin, position_ids, interleaved, inverse)
    _launch(q, k, q_out, None if k is None else k_out, cos, sin, position_ids, interleaved, inverse)
    return q_out, k_out


def _rotated_reference(q, k, cos, sin, position_ids, interleaved, inverse):
    outs = _fake(q, k, cos, sin, position_ids, interleaved, inverse)
    sin = -sin if inverse else sin
    for out, x in zip(outs, reference.rope(q, k, cos, sin, position_ids, interleaved=interleaved), strict=True):
        if x is not None:
            out.copy_(x)
    return outs


def _rotate_in_place(q, k, cos, sin, position_ids, interleaved):
    _launch(q, k, q, k, cos, sin, position_ids, interleaved, inverse=False)


def _rotate_in_place_reference(q, k, cos, sin, position_ids, interleaved):
    reference.rope(q, k, cos, sin, position_ids, interleaved=interleaved, inplace=True)


# -> q, k (empty without k); inverse rotates by the negative angles
_rope = register(
    "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse) "
    "-> (Tensor, Tensor)",
    kernel=_rotated,
    reference=_rotated_reference,
    fake=_fake,
)
_rope_inplace = register(
    "rope_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved) -> ()",
    kernel=_rotate_in_place,
    reference=_rotate_in_place_reference,
    fake=lambda *_: None,
)


# --- autograd --------------------------------------------------------------------------------------------------------


class _Rope(torch.autograd.Function):
    """(q, k or None) -> the rotated q and k, or q alone: torch.compile has no gradient for an output that is None.

    Saves the tables only: the backward is the rotation by -angle.
    """

    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids, interleaved):
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.set_materialize_grads(False)
        ctx.interleaved = interleaved
        q_out, k_out = _rope(q, k, cos, sin, position_ids, interleaved, False)
        return q_out if k is None else (q_out, k_out)

    @staticmethod
    def backward(ctx, dq, dk=None):
        cos, sin, position_ids = ctx.saved_tensors
        need_q, need_k = ctx.needs_input_grad[:2]
        grads = [dq if need_q else None, dk if need_k else None]
        given = [last_dim_contiguous(g) for g in grads if g is not None]
        if given:
            first, second = (*given, None)[:2]
            rotated = iter(_rope(first, second, cos, sin, position_ids, ctx.interleaved, True))
            grads = [None if g is None else next(rotated) for g in grads]
        return *refuse_double_backward("rope", grads, (dq, dk)), None, None, None, None


class _RotatedInPlace(torch.autograd.Function):
    """Tells autograd that `x` is being rotated in place. One tensor each: autograd lets a Function that modifies a
    view return nothing else, and q and k usually are views of their projections."""

    @staticmethod
    def forward(ctx, x, cos, sin, position_ids, interleaved):
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved = interleaved
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, dx):
        cos, sin, position_ids = ctx.saved_tensors
        grad, _ = _rope(last_dim_contiguous(dx), None, cos, sin, position_ids, ctx.interleaved, True)
        return *refuse_double_backward("rope", (grad,), (dx,)), None, None, None, None


# --- public function -------------------------------------------------------------------------------------------------


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotary position embedding of q and k in one launch: each pair (x_i, x_j) of a head turns by its token's angle.

    Computed in float32 and rounded once. Su et al., RoFormer, arXiv 2104.09864.

    Args:
        q: (B, Hq, S, D) or packed (T, Hq, D), bfloat16, float16 or float32. Any strides; a last dimension that is not
            contiguous is copied.
        k: likewise with Hkv heads, or None.
        cos, sin: tables (positions, R/2), R <= D even, or one row a token, (B, S, R/2), (1, S, R/2) or (T, R/2), then
            without position_ids. Dims R to D pass through. An attention factor, where the scaling has one, is already
            in them. float32, or another floating dtype of at most 32 bits. They get no gradient.
        position_ids: the table row of each token, (S,), (B, S), (1, S) or (T,), any integer dtype; None is 0 to S - 1.
            Values outside the table are clamped into it: reading them back to check would stall the GPU
            (`llama_kernels.checked` does).
        interleaved: pair (2i, 2i + 1), as Meta's original weights; False pairs (i, i + R/2), as Hugging Face's.
        inplace: write into q and k and return them. Neither may be a leaf that requires grad, or expanded.

    Returns:
        q and k rotated, of the same shape, dtype and memory order; k is None where it was None.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes do not fit, a table is too short or requires grad, devices differ, or inplace cannot be.
    """
    _check(q, k, cos, sin, position_ids, inplace)
    cos, sin = last_dim_contiguous(cos), last_dim_contiguous(sin)
    if inplace and not torch.compiler.is_compiling():
        # First what autograd may refuse (a view made by split(), say), then the launch that cannot be taken back.
        q, k = (_declare_rotated(x, cos, sin, position_ids, interleaved) for x in (q, k))
        _rope_inplace(q.detach(), None if k is None else k.detach(), cos, sin, position_ids, interleaved)
        return q, k
    q_, k_ = last_dim_contiguous(q), None if k is None else last_dim_contiguous(k)
    if needs_grad(q, k):
        out = _Rope.apply(*distinct(q_, k_, cos, sin, position_ids), interleaved)
        q_out, k_out = (out, None) if k is None else out
    else:
        q_out, k_out = _rope(q_, k_, cos, sin, position_ids, interleaved, False)
    if inplace:  # a compiler sees through this copy; it does not see through a Function that modifies its input
        return q.copy_(q_out), None if k is None else k.copy_(k_out)
    return q_out, None if k is None else k_out


def _declare_rotated(x, cos, sin, position_ids, interleaved):
    if x is None:
        return None
    if needs_grad(x):
        return _RotatedInPlace.apply(x, cos, sin, position_ids, interleaved)
    torch.autograd.graph.increment_version(x)
    return x


def _check(q, k, cos, sin, position_ids, inplace) -> None:
    check_tensors("rope", q=q, k=k)
    check_tensors("rope", None, q=q, cos=cos, sin=sin)
    if q.ndim not in (3, 4):
        raise ValueError(message("rope", "q", shape_of(q), "(B, Hq, S, D), or (T, Hq, D) where tokens are packed"))
    B, _, S = sizes_of(q)
    D = q.shape[-1]
    if k is not None:
        if k.ndim != q.ndim or (sizes_of(k)[0], sizes_of(k)[2], k.shape[-1]) != (B, S, D):
            wanted = f"of q's shape {tuple(q.shape)} but for the number of heads"
            raise ValueError(message("rope", "k", shape_of(k), wanted))
        if k.dtype != q.dtype:
            raise TypeError(message("rope", "k", k.dtype, f"the dtype of q, {q.dtype}"))

    per_token = cos.ndim == 3
    if sin.shape != cos.shape:
        raise ValueError(message("rope", "sin", shape_of(sin), f"the shape of cos, {tuple(cos.shape)}"))
    if cos.dtype == torch.float64 or sin.dtype != cos.dtype:
        raise TypeError(message("rope", "sin" if sin.dtype != cos.dtype else "cos", sin.dtype, "float32, both alike"))
    if cos.ndim not in (2, 3) or (per_token and (q.ndim == 3 or cos.shape[0] not in (1, B) or cos.shape[1] != S)):
        wanted = "(positions, R/2)" if q.ndim == 3 else f"(positions, R/2) or a row a token, ({B}, {S}, R/2)"
        raise ValueError(message("rope", "cos", shape_of(cos), wanted))
    if not 0 < 2 * cos.shape[-1] <= D:
        fix = "Hugging Face's tables hold every angle twice: pass cos[..., : R // 2]." if cos.shape[-1] == D else ""
        wanted = f"at most D/2 = {D // 2} angles, and at least one, in the last dimension"
        raise ValueError(message("rope", "cos", shape_of(cos), wanted, fix))
    for name, x in (("cos", cos), ("sin", sin)):
        if x.requires_grad and torch.is_grad_enabled():
            fix = f"Pass {name}.detach(), or use llama_kernels.reference.rope to train the angles."
            raise ValueError(message("rope", name, "a tensor that requires grad", "a constant table", fix))

    if position_ids is None:
        if not per_token and cos.shape[0] < S:
            raise ValueError(message("rope", "cos", shape_of(cos), f"a table of at least {S} positions, one a token"))
    else:
        if not isinstance(position_ids, torch.Tensor):
            raise TypeError(message("rope", "position_ids", f"a {type(position_ids).__name__}", "a torch.Tensor"))
        if position_ids.dtype.is_floating_point or position_ids.dtype.is_complex or position_ids.dtype == torch.bool:
            raise TypeError(message("rope", "position_ids", position_ids.dtype, "a tensor of integers"))
        if position_ids.device != q.device:
            wanted = f"the device of q, {q.device}"
            raise ValueError(message("rope", "position_ids", f"on {position_ids.device}", wanted))
        if per_token:
            fix = "A row a token already says which angles each token gets."
            raise ValueError(message("rope", "position_ids", "given beside cos of a row a token", "None", fix))
        shapes = ((S,),) if q.ndim == 3 else ((S,), (1, S), (B, S))
        if tuple(position_ids.shape) not in shapes:
            raise ValueError(message("rope", "position_ids", shape_of(position_ids), " or ".join(map(str, shapes))))
        if S and not cos.shape[0]:
            raise ValueError(message("rope", "cos", shape_of(cos), "a table of at least one position"))
        if values_are_checked(position_ids) and position_ids.numel():
            first, last = (int(x) for x in position_ids.aminmax())
            if first < 0 or last >= cos.shape[0]:
                wanted = f"rows of the table, 0 to {cos.shape[0] - 1}"
                raise ValueError(message("rope", "position_ids", f"from {first} to {last}", wanted))

    if inplace:
        for name, x in (("q", q), ("k", k)):
            if x is None:
                continue
            if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
                fix = "Rotate a view or the result of an op, or leave inplace off."
                raise ValueError(message("rope", name, "a leaf that requires grad", "no leaf where inplace=True", fix))
            if x.stride(-1) != 1 or any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)):
                wanted = "one memory cell an element and a contiguous last dimension where inplace=True"
                raise ValueError(message("rope", name, f"of strides {x.stride()}", wanted))
