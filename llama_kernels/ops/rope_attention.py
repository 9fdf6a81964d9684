"""RoPE of q and k, then attention. It is the one op that is made of two others.

The forward calls `rope` and `attention`. The backward is that of attention, whose kernels apply the inverse rotation to
dq and dk before they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from llama_kernels.core.autograd import Differentiable, needs_grad, refuse_double_backward
from llama_kernels.core.checks import check_flag, message, shape_of
from llama_kernels.core.registry import register
from llama_kernels.core.tensors import last_dim_contiguous
from llama_kernels.ops.attention.backward import MOST_COLUMNS, launch_backward
from llama_kernels.ops.attention.call import AttentionCall, Results, Wanted, empty_grads
from llama_kernels.ops.attention.checks import checked_call
from llama_kernels.ops.attention.cpu import plain_backward
from llama_kernels.ops.attention.flops import count_flops
from llama_kernels.ops.attention.op import attention_forward
from llama_kernels.ops.rope import run_rope
from llama_kernels.ops.rotation import Rotation, full_width, rotates_in_registers
from llama_kernels.ops.rotation_checks import check_angles, tokens_of
from llama_kernels.reference.attention import AttentionOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

# --- registered op ---------------------------------------------------------------------------------------------------


def _rope_backward_by(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` as a function of the arguments of `rope_attention_backward`, by position."""

    def backward(
        do, dlse, q, k, v, out, lse, sinks, kv_start, kv_end, cos, sin, position_ids, interleaved,
        scale, softcap, left, right, need_dq, need_dk, need_dv, need_dsinks, deterministic, kv_prefix=None, axes=None,
    ):  # fmt: skip
        sequences = (None, None, q.shape[2], k.shape[2])
        call = AttentionCall(
            q, k, v, sinks, kv_start, kv_end, *sequences, scale, softcap, left, right, kv_prefix=kv_prefix
        )
        wanted = Wanted(need_dq, need_dk, need_dv, need_dsinks, deterministic)
        rotation = Rotation(cos, sin, position_ids, interleaved, axes=axes)
        return run(call, Results(out, lse, do, dlse), wanted, rotation)

    return backward


def _rotating(run: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """`run`, a backward of attention, as a backward of rotated attention.

    The kernels apply the inverse rotation where they can. Otherwise dq and dk are rotated in another launch.
    """

    def backward(call: AttentionCall, results: Results, wanted: Wanted, rotation: Rotation) -> tuple[torch.Tensor, ...]:
        cos = rotation.cos
        rotation.require_rows(call.q.shape[-2])
        half_width = cos is not None and not full_width(cos, call.q.shape[-1])
        can_rotate = half_width and rotation.axes is None
        in_registers = can_rotate and rotates_in_registers(rotation.half, rotation.interleaved)
        if in_registers and call.q.shape[-1] <= MOST_COLUMNS:
            return run(call, results, wanted, rotation)
        dq, dk, *others = run(call, results, wanted)
        if wanted.dq and wanted.dk:
            dq, dk = run_rope(dq, dk, *rotation.transposed)
        elif wanted.dq:
            dq, _ = run_rope(dq, None, *rotation.transposed)
        elif wanted.dk:
            dk, _ = run_rope(dk, None, *rotation.transposed)
        return dq, dk, *others

    return backward


# q and k as the forward rotated them -> dq and dk of q and k before that, dv, dsinks; without elements where not needed
_rope_attention_backward = register(
    "rope_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? sinks, Tensor? kv_start, Tensor? kv_end, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, "
    "float scale, float? softcap, SymInt? left, SymInt? right, "
    "bool need_dq, bool need_dk, bool need_dv, bool need_dsinks, bool? deterministic, "
    "Tensor? kv_prefix=None, Tensor? axes=None) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_rope_backward_by(_rotating(launch_backward)),
    reference=_rope_backward_by(_rotating(plain_backward)),
    fake=_rope_backward_by(lambda call, results, wanted, rotation: empty_grads(call, wanted)),
)
count_flops("rope_attention_backward", products_of_D=3, products_of_Dv=2)  # as attention_backward


# --- autograd --------------------------------------------------------------------------------------------------------


_BEFORE_Q = ("op", "deterministic", *Rotation._fields)  # arguments of the Function


class _RopeAttention(Differentiable):
    """The fields of a Rotation and of an AttentionCall -> (out, lse, q and k after the rotation).

    q and k are results, so that autograd knows that the backward depends on them, and refuses to differentiate it.
    """

    @staticmethod
    def forward(op, deterministic, cos, sin, position_ids, interleaved, inverse, axes, q, k, *others):
        q, k = run_rope(q, k, cos, sin, position_ids, interleaved, inverse, axes)
        return *attention_forward(q, k, *others), q, k

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.deterministic, cos, sin, position_ids, ctx.interleaved, _, axes, *fields = inputs
        call = AttentionCall(*fields)
        out, lse, q, k = output
        ctx.numbers = (call.scale, call.softcap, call.left, call.right)
        bounds = (call.kv_prefix, call.kv_start, call.kv_end)
        ctx.save_for_backward(q, k, call.v, out, lse, call.sinks, axes, *bounds, cos, sin, position_ids)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse, *_):
        q, k, v, out, lse, sinks, axes, kv_prefix, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad[len(_BEFORE_Q) :][:4]  # of q, k, v and sinks
        do = torch.zeros_like(out) if do is None else last_dim_contiguous(do)
        grads = _rope_attention_backward(
            do, dlse, q, k, v, out, lse, sinks, *others, ctx.interleaved, *ctx.numbers, *needed, ctx.deterministic,
            kv_prefix, axes,
        )  # fmt: skip
        grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        grads = refuse_double_backward(ctx.op, grads, (do, dlse, q, k, v, sinks))
        return *[None] * len(_BEFORE_Q), *grads, *[None] * (len(AttentionCall._fields) - len(grads))


