"""RoPE of q and k, of a packed projection, and of tokens that are written into a cache. One kernel computes all three.

Each pair (x0, x1) of a head becomes (x0 cos - x1 sin, x1 cos + x0 sin). The backward rotates the gradients by the
transpose of the rotation, so it saves nothing but the tables of cos and sin, and is the same kernel.

rotation.py has the device code of pairs and angles, rotation_checks.py the checks of arguments. The sections are those
of rms_norm.py. Four ops are registered: `rope`; `rope_`, in place; `rope_qkv_backward`; and `rope_into_cache`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llama_kernels.core.autograd import Differentiable, needs_grad, save, transforms_are_active
from llama_kernels.core.checks import check_flag, check_tensors, is_integer, message, shape_of
from llama_kernels.core.device import lanes_of
from llama_kernels.core.language import cast, tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.registry import register, register_gradient
from llama_kernels.core.tensors import (
    cdiv,
    dense_in_order_of,
    empty_in_order_of,
    last_dim_contiguous,
    optional_strides_of,
    sizes_of,
)
from llama_kernels.ops.cpu_rotation import rotate_on_cpu, write_into_cache
from llama_kernels.ops.rotation import (
    Axes,
    HeadTensor,
    Rotation,
    Tables,
    head_tile,
    load_angles,
    load_pairs,
    pairs_of,
    rotate,
    row_strides,
    store_pairs,
    token_ptrs,
)
from llama_kernels.ops.rotation_checks import (
    check_angles,
    check_caches,
    check_heads,
    check_rows,
    check_writable,
    tokens_of,
)
from llama_kernels.reference.rope import OptionalTensor

# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit
def _rotate_heads(
    x, y, b, s, t, live, angles, H,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INPLACE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rotate every head of the tokens (b, s) of x, and store it as token (b, t) of y. x, y: `HeadTensor`.

    Elements past the rotated width are copied. HALF = 0: all are.
    """
    dtype: tl.constexpr = y.ptr.dtype.element_ty
    x_tokens, y_tokens = token_ptrs(x, b, s), token_ptrs(y, b, t)  # [BLOCK_T, 1]
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        present = live[:, None] & (h < H)[None, :]
        x_vectors = x_tokens + h.to(tl.int64)[None, :] * x.strides[1]  # [BLOCK_T, BLOCK_H]
        y_vectors = y_tokens + h.to(tl.int64)[None, :] * y.strides[1]
        if HALF:
            x0, x1 = load_pairs(x_vectors, present, HALF, INTERLEAVED, BLOCK_R)  # [BLOCK_T, BLOCK_H, BLOCK_R]
            y0, y1 = rotate(x0, x1, angles)
            store_pairs(y_vectors, present, cast(y0, dtype), cast(y1, dtype), HALF, INTERLEAVED, BLOCK_R)
        if not INPLACE:
            for d0 in range(2 * HALF, D, 2 * BLOCK_R):
                d = d0 + tl.arange(0, 2 * BLOCK_R)
                mask = present[:, :, None] & (d < D)[None, None, :]
                rest = tl.load(x_vectors[:, :, None] + d[None, None, :], mask=mask, other=0.0)
                tl.store(y_vectors[:, :, None] + d[None, None, :], rest, mask=mask)


