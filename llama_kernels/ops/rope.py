"""RoPE of q and k, of a packed projection, of what enters a cache: one kernel, launcher, ops, autograd, functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llama_kernels import reference
from llama_kernels.core.checks import check_tensors, message, shape_of
from llama_kernels.core.device import lanes_of
from llama_kernels.core.language import cast, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.registry import (
    Differentiable,
    needs_grad,
    refuse_double_backward,
    refuse_forward_mode,
    register,
    register_gradient,
    transforms_are_active,
)
from llama_kernels.core.tensors import cdiv, empty_in_order_of, last_dim_contiguous, sizes_of, strides_of
from llama_kernels.ops.rotation import (
    angle_arguments,
    check_angles,
    check_heads,
    check_rows,
    head_tile,
    load_angles,
    load_pairs,
    pairs_of,
    rotate,
    row_strides,
    store_pairs,
    tokens_of,
)
from llama_kernels.reference.rope import rope_transpose

# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, x_strides, y_strides, b, s, t, live, angles, H,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INPLACE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Every head of the tokens (b, s) of x, to the tokens (b, t) of y: the pairs are rotated, what lies past the
    rotated width is copied."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x_tokens = x_ptr + (b * x_strides[0] + s * x_strides[2])[:, None]  # [BLOCK_T, 1], int64
    y_tokens = y_ptr + (b * y_strides[0] + t * y_strides[2])[:, None]
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        there = live[:, None] & (h < H)[None, :]
        x_vectors = x_tokens + h.to(tl.int64)[None, :] * x_strides[1]  # [BLOCK_T, BLOCK_H]
        y_vectors = y_tokens + h.to(tl.int64)[None, :] * y_strides[1]
        if HALF:
            x0, x1 = load_pairs(x_vectors, there, HALF, INTERLEAVED, BLOCK_R)  # [BLOCK_T, BLOCK_H, BLOCK_R]
            y0, y1 = rotate(x0, x1, angles)
            store_pairs(y_vectors, there, cast(y0, dtype), cast(y1, dtype), HALF, INTERLEAVED, BLOCK_R)
        if not INPLACE:
            for d0 in range(2 * HALF, D, 2 * BLOCK_R):
                d = d0 + tl.arange(0, 2 * BLOCK_R)
                mask = there[:, :, None] & (d < D)[None, None, :]
                rest = tl.load(x_vectors[:, :, None] + d[None, None, :], mask=mask, other=0.0)
                tl.store(y_vectors[:, :, None] + d[None, None, :], rest, mask=mask)


@triton.jit(do_not_specialize=["S", "Hq", "Hkv", "positions", "slots"])
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, cos_ptr, sin_ptr, position_ids_ptr, slots_ptr,
    q_strides, k_strides, v_strides, q_out_strides, k_out_strides, v_out_strides,
    cos_strides, sin_strides, position_strides, slot_strides,
    S, Hq, Hkv, positions, slots,
    D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, INPLACE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(y0, y1) = (x0 cos - x1 sin, x1 cos + x0 sin) for every pair of every head of BLOCK_T tokens of q and of k.

    q, k: (B, H, S, D) by strides; cos, sin: rows of HALF entries, one a pair, or with FULL of 2 HALF, one for y0
    and one for y1. A token's row is position_ids[b, s], kept inside the table, or s. INVERSE rotates by the transpose,
    which is the backward. k may be None. float32 inside.
    v (B, Hkv, S, DV), where it is given, is copied. With slots, token s of k and of v goes to token slots[b, s] of what
    holds `slots` of them (a cache), and nowhere if there is none.
    Bytes: q and k (and v) in and out, each table row once for all heads. FLOPs: 3 a element.
    """
    blocks = tl.cdiv(S, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    live = s < S
    angles = load_angles(
        cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, b, s, live, positions,
        HALF, FULL, INTERLEAVED, INVERSE, BLOCK_R,
    )  # fmt: skip
    _rotate_heads(
        q_ptr, q_out_ptr, q_strides, q_out_strides, b, s, s, live, angles, Hq,
        D, HALF, INTERLEAVED, INPLACE, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    t = s
    if slots_ptr is not None:
        t = tl.load(slots_ptr + b * slot_strides[0] + s * slot_strides[1], mask=live, other=-1).to(tl.int64)
        live = (t >= 0) & (t < slots)
    if k_ptr is not None:
        _rotate_heads(
            k_ptr, k_out_ptr, k_strides, k_out_strides, b, s, t, live, angles, Hkv,
            D, HALF, INTERLEAVED, INPLACE, BLOCK_H, BLOCK_R,
        )  # fmt: skip
    if v_ptr is not None:
        _rotate_heads(
            v_ptr, v_out_ptr, v_strides, v_out_strides, b, s, t, live, angles, Hkv,
            DV, 0, INTERLEAVED, False, BLOCK_H, BLOCK_R,
        )  # fmt: skip


# --- launcher --------------------------------------------------------------------------------------------------------


@cached_launch
def _launch(
    q, k, q_out, k_out, cos, sin, position_ids, interleaved, inverse, v=None, v_out=None, slots=None
) -> Iterator[Launch]:
    """q_out None: in place. v, v_out and slots as `_rope_kernel` takes them."""
    B, Hq, S = sizes_of(q)
    Hkv = Hq if k is None else sizes_of(k)[1]
    if not B * S * max(Hq, Hkv):
        return
    pairs = pairs_of(cos, q.shape[-1])
    tile = head_tile(pairs["HALF"], max(min(Hq, Hkv), 1), lanes_of(q.device))
    angles, angle_strides = angle_arguments(cos, sin, position_ids)
    outs = (q, k, v_out) if q_out is None else (q_out, k_out, v_out)
    moved = (q, k, v, *outs)
    yield Launch(
        _rope_kernel,
        (B * cdiv(S, tile.BLOCK_T),),
        (
            *moved, *angles, slots,
            *[None if x is None else strides_of(x) for x in moved], *angle_strides,
            row_strides(slots, slots is not None and slots.ndim == 2),
            S, Hq, Hkv, cos.shape[0], None if slots is None else sizes_of(k_out)[2],
        ),
        {
            "D": q.shape[-1], "DV": None if v is None else v.shape[-1], **pairs,
            "INTERLEAVED": interleaved, "INVERSE": inverse, "INPLACE": q_out is None,
            "BLOCK_T": tile.BLOCK_T, "BLOCK_H": tile.BLOCK_H, "BLOCK_R": tile.BLOCK_R, "num_warps": tile.num_warps,
        },
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
    by = rope_transpose if inverse else reference.rope
    for out, x in zip(outs, by(q, k, cos, sin, position_ids, interleaved=interleaved), strict=True):
        if x is not None:
            out.copy_(x)
    return outs


def _rotate_in_place(q, k, cos, sin, position_ids, interleaved):
    _launch(q, k, None, None, cos, sin, position_ids, interleaved, False)


def _rotate_in_place_reference(q, k, cos, sin, position_ids, interleaved):
    reference.rope(q, k, cos, sin, position_ids, interleaved=interleaved, inplace=True)


# -> q, k (empty without k); inverse is the transpose, the backward
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


def _parts(qkv: torch.Tensor, q_heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """q, k and v as they lie in a packed projection: views of (B, H, S, D) or (T, H, D)."""
    count = q_heads + 2 * kv_heads
    heads = qkv.view(*qkv.shape[:-1], count, qkv.shape[-1] // count)
    heads = heads.transpose(1, 2) if qkv.ndim == 3 else heads
    return (
        heads.narrow(1, 0, q_heads), heads.narrow(1, q_heads, kv_heads), heads.narrow(1, q_heads + kv_heads, kv_heads)
    )  # fmt: skip


def _packed_fake(dq, dk, dv, cos, sin, position_ids, interleaved):
    tokens = (dq.shape[0], dq.shape[2]) if dq.ndim == 4 else (dq.shape[0],)
    heads = -3 if dq.ndim == 4 else -2
    return dq.new_empty((*tokens, (dq.shape[heads] + dk.shape[heads] + dv.shape[heads]) * dq.shape[-1]))


def _packed_backward(dq, dk, dv, cos, sin, position_ids, interleaved):
    dqkv = _packed_fake(dq, dk, dv, cos, sin, position_ids, interleaved)
    q_out, k_out, v_out = _parts(dqkv, sizes_of(dq)[1], sizes_of(dk)[1])
    _launch(dq, dk, q_out, k_out, cos, sin, position_ids, interleaved, True, dv, v_out)
    return dqkv


def _packed_backward_reference(dq, dk, dv, cos, sin, position_ids, interleaved):
    dqkv = _packed_fake(dq, dk, dv, cos, sin, position_ids, interleaved)
    grads = (*rope_transpose(dq, dk, cos, sin, position_ids, interleaved=interleaved), dv)
    heads = torch.cat(grads, 1)
    return dqkv.copy_((heads.transpose(1, 2) if dq.ndim == 4 else heads).flatten(-2))


def _into_cache(q, k, v, k_cache, v_cache, cache_position, cos, sin, position_ids, interleaved):
    q_out = empty_in_order_of(q)
    _launch(q, k, q_out, k_cache, cos, sin, position_ids, interleaved, False, v, v_cache, cache_position)
    return q_out


def _into_cache_reference(q, k, v, k_cache, v_cache, cache_position, cos, sin, position_ids, interleaved):
    q_out = empty_in_order_of(q)
    return q_out.copy_(
        reference.rope_into_cache(
            q, k, v, k_cache, v_cache, cache_position, cos, sin, position_ids, interleaved=interleaved
        )
    )


_rope_qkv_backward = register(
    "rope_qkv_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor? position_ids, "
    "bool interleaved) -> Tensor",
    kernel=_packed_backward,
    reference=_packed_backward_reference,
    fake=_packed_fake,
)
_rope_into_cache = register(
    "rope_into_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_position, "
    "Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved) -> Tensor",
    kernel=_into_cache,
    reference=_into_cache_reference,
    fake=lambda q, *_: empty_in_order_of(q),
)


# --- autograd --------------------------------------------------------------------------------------------------------


class _Rope(Differentiable):
    """(q, k or None) -> the rotated q and k, or q alone. Saves the tables only: its backward rotates by -angle."""

    @staticmethod
    def forward(op, q, k, cos, sin, position_ids, interleaved, inverse):
        q_out, k_out = _rope(q, k, cos, sin, position_ids, interleaved, inverse)
        return (q_out,) if k is None else (q_out, k_out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, _, _, cos, sin, position_ids, ctx.interleaved, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dq, dk=None):
        cos, sin, position_ids = ctx.saved_tensors
        need_q, need_k = ctx.needs_input_grad[1:3]
        grads = [dq if need_q else None, dk if need_k else None]
        given = [last_dim_contiguous(g) for g in grads if g is not None]
        if given:
            first, second = (*given, None)[:2]
            rotated = iter(_rope(first, second, cos, sin, position_ids, ctx.interleaved, not ctx.inverse))
            grads = [None if g is None else next(rotated) for g in grads]
        return None, *refuse_double_backward(ctx.op, grads, (dq, dk)), *[None] * 5


register_gradient("rope", ("q", "k"), by=lambda q, *rest: (*_Rope.call("rope", q, *rest), q.new_empty(0))[:2])


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


class _RopeQKV(Differentiable):
    """qkv -> q and k rotated, v as it lies there. The backward writes the gradient of the whole projection at once."""

    @staticmethod
    def forward(op, qkv, q_heads, kv_heads, cos, sin, position_ids, interleaved):
        q, k, v = _parts(qkv, q_heads, kv_heads)
        return *_rope(q, k, cos, sin, position_ids, interleaved, False), v

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, _, _, _, cos, sin, position_ids, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin, position_ids)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        cos, sin, position_ids = ctx.saved_tensors
        grads = [last_dim_contiguous(g) for g in (dq, dk, dv)]
        dqkv = _rope_qkv_backward(*grads, cos, sin, position_ids, ctx.interleaved)
        return None, *refuse_double_backward(ctx.op, (dqkv,), (dq, dk, dv)), *[None] * 6


# --- public functions ------------------------------------------------------------------------------------------------


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
            without position_ids: an angle a pair. Or R in place of R/2, where R > D/2: an angle an element, as Hugging
            Face's; y_i = x_i cos_i - x_j sin_i and y_j = x_j cos_j + x_i sin_j, whether the two are equal or not. Up
            to D/2 entries are always an angle a pair: of narrower tables of an angle an element pass
            cos[..., : R // 2], or cos[..., ::2] where pairs are neighbours. Dims R to D pass through. An attention
            factor, where the scaling has one, is already in them. Any strides; bfloat16, float16, float32 or float64,
            read as float32. They get no gradient.
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
    if inplace and not (torch.compiler.is_compiling() or transforms_are_active()):
        # First what autograd may refuse (a view made by split(), say), then the launch that cannot be taken back.
        q, k = (_declare_rotated(x, cos, sin, position_ids, interleaved) for x in (q, k))
        _rope_inplace(q.detach(), None if k is None else k.detach(), cos, sin, position_ids, interleaved)
        return q, k
    q_, k_ = last_dim_contiguous(q), None if k is None else last_dim_contiguous(k)
    if needs_grad(q, k):
        q_out, k_out = (*_Rope.call("rope", q_, k_, cos, sin, position_ids, interleaved, False), None)[:2]
    else:
        q_out, k_out = _rope(q_, k_, cos, sin, position_ids, interleaved, False)
    if inplace:  # compilers and transforms see through this copy, not through a Function that modifies its input
        return q.copy_(q_out), None if k is None else k.copy_(k_out)
    return q_out, None if k is None else k_out


def rope_qkv(
    qkv: torch.Tensor,
    q_heads: int,
    kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotary position embedding of a packed projection: q and k come out rotated, v is a view of `qkv`.

    One launch each way. The forward reads q and k where they lie; the backward turns dq and dk back and writes them and
    dv into the gradient of `qkv`, where separate calls write dq and dk, and then copy all three together.

    Args:
        qkv: (B, S, (q_heads + 2 kv_heads) D), or packed (T, (q_heads + 2 kv_heads) D): the heads of q, then those of k,
            then those of v. bfloat16, float16 or float32. A last dimension that is not contiguous is copied.
        q_heads, kv_heads: how many of each there are.
        cos, sin, position_ids, interleaved: as in `rope`.

    Returns:
        q (B, q_heads, S, D), k and v (B, kv_heads, S, D), in the memory order of (B, S, H, D); (T, H, D) of packed
        tokens. v shares the memory of `qkv`, and is not to be changed in place.

    Raises:
        TypeError, ValueError: as `rope`; also where the last dimension is not made of that many heads.
    """
    check_tensors("rope_qkv", qkv=qkv)
    for name, heads in (("q_heads", q_heads), ("kv_heads", kv_heads)):
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ValueError(message("rope_qkv", name, repr(heads), "a number of heads, at least 1"))
    heads = q_heads + 2 * kv_heads
    if qkv.ndim not in (2, 3) or qkv.shape[-1] % heads:
        wanted = f"(B, S, {heads} D), or (T, {heads} D) where tokens are packed: {q_heads} + 2 * {kv_heads} heads"
        raise ValueError(message("rope_qkv", "qkv", shape_of(qkv), wanted))
    tokens = (qkv.shape[0], qkv.shape[1]) if qkv.ndim == 3 else (None, qkv.shape[0])
    check_angles("rope_qkv", "qkv", qkv, tokens, qkv.shape[-1] // heads, cos, sin, position_ids)
    qkv = last_dim_contiguous(qkv)
    if needs_grad(qkv):
        return _RopeQKV.call("rope_qkv", qkv, q_heads, kv_heads, cos, sin, position_ids, interleaved)
    q, k, v = _parts(qkv, q_heads, kv_heads)
    return *_rope(q, k, cos, sin, position_ids, interleaved, False), v


def rope_into_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """A decoding step's RoPE in one launch: q comes out rotated, k rotated and v go straight to their cache positions.

    Separate calls take three launches and write k twice. For inference: there are no gradients.

    Args:
        q: (B, Hq, S, D); k: (B, Hkv, S, D); v: (B, Hkv, S, Dv): the new tokens. bfloat16, float16 or float32.
        k_cache: (B, Hkv, L, D), v_cache: (B, Hkv, L, Dv), in the dtype of k and v, any strides with a contiguous last
            dimension. Written in place.
        cache_position: where each token goes, (S,), (1, S) or (B, S), any integer dtype. What would go outside of the
            cache goes nowhere (`llama_kernels.checked` raises). Of two tokens for one position either may stay.
        cos, sin, interleaved: as in `rope`.
        position_ids: the table row of each token; None is `cache_position`, or, where cos and sin have a row a token,
            that row.

    Returns:
        q rotated, in its shape, dtype and memory order.

    Raises:
        TypeError, ValueError: as `rope`; also where a cache does not fit, or gradients are wanted.
    """
    op = "rope_into_cache"
    check_heads(op, q, k, v=v, k_cache=k_cache, v_cache=v_cache)
    if q.ndim != 4:
        raise ValueError(message(op, "q", shape_of(q), "(B, Hq, S, D)"))
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(message(op, "v", shape_of(v), f"of k's shape {tuple(k.shape)} but for the last dimension"))
    if v.dtype != k.dtype:
        raise TypeError(message(op, "v", v.dtype, f"the dtype of k, {k.dtype}"))
    length = k_cache.shape[2] if k_cache.ndim == 4 else None
    for name, cache, x in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        B, H, _, D = x.shape
        if cache.shape != (B, H, length, D):
            raise ValueError(message(op, name, shape_of(cache), f"({B}, {H}, L, {D}), both caches of one length L"))
        if cache.dtype != x.dtype:
            raise TypeError(message(op, name, cache.dtype, f"the dtype of {name[0]}, {x.dtype}"))
        if cache.stride(-1) != 1 and D > 1:
            wanted = "a contiguous last dimension: it is written in place"
            raise ValueError(message(op, name, f"of strides {cache.stride()}", wanted))
    tensors = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    if transforms_are_active():
        refuse_forward_mode(op, *tensors.values())
        if torch._C._are_functorch_transforms_active():
            wanted, fix = "a tensor outside of them: caches are written in place", "Use llama_kernels.rope."
            raise ValueError(message(op, "q", "inside of a torch.func transform", wanted, fix))
    if needs_grad(*tensors.values()) and any(x.requires_grad for x in tensors.values()):
        name = next(name for name, x in tensors.items() if x.requires_grad)
        fix = "Call it under torch.no_grad(), or use llama_kernels.rope."
        raise ValueError(message(op, name, "a tensor that requires grad", "one without: it is for inference", fix))
    tokens = tokens_of(q)
    check_rows(op, "cache_position", cache_position, "q", q, tokens, length, "positions of the cache")
    if position_ids is None and cos.ndim == 2:
        position_ids = cache_position
    check_angles(op, "q", q, tokens, q.shape[-1], cos, sin, position_ids)
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    return _rope_into_cache(q, k, v, k_cache, v_cache, cache_position, cos, sin, position_ids, interleaved)


def _declare_rotated(x, cos, sin, position_ids, interleaved):
    if x is None:
        return None
    if needs_grad(x):
        return _RotatedInPlace.apply(x, cos, sin, position_ids, interleaved)
    torch.autograd.graph.increment_version(x)
    return x


def _check(q, k, cos, sin, position_ids, inplace) -> None:
    check_heads("rope", q, k)
    check_angles("rope", "q", q, tokens_of(q), q.shape[-1], cos, sin, position_ids)
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
