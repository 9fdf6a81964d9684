"""The registered ops of attention, and their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llama_kernels.core.autograd import Differentiable, needs_grad, refuse_double_backward
from llama_kernels.core.registry import register, register_gradient
from llama_kernels.core.tensors import last_dim_contiguous
from llama_kernels.ops.attention.backward import launch_backward
from llama_kernels.ops.attention.call import AttentionCall, Results, Wanted, empty_grads, empty_outputs
from llama_kernels.ops.attention.cpu import plain_backward, plain_forward
from llama_kernels.ops.attention.flops import count_flops
from llama_kernels.ops.attention.forward import launch_forward

# The fields of AttentionCall after v, but for out_dtype and kv_prefix, which have defaults. Dense calls have no
# cu_seqlens; there longest_q is Sq and longest_k is Sk.
_OPTIONS = (
    "Tensor? sinks, Tensor? kv_start, Tensor? kv_end, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt longest_q, SymInt longest_k, float scale, float? softcap, SymInt? left, SymInt? right"
)


def _backward_by(run: Callable[[AttentionCall, Results, Wanted], Any]) -> Callable[..., Any]:
    """`run` as a function of the arguments of `attention_backward`, by position."""

    def backward(
        do, dlse, q, k, v, out, lse, sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k,
        scale, softcap, left, right, need_dq, need_dk, need_dv, need_dsinks, deterministic, grad_dtype=None,
        kv_prefix=None,
    ):  # fmt: skip
        call = AttentionCall(
            q, k, v, sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k,
            scale, softcap, left, right, kv_prefix=kv_prefix,
        )  # fmt: skip
        wanted = Wanted(need_dq, need_dk, need_dv, need_dsinks, deterministic, grad_dtype)
        return run(call, Results(out, lse, do, dlse), wanted)

    return backward


# -> out in out_dtype, by default q's; lse in float32
attention_forward = register(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}, ScalarType? out_dtype=None, Tensor? kv_prefix=None) "
    "-> (Tensor, Tensor)",
    call=AttentionCall,
    kernel=launch_forward,
    reference=plain_forward,
    fake=empty_outputs,
)
# -> dq, dk and dv in grad_dtype, by default q's, and dsinks; without elements where not needed
attention_backward = register(
    f"attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool need_dq, bool need_dk, bool need_dv, bool need_dsinks, bool? deterministic, ScalarType? grad_dtype=None, "
    "Tensor? kv_prefix=None) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_by(launch_backward),
    reference=_backward_by(plain_backward),
    fake=_backward_by(lambda call, results, wanted: empty_grads(call, wanted)),
)
count_flops("attention_forward", products_of_D=1, products_of_Dv=1)
count_flops("attention_backward", products_of_D=3, products_of_Dv=2)  # scores again, dq and dk; dp and dv


def run_backward(call: AttentionCall, results: Results, wanted: Wanted) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dsinks of `call` by the registered op; without elements where not wanted."""
    q, k, v, *options, _, kv_prefix = call
    out, lse, do, dlse = results
    *needed, deterministic, grad_dtype = wanted
    return attention_backward(do, dlse, q, k, v, out, lse, *options, *needed, deterministic, grad_dtype, kv_prefix)


class _Attention(Differentiable):
    """The fields of an AttentionCall -> (out, lse). Saves these and the tensors of the call, but no probabilities."""

    @staticmethod
    def forward(op, deterministic, *fields):
        return attention_forward(*fields)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.deterministic, *fields = inputs
        call = AttentionCall(*fields)
        ctx.numbers = (call.longest_q, call.longest_k, call.scale, call.softcap, call.left, call.right)
        bounds = (call.kv_start, call.kv_end, call.cu_seqlens_q, call.cu_seqlens_k)
        ctx.save_for_backward(*output, call.q, call.k, call.v, call.sinks, call.kv_prefix, *bounds)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        out, lse, q, k, v, sinks, kv_prefix, *bounds = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:6]  # of q, k, v and sinks
        do = torch.zeros_like(out) if do is None else last_dim_contiguous(do)
        do = do.to(q.dtype)  # where out_dtype is another: the kernels multiply do with v
        call = AttentionCall(q, k, v, sinks, *bounds, *ctx.numbers, None, kv_prefix)
        grads = run_backward(call, Results(out, lse, do, dlse), Wanted(*needed, ctx.deterministic))
        grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        grads = refuse_double_backward(ctx.op, grads, (do, dlse, q, k, v, sinks))
        return None, None, *grads, *[None] * (len(AttentionCall._fields) - len(grads))


register_gradient(
    "attention_forward", ("q", "k", "v", "sinks"), by=lambda *fields: _Attention.call("attention", None, *fields)
)


def run_call(op: str, call: AttentionCall, deterministic: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of `call`, through autograd where a gradient is wanted. op: the name in errors."""
    if needs_grad(call.q, call.k, call.v, call.sinks):
        out, lse = _Attention.call(op, deterministic, *call)
        return out, lse
    out, lse = attention_forward(*call)
    return out, lse