# --- public function -------------------------------------------------------------------------------------------------


@overload
def rope_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    position_ids: torch.Tensor | None = None, *, return_lse: Literal[False] = False,
    axes: torch.Tensor | None = None, interleaved: bool = False, **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...  # fmt: skip


@overload
def rope_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    position_ids: torch.Tensor | None = None, *, return_lse: Literal[True],
    axes: torch.Tensor | None = None, interleaved: bool = False, **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def rope_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    position_ids: torch.Tensor | None = None, *, return_lse: bool,
    axes: torch.Tensor | None = None, interleaved: bool = False, **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def rope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    axes: torch.Tensor | None = None,
    interleaved: bool = False,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    kv_prefix: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Self-attention with rotary positions: attention(*rope(q, k, cos, sin, ...), v, ...), with a faster backward.

    The forward is bit for bit that of the two calls. The backward of two calls writes dq and dk, then reads them and
    writes them again, rotated. Here the kernels that compute dq and dk apply the inverse rotation to the float32 sums,
    which are rounded once instead of twice. This needs D <= 512, tables with one angle per pair, R <= 128, R a power
    of two unless the pairs are interleaved, and no axes; otherwise dq and dk are rotated in a second step, as in two
    calls. The Hopper backward (`llama_kernels.hopper_attention`) rotates dq where it rounds its sum, and dk in a second
    step. RoPE: Su et al., RoFormer, arXiv 2104.09864; attention as in `attention`.

    Args:
        q: (B, Hq, S, D), not rotated; bfloat16, float16 or float32. Any strides; a last dimension that is not
            contiguous is copied. Under autocast q, k and v are cast to its dtype.
        k, v: (B, Hkv, S, D) and (B, Hkv, S, Dv), of q's dtype. Hq is a multiple of Hkv. k has as many tokens as q, at
            the same positions. To attend to a cache, call `rope` or `rope_into_cache`, then `attention`.
        cos, sin, position_ids, axes, interleaved: as in `rope`.
        Others: as in `attention`.

    Returns:
        out, (B, Hq, S, Dv) in q's dtype and memory order; with return_lse also lse, (B, Hq, S) float32.

    Raises:
        TypeError, ValueError: As `attention` and `rope`; also where k has another number of tokens than q.
    """
    op = "rope_attention"
    check_flag(op, "interleaved", interleaved)
    check_flag(op, "return_lse", return_lse)
    call = checked_call(
        op, q, k, v, is_causal=is_causal, scale=scale, window_size=window_size, softcap=softcap, sinks=sinks,
        kv_start=kv_start, kv_end=kv_end, kv_prefix=kv_prefix, deterministic=deterministic,
    )  # fmt: skip
    q, k, *others = call
    if k.shape[2] != q.shape[2]:
        wanted = f"{q.shape[2]} tokens, as q has: both are rotated by the same positions"
        fix = "Rotate them apart with llama_kernels.rope, then call llama_kernels.attention."
        raise ValueError(message(op, "k", shape_of(k), wanted, fix))
    check_angles(op, "q", q, tokens_of(q), q.shape[-1], cos, sin, position_ids, axes)
    rotation = Rotation(cos, sin, position_ids, interleaved, False, axes)
    if needs_grad(q, k, call.v, call.sinks):
        out, lse, *_ = _RopeAttention.call(op, deterministic, *rotation, *call)
    else:
        out, lse = attention_forward(*run_rope(q, k, *rotation), *others)
    return (out, lse) if return_lse else out