@triton.jit(do_not_specialize=["S", "Hq", "Hkv", "positions", "axes_count", "slots"])
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, cos_ptr, sin_ptr, position_ids_ptr, axes_ptr, slots_ptr,
    q_strides, k_strides, v_strides, q_out_strides, k_out_strides, v_out_strides,
    cos_strides, sin_strides, position_strides, axes_strides, slot_strides,
    S, Hq, Hkv, positions, axes_count, slots,
    D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, INPLACE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(y0, y1) = (x0 cos - x1 sin, x1 cos + x0 sin) for every pair of every head of q and of k.

    A program rotates all heads of BLOCK_T tokens of one sequence, in float32, and rounds once. q, k: (B, H, S, D); k
    may be None. `Tables`, `Axes` and `load_angles` describe the tables. INVERSE rotates by the transpose, as the
    backward does.
    v (B, Hkv, S, DV) is copied where it is given. With slots_ptr, (B, S), the outputs of k and v are caches of `slots`
    tokens: token s is written as token slots_ptr[b, s] of them, or dropped if they have no such token.
    Bytes: q, k and v in and out, and each table row once for all heads. FLOPs: 3 per element.
    """
    blocks = tl.cdiv(S, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    live = s < S
    tables = Tables(cos_ptr, sin_ptr, position_ids_ptr, cos_strides, sin_strides, position_strides, positions)
    axes = None
    if axes_ptr is not None:
        axes = Axes(axes_ptr, axes_strides[0], axes_strides[1], axes_count)
    angles = load_angles(tables, axes, b, s, live, HALF, FULL, INTERLEAVED, INVERSE, BLOCK_R)
    _rotate_heads(
        HeadTensor(q_ptr, q_strides), HeadTensor(q_out_ptr, q_out_strides), b, s, s, live, angles, Hq,
        D, HALF, INTERLEAVED, INPLACE, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    t = s
    if slots_ptr is not None:
        t = tl.load(slots_ptr + b * slot_strides[0] + s * slot_strides[1], mask=live, other=-1).to(tl.int64)
        live = (t >= 0) & (t < slots)
    if k_ptr is not None:
        _rotate_heads(
            HeadTensor(k_ptr, k_strides), HeadTensor(k_out_ptr, k_out_strides), b, s, t, live, angles, Hkv,
            D, HALF, INTERLEAVED, INPLACE, BLOCK_H, BLOCK_R,
        )  # fmt: skip
    if v_ptr is not None:
        _rotate_heads(
            HeadTensor(v_ptr, v_strides), HeadTensor(v_out_ptr, v_out_strides), b, s, t, live, angles, Hkv,
            DV, HALF=0, INTERLEAVED=INTERLEAVED, INPLACE=False, BLOCK_H=BLOCK_H, BLOCK_R=BLOCK_R,
        )  # fmt: skip


# --- launcher --------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """The parameters of the op `rope`: q, k, and the fields of `Rotation`."""

    q: torch.Tensor
    k: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    position_ids: torch.Tensor | None
    interleaved: bool
    inverse: bool
    axes: torch.Tensor | None = None

    @property
    def rotation(self) -> Rotation:
        return Rotation(self.cos, self.sin, self.position_ids, self.interleaved, self.inverse, self.axes)


class _Heads(NamedTuple):
    """Heads of the same tokens."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None = None


@cached_launch
def _launch_rope(
    call: _Call, outs: _Heads, v: torch.Tensor | None = None, slots: torch.Tensor | None = None
) -> list[Launch]:
    """The launch that rotates q and k into `outs`, which are q and k themselves to rotate in place.

    v: copied to outs.v. slots: (B, S) or (S,), the place of each token in outs.k and outs.v, which are caches then.
    """
    q, k, rotation = call.q, call.k, call.rotation
    B, Hq, S = sizes_of(q)
    Hkv = Hq if k is None else sizes_of(k)[1]
    if not B * S * max(Hq, Hkv):
        return []
    rotation.require_rows(S)
    pairs = pairs_of(call.cos, q.shape[-1])
    tile = head_tile(pairs["HALF"], max(min(Hq, Hkv), 1), lanes_of(q.device))
    heads = (q, k, v, outs.q, None if k is None else outs.k, outs.v)
    args = (
        *heads, *rotation.tensors_and_axes, slots,
        *map(optional_strides_of, heads), *rotation.strides_and_axes, row_strides(slots),
        S, Hq, Hkv, rotation.positions, rotation.positions_of_token, None if slots is None else sizes_of(outs.k)[2],
    )  # fmt: skip
    options = {
        "D": q.shape[-1], "DV": None if v is None else v.shape[-1], **pairs, **tile._asdict(),
        "INTERLEAVED": call.interleaved, "INVERSE": call.inverse, "INPLACE": outs.q is q,
    }  # fmt: skip
    return [Launch(_rope_kernel, (B * cdiv(S, tile.BLOCK_T),), args, options)]


# --- registered ops --------------------------------------------------------------------------------------------------


def _fake(call):
    return empty_in_order_of(call.q), call.q.new_empty(0) if call.k is None else empty_in_order_of(call.k)


def _rotated(call):
    outs = _fake(call)
    _launch_rope(call, _Heads(*outs))
    return outs


def _rotated_on_cpu(call):
    q, k = rotate_on_cpu(call.rotation, call.q, call.k)
    return dense_in_order_of(call.q, q), q.new_empty(0) if k is None else dense_in_order_of(call.k, k)


