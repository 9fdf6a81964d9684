"""RoPE of q and k, then attention, whose backward turns dq and dk back where they are made: op, autograd, function.

The forward is `rope` and `attention`, each as it is; the kernels of the backward are attention's, which end with the
inverse rotation (`inverse_rotation`). The one op made of two others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llama_kernels.core.checks import message, shape_of
from llama_kernels.core.registry import Differentiable, needs_grad, refuse_double_backward, register
from llama_kernels.core.tensors import last_dim_contiguous
from llama_kernels.ops.attention import attention_forward, check_call, numbers_of, to_autocast
from llama_kernels.ops.attention.backward import launch_backward
from llama_kernels.ops.attention.cpu import plain_backward
from llama_kernels.ops.attention.layout import empty_grads
from llama_kernels.ops.rope import _rope as rotate
from llama_kernels.ops.rotation import Rotation, full_width, rotates_in_registers
from llama_kernels.ops.rotation_checks import check_angles, tokens_of

# --- registered op ---------------------------------------------------------------------------------------------------


def _backward_by(attention_backward: Callable[..., Any]) -> Callable[..., Any]:
    """The op by a backward of attention that takes a rotation."""

    def backward(
        do, dlse, q, k, v, out, lse, sinks, kv_start, kv_end, cos, sin, position_ids, interleaved,
        scale, softcap, left, right, need_dq, need_dk, need_dv, need_dsinks, deterministic,
    ):  # fmt: skip
        S, needed = q.shape[2], (need_dq, need_dk, need_dv, need_dsinks)
        call = (do, dlse, q, k, v, out, lse, sinks, kv_start, kv_end, None, None, S, S, scale, softcap, left, right)
        if not full_width(cos, q.shape[-1]) and rotates_in_registers(cos.shape[-1], interleaved):
            return attention_backward(*call, *needed, deterministic, Rotation(cos, sin, position_ids, interleaved))
        dq, dk, *others = attention_backward(*call, *needed, deterministic)
        if need_dq:
            dq, turned = rotate(dq, dk if need_dk else None, cos, sin, position_ids, interleaved, True)
            dk = turned if need_dk else dk
        elif need_dk:
            dk, _ = rotate(dk, None, cos, sin, position_ids, interleaved, True)
        return dq, dk, *others

    return backward


backward_kernels = _backward_by(launch_backward)

# q and k as the forward rotated them -> dq, dk, of what it was given, dv, dsinks; empty where not needed
_rope_attention_backward = register(
    "rope_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? sinks, Tensor? kv_start, Tensor? kv_end, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, "
    "float scale, float? softcap, SymInt? left, SymInt? right, "
    "bool need_dq, bool need_dk, bool need_dv, bool need_dsinks, bool? deterministic) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernel=backward_kernels,
    reference=_backward_by(plain_backward),
    fake=lambda do, dlse, q, k, v, out, lse, sinks, *rest: empty_grads(q, k, v, sinks, *rest[-5:-1]),
)


# --- autograd --------------------------------------------------------------------------------------------------------


class _RopeAttention(Differentiable):
    """(q, k, v, sinks or None) -> (out, lse, q and k as rotated). Saves these, v and sinks: nothing else is read again.

    q and k are results so that autograd knows of them: the backward depends on them, and is not to be differentiated.
    """

    @staticmethod
    def forward(
        op, deterministic, interleaved, q, k, v, sinks, kv_start, kv_end, cos, sin, position_ids, *numbers
    ):  # fmt: skip
        q, k = rotate(q, k, cos, sin, position_ids, interleaved, False)
        S = q.shape[2]
        return *attention_forward(q, k, v, sinks, kv_start, kv_end, None, None, S, S, *numbers), q, k

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.deterministic, interleaved, _, _, v, *rest = inputs
        out, lse, q, k = output
        ctx.save_for_backward(q, k, v, out, lse, *rest[:6])
        ctx.set_materialize_grads(False)
        ctx.options = (interleaved, *rest[6:])

    @staticmethod
    def backward(ctx, do, dlse, *_):
        q, k, v, out, lse, sinks, *rest = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:7]
        do = torch.zeros_like(out) if do is None else last_dim_contiguous(do)
        options = (*ctx.options, *needed, ctx.deterministic)
        grads = _rope_attention_backward(do, dlse, q, k, v, out, lse, sinks, *rest, *options)
        grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        grads = refuse_double_backward(ctx.op, grads, (do, dlse, q, k, v, sinks))
        return None, None, None, *grads, *[None] * (len(rest) + len(ctx.options) - 1)


# --- public function -------------------------------------------------------------------------------------------------


def rope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Self-attention with rotary positions: attention(*rope(q, k, cos, sin, ...), v, ...), whose gradients are rotated
    back inside of the kernels that make them.

    The forward is bit for bit that of the two calls. Their backward writes dq and dk, then reads and writes them once
    more; here each is turned in float32, where its sum lies, and rounded once instead of twice. That is so for tables
    of an angle a pair up to R = 128, where pairs are halves for R a power of two; else dq and dk are turned afterwards,
    as in separate calls.
    The backward in Gluon (`llama_kernels.hopper_attention`) turns dq where it rounds its sum, and dk afterwards: its
    consumers hold dk beside dv, and hand it out rounded.
    RoPE: Su et al., RoFormer, arXiv 2104.09864; attention as in `attention`.

    Args:
        q: (B, Hq, S, D), not rotated; bfloat16, float16 or float32. Any strides; a last dimension that is not
            contiguous is copied. Under autocast q, k and v are cast to its dtype.
        k, v: (B, Hkv, S, D) and (B, Hkv, S, Dv), of q's dtype, Hq a multiple of Hkv. As many tokens as q: one position
            a token. What attends to a cache takes `rope`, or `rope_into_cache`, and `attention`.
        cos, sin, position_ids, interleaved: as in `rope`.
        Others as in `attention`.

    Returns:
        out, (B, Hq, S, Dv) in q's dtype and memory order; with return_lse also lse, (B, Hq, S) float32.

    Raises:
        TypeError, ValueError: as `attention` and `rope`; also where k has another number of tokens than q.
    """
    op = "rope_attention"
    q, k, v = to_autocast(q, k, v)
    check_call(op, q, k, v, 4, window_size, softcap, scale, sinks, kv_start, kv_end, deterministic)
    if k.shape[2] != q.shape[2]:
        wanted = f"{q.shape[2]} tokens, as q has: both are rotated by the same positions"
        fix = "Rotate them apart with llama_kernels.rope, then call llama_kernels.attention."
        raise ValueError(message(op, "k", shape_of(k), wanted, fix))
    check_angles(op, "q", q, tokens_of(q), q.shape[-1], cos, sin, position_ids)
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    sinks = None if sinks is None else sinks.contiguous()
    numbers = numbers_of(q, is_causal, scale, window_size, softcap)
    if needs_grad(q, k, v, sinks):
        tensors = (q, k, v, sinks, kv_start, kv_end, cos, sin, position_ids)
        out, lse, *_ = _RopeAttention.call(op, deterministic, interleaved, *tensors, *numbers)
    else:
        q, k = rotate(q, k, cos, sin, position_ids, interleaved, False)
        out, lse = attention_forward(q, k, v, sinks, kv_start, kv_end, None, None, q.shape[2], k.shape[2], *numbers)
    return (out, lse) if return_lse else out
