"""Attention of CPU tensors in plain PyTorch: the reference forward, and the formulas of backward.py written out.

The backward is written out because an op has to work below autograd, where there is no graph to walk back.
"""

from __future__ import annotations

import torch

from llama_kernels import reference
from llama_kernels.ops.attention.layout import empty_grads, empty_outputs
from llama_kernels.ops.rotation import Rotation
from llama_kernels.reference.attention import spans, unseen, visible


def plain_forward(
    q, k, v, sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, scale, softcap, left, right
):
    """Arguments and results as `llama_kernels::attention_forward`."""
    packed = () if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)
    function = reference.attention_varlen if packed else reference.attention
    results = function(
        q, k, v, *packed, is_causal=False, scale=scale, softcap=softcap, sinks=sinks, kv_start=kv_start, kv_end=kv_end,
        window_size=_window(left, right), return_lse=True,
    )  # fmt: skip
    return tuple(empty.copy_(x) for empty, x in zip(empty_outputs(q, v), results, strict=True))


def plain_backward(
    do, dlse, q, k, v, out, lse, sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k,
    scale, softcap, left, right, need_dq, need_dk, need_dv, need_dsinks, deterministic, rotation=Rotation(),
):  # fmt: skip
    """Arguments and results as `launch_backward`."""
    grads = empty_grads(q, k, v, sinks, need_dq, need_dk, need_dv, need_dsinks)
    options = (scale, softcap, _window(left, right))
    if cu_seqlens_q is None:
        results = _dense_backward(do, dlse, q, k, v, out, lse, sinks, kv_start, kv_end, *options)
    else:
        results = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
        results.append(lse.new_zeros(q.shape[1]))
        spans_q = spans(cu_seqlens_q, q.shape[0], longest_q)
        for rows, keys in zip(spans_q, spans(cu_seqlens_k, k.shape[0], longest_k), strict=True):
            spans_of = ((do, rows), (q, rows), (k, keys), (v, keys), (out, rows))
            mine = [x[s].transpose(0, 1)[None] for x, s in spans_of]
            mine.insert(1, None if dlse is None else dlse[None, :, rows])
            bounds = (None if bound is None else bound[None, rows] for bound in (kv_start, kv_end))
            parts = _dense_backward(*mine, lse[None, :, rows], sinks, *bounds, *options)
            for result, part, s in zip(results, parts[:3], (rows, keys, keys), strict=False):
                result[s] += part[0].transpose(0, 1)
            results[3] += parts[3]
    if rotation.half:
        cos, sin, position_ids, interleaved = rotation
        turned = reference.rope(*results[:2], cos, -sin, position_ids, interleaved=interleaved)
        results = (*turned, *results[2:])
    for grad, result in zip(grads, results, strict=True):
        if grad.numel():
            grad.copy_(result)
    return grads


def _dense_backward(do, dlse, q, k, v, out, lse, sinks, kv_start, kv_end, scale, softcap, window):
    """dq, dk, dv and dsinks, all float32."""
    Hq, Hkv, Sq, Sk = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    groups = (Hkv, Hq // Hkv if Hkv else 1)
    q, do, out = (x.float().unflatten(1, groups) for x in (q, do, out))  # (B, Hkv, G, Sq, D)
    see = visible(Sq, Sk, False, window, kv_start, kv_end, q.device)
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


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return (-1 if left is None else left, -1 if right is None else right)