def _rotate_in_place(q, k, cos, sin, position_ids, interleaved, axes=None):
    _launch_rope(_Call(q, k, cos, sin, position_ids, interleaved, False, axes), _Heads(q, k))


def _rotate_in_place_on_cpu(q, k, cos, sin, position_ids, interleaved, axes=None):
    rotated = rotate_on_cpu(Rotation(cos, sin, position_ids, interleaved, axes=axes), q, k)
    for x, y in zip((q, k), rotated, strict=True):
        if x is not None:
            x.copy_(y)


# -> q, k (empty without k)
run_rope = register(
    "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse, "
    "Tensor? axes=None) -> (Tensor, Tensor)",
    call=_Call,
    kernel=_rotated,
    reference=_rotated_on_cpu,
    fake=_fake,
)
_rope_inplace = register(
    "rope_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, "
    "Tensor? axes=None) -> ()",
    kernel=_rotate_in_place,
    reference=_rotate_in_place_on_cpu,
    fake=lambda *_: None,
)


def _parts(qkv: torch.Tensor, q_heads: int, kv_heads: int) -> _Heads:
    """q, k and v as views of a packed projection: (B, H, S, D) or (T, H, D)."""
    count = q_heads + 2 * kv_heads
    heads = qkv.view(*qkv.shape[:-1], count, qkv.shape[-1] // count)
    heads = heads.transpose(1, 2) if qkv.ndim == 3 else heads
    k, v = (heads.narrow(1, first, kv_heads) for first in (q_heads, q_heads + kv_heads))
    return _Heads(heads.narrow(1, 0, q_heads), k, v)


def _packed_fake(dq, dk, dv, *rotation):
    tokens = (dq.shape[0], dq.shape[2]) if dq.ndim == 4 else (dq.shape[0],)
    return dq.new_empty((*tokens, (dq.shape[1] + dk.shape[1] + dv.shape[1]) * dq.shape[-1]))


def _packed_backward(dq, dk, dv, cos, sin, position_ids, interleaved, axes=None):
    dqkv = _packed_fake(dq, dk, dv)
    _launch_rope(
        _Call(dq, dk, cos, sin, position_ids, interleaved, True, axes), _parts(dqkv, dq.shape[1], dk.shape[1]), dv
    )
    return dqkv


def _packed_backward_on_cpu(dq, dk, dv, cos, sin, position_ids, interleaved, axes=None):
    rotation = Rotation(cos, sin, position_ids, interleaved, inverse=True, axes=axes)
    heads = torch.cat((*rotate_on_cpu(rotation, dq, dk), dv), 1)
    return _packed_fake(dq, dk, dv).copy_((heads.transpose(1, 2) if dq.ndim == 4 else heads).flatten(-2))


_rope_qkv_backward = register(
    "rope_qkv_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor? position_ids, "
    "bool interleaved, Tensor? axes=None) -> Tensor",
    kernel=_packed_backward,
    reference=_packed_backward_on_cpu,
    fake=_packed_fake,
)


def _into_cache(q, k, v, k_cache, v_cache, cache_position, cos, sin, position_ids, interleaved, axes=None):
    q_out = empty_in_order_of(q)
    call, outs = _Call(q, k, cos, sin, position_ids, interleaved, False, axes), _Heads(q_out, k_cache, v_cache)
    _launch_rope(call, outs, v, cache_position)
    return q_out


def _into_cache_on_cpu(q, k, v, k_cache, v_cache, cache_position, cos, sin, position_ids, interleaved, axes=None):
    q_out, k_out = rotate_on_cpu(Rotation(cos, sin, position_ids, interleaved, axes=axes), q, k)
    write_into_cache(k_cache, k_out, cache_position)
    write_into_cache(v_cache, v, cache_position)
    return dense_in_order_of(q, q_out)


_rope_into_cache = register(
    "rope_into_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_position, "
    "Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, Tensor? axes=None) -> Tensor",
    kernel=_into_cache,
    reference=_into_cache_on_cpu,
    fake=lambda q, *_: empty_in_order_of(q),
)


# --- autograd --------------------------------------------------------------------------------------------------------


def _save(ctx: Any, rotation: Rotation) -> None:
    ctx.interleaved, ctx.inverse = rotation.interleaved, rotation.inverse
    save(ctx, *rotation.tensors_and_axes)


def _saved(ctx: Any) -> Rotation:
    """What `_save` saved. The backward takes its transpose."""
    cos, sin, position_ids, axes = ctx.saved_tensors
    return Rotation(cos, sin, position_ids, ctx.interleaved, ctx.inverse, axes)


def _rotate_given(op: str, heads: Any, rotation: Rotation) -> list[Any]:
    """`heads`, gradients or tangents of q and k, rotated; None for one that is None. The results are differentiable."""
    given = [last_dim_contiguous(x) for x in heads if x is not None]
    if not given:
        return [*heads]
    first, second = (*given, None)[:2]
    if needs_grad(*given) and not torch.compiler.is_compiling():
        rotated = iter(_Rope.call(op, first, second, *rotation))
    else:
        rotated = iter(run_rope(first, second, *rotation))
    return [None if x is None else next(rotated) for x in heads]


class _Rope(Differentiable):
    """A `_Call` -> the rotated q and k, or q alone. Saves the tables only: the backward rotates the gradients."""

    TANGENT_INPUTS = 2  # q and k

    @staticmethod
    def forward(op, q, k, *rotation):
        q_out, k_out = run_rope(q, k, *rotation)
        return (q_out,) if k is None else (q_out, k_out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, _, _, *rotation = inputs
        _save(ctx, Rotation(*rotation))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dq, dk=None):
        need_q, need_k = ctx.needs_input_grad[1:3]
        grads = (dq if need_q else None, dk if need_k else None)
        return None, *_rotate_given(ctx.op, grads, _saved(ctx).transposed), *[None] * len(Rotation._fields)

    @staticmethod
    def jvp(ctx, tq, tk):
        rotated = _rotate_given(ctx.op, (tq, tk), _saved(ctx))
        return [x for x in rotated if x is not None]


register_gradient("rope", ("q", "k"), by=lambda q, *rest: (*_Rope.call("rope", q, *rest), q.new_empty(0))[:2])


class _RotatedInPlace(torch.autograd.Function):
    """Tells autograd that x is rotated in place.

    It takes one tensor, not q and k: a Function that modifies a view may return nothing else, and q and k usually are
    views of their projections.
    """

    @staticmethod
    def forward(ctx, x, *rotation):
        _save(ctx, Rotation(*rotation))
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, dx):
        return *_rotate_given("rope", (dx,), _saved(ctx).transposed), *[None] * len(Rotation._fields)


