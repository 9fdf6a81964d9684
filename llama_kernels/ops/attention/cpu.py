"""Attention of CPU tensors in plain PyTorch: the reference forward, and the formulas of the backward written out.

They are written out because the op runs below autograd, which records no graph there.
"""

from __future__ import annotations

import torch

from llama_kernels.ops.attention.call import (
    AttentionCall,
    Results,
    Wanted,
    empty_grads,
    empty_outputs,
)
from llama_kernels.ops.rotation import Rotation
from llama_kernels.reference.attention import AttentionOptions, attention, attention_varlen, spans, unseen, visible
from llama_kernels.reference.rope import rope


def plain_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of `call`."""
    options: AttentionOptions = {
        "is_causal": False, "scale": call.scale, "softcap": call.softcap, "sinks": call.sinks,
        "kv_start": call.kv_start, "kv_end": call.kv_end, "window_size": _window_size(call),
    }  # fmt: skip
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        results = attention(call.q, call.k, call.v, return_lse=True, **options)
    else:
        sequences = (call.cu_seqlens_q, call.cu_seqlens_k, call.longest_q, call.longest_k)
        results = attention_varlen(call.q, call.k, call.v, *sequences, return_lse=True, **options)
    out, lse = (empty.copy_(x) for empty, x in zip(empty_outputs(call), results, strict=True))
    return out, lse


def plain_backward(
    call: AttentionCall, results: Results, wanted: Wanted, rotation: Rotation = Rotation()
) -> tuple[torch.Tensor, ...]:
    """The gradients of `call`; arguments as `launch_backward`."""
    dq, dk, dv, dsinks = (_packed_backward if call.packed else _dense_backward)(call, results)
    cos, sin, position_ids, interleaved = rotation
    if cos is not None and sin is not None:
        dq, dk = rope(dq, dk, cos, -sin, position_ids, interleaved=interleaved)
    grads = empty_grads(call, wanted)
    for grad, x in zip(grads, (dq, dk, dv, dsinks), strict=True):
        if grad.numel():
            grad.copy_(x)
    return grads


def _packed_backward(call, results: Results):
    """dq, dk, dv and dsinks, all float32: the dense backward of each sequence."""
    q, k, v, out, lse, do, dlse = call.q, call.k, call.v, *results
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    dsinks = lse.new_zeros(q.shape[1])
    of_q = spans(call.cu_seqlens_q, q.shape[0], call.longest_q)
    of_k = spans(call.cu_seqlens_k, k.shape[0], call.longest_k)
    for rows, keys in zip(of_q, of_k, strict=True):
        dense = call._replace(
            q=_dense(q[rows]), k=_dense(k[keys]), v=_dense(v[keys]),
            kv_start=None if call.kv_start is None else call.kv_start[None, rows],
            kv_end=None if call.kv_end is None else call.kv_end[None, rows],
        )  # fmt: skip
        dlse_rows = None if dlse is None else dlse[None, :, rows]
        parts = _dense_backward(dense, Results(_dense(out[rows]), lse[None, :, rows], _dense(do[rows]), dlse_rows))
        for grad, part, span in zip((dq, dk, dv), parts[:3], (rows, keys, keys), strict=True):
            grad[span] += part[0].transpose(0, 1)
        dsinks += parts[3]
    return dq, dk, dv, dsinks


def _dense(x: torch.Tensor) -> torch.Tensor:
    """(1, H, S, D) of (S, H, D)."""
    return x.transpose(0, 1)[None]


def _dense_backward(call: AttentionCall, results: Results) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dsinks, all float32."""
    q, k, v, sinks, scale, softcap = call.q, call.k, call.v, call.sinks, call.scale, call.softcap
    out, lse, do, dlse = results
    Hq, Hkv, Sq, Sk = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    groups = (Hkv, Hq // Hkv if Hkv else 1)
    q, do, out = (x.float().unflatten(1, groups) for x in (q, do, out))  # (B, Hkv, G, Sq, D)
    see = visible(Sq, Sk, False, _window_size(call), call.kv_start, call.kv_end, q.device)
    k, v = (x.float().masked_fill(unseen(see), 0) for x in (k, v))  # (B, Hkv, Sk, D)
    lse = lse.unflatten(1, groups).unsqueeze(-1)  # (B, Hkv, G, Sq, 1)

    s = torch.einsum("bhgid,bhjd->bhgij", q, k) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    p = torch.exp(s - lse).masked_fill(~see, 0)
    dp = torch.einsum("bhgid,bhjd->bhgij", do, v)
    delta = (out * do).sum(-1, keepdim=True)  # of the whole row, of which k and v may be a part
    if dlse is not None:
        delta -= dlse.unflatten(1, groups).unsqueeze(-1)
    ds = p * (dp - delta)
    if softcap is not None:
        ds *= 1 - (s / softcap).square()
    dq = torch.einsum("bhgij,bhjd->bhgid", ds, k).flatten(1, 2) * scale
    dk = torch.einsum("bhgij,bhgid->bhjd", ds, q) * scale
    dv = torch.einsum("bhgij,bhgid->bhjd", p, do)
    if sinks is None:
        return dq, dk, dv, dq.new_zeros(Hq)
    mass = torch.exp(sinks.float().unflatten(0, groups)[:, :, None, None] - lse)
    return dq, dk, dv, -(mass * delta).sum((0, 3, 4)).flatten()


def _window_size(call: AttentionCall) -> tuple[int, int]:
    return (-1 if call.left is None else call.left, -1 if call.right is None else call.right)