def _declare_rotated(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Tell autograd that x will be rotated in place, which raises where autograd does not allow it. Returns x."""
    return _RotatedInPlace.apply(x, *rotation) if needs_grad(x) else x


def _zeros_where_unused(grads: Any, q_heads: int, kv_heads: int) -> list[torch.Tensor]:
    """The gradients of q, k and v, with zeros in place of None.

    PyTorch would make a plain tensor of zeros, also where the others are DTensors.
    """
    given = next(dx for dx in grads if dx is not None)
    B, _, *others = given.shape
    pairs = zip(grads, (q_heads, kv_heads, kv_heads), strict=True)
    return [given.new_zeros((B, H, *others)) if dx is None else dx for dx, H in pairs]


class _RopeQKV(Differentiable):
    """qkv -> q and k rotated, and v as a view. The backward is one launch, which writes the gradient of qkv."""

    TANGENT_INPUTS = 1  # qkv

    @staticmethod
    def forward(op, qkv, q_heads, kv_heads, *rotation):
        q, k, v = _parts(qkv, q_heads, kv_heads)
        return *run_rope(q, k, *rotation), v

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, _, q_heads, kv_heads, *rotation = inputs
        ctx.heads = (q_heads, kv_heads)
        _save(ctx, Rotation(*rotation))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        if all(dx is None for dx in grads):
            return (None,) * (4 + len(Rotation._fields))
        grads = _zeros_where_unused(grads, *ctx.heads)
        rotation = _saved(ctx).transposed
        if needs_grad(*grads) and not torch.compiler.is_compiling():  # the gradient may be differentiated again
            dq, dk, dv = grads
            heads = torch.cat((*_rotate_given(ctx.op, (dq, dk), rotation), dv), 1)
            dqkv = (heads.transpose(1, 2) if dq.ndim == 4 else heads).flatten(-2)
        else:
            cos, sin, position_ids, interleaved, _, axes = rotation
            grads = map(last_dim_contiguous, grads)
            dqkv = _rope_qkv_backward(*grads, cos, sin, position_ids, interleaved, axes)
        return None, dqkv, *[None] * (2 + len(Rotation._fields))  # op, qkv, two numbers of heads, rotation

    @staticmethod
    def jvp(ctx, tqkv):
        tq, tk, tv = _parts(tqkv, *ctx.heads)
        return *_rotate_given(ctx.op, (tq, tk), _saved(ctx)), tv


# --- public functions ------------------------------------------------------------------------------------------------


def rope(
    q: torch.Tensor,
    k: OptionalTensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    axes: torch.Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, OptionalTensor]:
    """Rotary position embedding of q and k, in one launch.

    Each pair (x_i, x_j) of a head is rotated by an angle that depends on the token's position:
    y_i = x_i cos - x_j sin and y_j = x_j cos + x_i sin. Computed in float32 and rounded once. Su et al., RoFormer,
    arXiv 2104.09864.

    Args:
        q: (B, Hq, S, D) or packed (T, Hq, D), bfloat16, float16 or float32. Any strides; a last dimension that is not
            contiguous is copied.
        k: likewise with Hkv heads, or None.
        cos, sin: tables of cosines and sines, in bfloat16, float16, float32 or float64, read as float32. Any strides.
            They get no gradient. An attention factor, where the scaling has one, is part of them. R is the number of
            elements of a head that rotate, even and at most D; the elements from R on are copied.
            (positions, R/2): one row per position. (B, S, R/2) or (1, S, R/2): one row per token; then there are no
            position_ids. `rope_tables` makes both.
            With R columns in place of R/2, as Hugging Face's tables have, there is one angle per element of a pair:
            y_i = x_i cos_i - x_j sin_i and y_j = x_j cos_j + x_i sin_j. Tables are read so if they are wider than D/2.
            Where R <= D/2, pass cos[..., : R // 2] of such tables, or cos[..., ::2] if interleaved.
        position_ids: the table row of each token, (S,), (B, S), (1, S) or packed (T,), any integer dtype. None: 0 to
            S - 1. Values outside the table are clamped into it; inside `llama_kernels.checked` they raise an error.
            With `axes`, A positions per token: (A, B, S), (A, 1, S) or packed (A, T).
        axes: for M-RoPE and 2-D RoPE, (R/2,) or (R,), any integer dtype: which of the A positions of a token gives the
            angle in each column of cos and sin. `rope_axes` makes it. It needs position_ids and tables with one row per
            position. Values outside 0 to A - 1 are clamped, as position_ids are.
        interleaved: whether pairs are (2i, 2i + 1), as in Meta's original weights, or (i, i + R/2), as in Hugging
            Face's.
        inplace: write into q and k and return them. Neither may be a leaf that requires grad, or expanded. They may be
            views of one tensor, such as a projection, if no element is in both.

    Returns:
        q and k rotated, of the same shape, dtype and memory order; k is None where it was None.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of those above.
        ValueError: shapes do not fit, a table is too short or requires grad, devices differ, or q or k cannot be
            written in place.
    """
    check_flag("rope", "interleaved", interleaved)
    check_flag("rope", "inplace", inplace)
    check_heads("rope", q, k)
    check_angles("rope", "q", q, tokens_of(q), q.shape[-1], cos, sin, position_ids, axes)
    q_out: Any
    k_out: Any
    if inplace:
        check_writable("rope", q=q, k=k)
    if inplace and not (torch.compiler.is_compiling() or transforms_are_active()):
        # First what autograd may refuse, such as a view made by split(), then the launch that overwrites q and k.
        rotation = Rotation(cos, sin, position_ids, interleaved, False, axes)
        q_out, k_out = _declare_rotated(q, rotation), None if k is None else _declare_rotated(k, rotation)
        given = (q_out.detach(), None if k is None else k_out.detach())
        _rope_inplace(*given, cos, sin, position_ids, interleaved, axes)
        return q_out, k_out
    q_, k_ = last_dim_contiguous(q), None if k is None else last_dim_contiguous(k)
    if needs_grad(q, k):
        q_out, k_out = (*_Rope.call("rope", q_, k_, cos, sin, position_ids, interleaved, False, axes), None)[:2]
    else:
        q_out, k_out = run_rope(q_, k_, cos, sin, position_ids, interleaved, False, axes)
    if inplace:  # compilers and transforms see through this copy, not through a Function that modifies its input
        q.copy_(q_out)
        if k is not None:
            k.copy_(k_out)
        return q, k
    return q_out, k if k is None else k_out


def rope_qkv(
    qkv: torch.Tensor,
    q_heads: int,
    kv_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    axes: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotary position embedding of a packed projection: returns q and k rotated, and v as a view of `qkv`.

    One launch forward and one backward. The backward writes the gradients of q, k and v into the gradient of `qkv`;
    after separate calls, autograd would copy them together.

    Args:
        qkv: (B, S, (q_heads + 2 kv_heads) D), or packed (T, (q_heads + 2 kv_heads) D): the heads of q, then those of k,
            then those of v. bfloat16, float16 or float32. A last dimension that is not contiguous is copied.
        q_heads, kv_heads: the number of heads of q, and of k and v each.
        cos, sin, position_ids, axes, interleaved: as in `rope`.

    Returns:
        q (B, q_heads, S, D), k and v (B, kv_heads, S, D), in the memory order of (B, S, H, D); packed, (T, H, D). v
        shares the memory of `qkv`: do not change it in place.

    Raises:
        TypeError, ValueError: as `rope`; also if the last dimension is not a multiple of q_heads + 2 kv_heads.
    """
    check_tensors("rope_qkv", qkv=qkv)
    check_flag("rope_qkv", "interleaved", interleaved)
    for name, heads in (("q_heads", q_heads), ("kv_heads", kv_heads)):
        if not is_integer(heads) or heads < 1:
            raise ValueError(message("rope_qkv", name, repr(heads), "a number of heads, at least 1"))
    heads = q_heads + 2 * kv_heads
    if qkv.ndim not in (2, 3) or qkv.shape[-1] % heads:
        wanted = f"(B, S, {heads} D), or (T, {heads} D) where tokens are packed: {q_heads} + 2 * {kv_heads} heads"
        raise ValueError(message("rope_qkv", "qkv", shape_of(qkv), wanted))
    tokens = (qkv.shape[0], qkv.shape[1]) if qkv.ndim == 3 else (None, qkv.shape[0])
    check_angles("rope_qkv", "qkv", qkv, tokens, qkv.shape[-1] // heads, cos, sin, position_ids, axes)
    qkv = last_dim_contiguous(qkv)
    if needs_grad(qkv):
        q, k, v = _RopeQKV.call("rope_qkv", qkv, q_heads, kv_heads, cos, sin, position_ids, interleaved, False, axes)
        return q, k, v
    q, k, v = _parts(qkv, q_heads, kv_heads)
    q, k = run_rope(q, k, cos, sin, position_ids, interleaved, False, axes)
    return q, k, v


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
    axes: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """RoPE of a decoding step in one launch: returns q rotated, and writes k rotated and v to their cache positions.

    Separate calls take three launches and write k twice. For inference: there are no gradients.

    Args:
        q, k, v: the new tokens, (B, Hq, S, D), (B, Hkv, S, D) and (B, Hkv, S, Dv), bfloat16, float16 or float32.
        k_cache, v_cache: (B, Hkv, L, D) and (B, Hkv, L, Dv), in the dtype of k and v, with any strides and a contiguous
            last dimension. They are written in place. They may be views of one tensor if no element is in both, and
            share no element with q, k and v.
        cache_position: where in the caches each token goes, (S,), (1, S) or (B, S), any integer dtype. A token whose
            position is outside the cache is dropped; `llama_kernels.checked` makes it an error. If two tokens have the
            same position, either may stay.
        cos, sin, axes, interleaved: as in `rope`.
        position_ids: the table row of each token. None: `cache_position`, or the token's own row where cos and sin have
            one row per token. With `axes`, A positions per token, (A, B, S) or (A, 1, S).

    Returns:
        q rotated, in its shape, dtype and memory order.

    Raises:
        TypeError, ValueError: as `rope`; also if a cache does not fit, or a tensor requires grad.
    """
    op = "rope_into_cache"
    check_flag(op, "interleaved", interleaved)
    check_caches(op, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    tokens = tokens_of(q)
    check_rows(op, "cache_position", cache_position, "q", q, tokens, k_cache.shape[2], "positions of the cache")
    if position_ids is None and axes is None and isinstance(cos, torch.Tensor) and cos.ndim == 2:
        position_ids = cache_position
    check_angles(op, "q", q, tokens, q.shape[-1], cos, sin, position_ids, axes)
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    return _rope_into_cache(q, k, v, k_cache, v_cache, cache_position, cos, sin, position_ids, interleaved, axes)
