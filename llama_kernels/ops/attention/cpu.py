"""Attention of CPU tensors in plain PyTorch: the reference forward, and the formulas of the backward written out.

They are written out because the op runs below autograd, which records no graph there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llama_kernels.ops.attention import cpu_flash
from llama_kernels.ops.attention.call import AttentionCall, Results, Wanted, empty_grads, outputs_to_fill
from llama_kernels.ops.rotation import Rotation
from llama_kernels.reference.attention import AttentionOptions, attention, spans, unseen, visible
from llama_kernels.reference.rope import rope


def plain_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of `call`."""
    out, lse = outputs_to_fill(call)
    if not call.packed:
        results = _dense_forward(call)
        return out.copy_(results[0]), lse.copy_(results[1])
    for rows, _, dense in _sequences(call):
        results = _dense_forward(dense)
        out[rows], lse[:, rows] = results[0][0].transpose(0, 1).to(out.dtype), results[1][0]
    return out, lse


def _dense_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    if cpu_flash.takes(call):
        return cpu_flash.flash_forward(call)
    options: AttentionOptions = {
        "is_causal": False, "scale": call.scale, "softcap": call.softcap, "sinks": call.sinks,
        "kv_start": call.kv_start, "kv_end": call.kv_end, "kv_prefix": call.kv_prefix,
        "window_size": _window_size(call),
    }  # fmt: skip
    q = call.q.to(torch.promote_types(call.q.dtype, torch.float32))  # out is rounded where it is stored
    return attention(q, call.k, call.v, return_lse=True, **options)


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
    for rows, keys, dense in _sequences(call):
        dlse_rows = None if dlse is None else dlse[None, :, rows]
        parts = _dense_backward(dense, Results(_dense(out[rows]), lse[None, :, rows], _dense(do[rows]), dlse_rows))
        for grad, part, span in zip((dq, dk, dv), parts[:3], (rows, keys, keys), strict=True):
            grad[span] += part[0].transpose(0, 1)
        dsinks += parts[3]
    return dq, dk, dv, dsinks


def _sequences(call) -> Iterator[tuple[slice, slice, AttentionCall]]:
    """Of each sequence of a packed call: its queries, its keys, and the dense call of them."""
    of_q = spans(call.cu_seqlens_q, call.q.shape[0], call.longest_q)
    of_k = spans(call.cu_seqlens_k, call.k.shape[0], call.longest_k)
    for rows, keys in zip(of_q, of_k, strict=True):
        yield rows, keys, call._replace(
            q=_dense(call.q[rows]), k=_dense(call.k[keys]), v=_dense(call.v[keys]),
            kv_start=None if call.kv_start is None else call.kv_start[None, rows],
            kv_end=None if call.kv_end is None else call.kv_end[None, rows],
            kv_prefix=None if call.kv_prefix is None else call.kv_prefix[None, rows],
            cu_seqlens_q=None, cu_seqlens_k=None, longest_q=rows.stop - rows.start, longest_k=keys.stop - keys.start,
        )  # fmt: skip


def _dense(x: torch.Tensor) -> torch.Tensor:
    """(1, H, S, D) of (S, H, D)."""
    return x.transpose(0, 1)[None]


def _dense_backward(call: AttentionCall, results: Results) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dsinks, all float32."""
    q, k, v, sinks, scale, softcap = call.q, call.k, call.v, call.sinks, call.scale, call.softcap
    out, lse, do, dlse = results
    if dlse is None and cpu_flash.takes(call):
        delta = (out.float() * do.float()).sum(-1)
        return *cpu_flash.flash_backward(call, results), _dsinks(sinks, lse, delta)
    Hq, Hkv, Sq, Sk = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    groups = (Hkv, Hq // Hkv if Hkv else 1)
    q, do, out = (x.float().unflatten(1, groups) for x in (q, do, out))  # (B, Hkv, G, Sq, D)
    see = visible(Sq, Sk, False, _window_size(call), call.kv_start, call.kv_end, q.device, call.kv_prefix)
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
    return dq, dk, dv, _dsinks(sinks, results.lse, delta.squeeze(-1).flatten(1, 2))


def _dsinks(sinks: torch.Tensor | None, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The gradient of sinks, (Hq,) float32, of lse and delta (B, Hq, Sq); zeros where there are none.

    A sink of -inf has no share, not even in a row that sees no key, where lse is -inf too.
    """
    if sinks is None:
        return delta.new_zeros(lse.shape[1])
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return -(torch.exp(sinks.float()[:, None] - lse) * delta).sum((0, 2))


def _window_size(call: AttentionCall) -> tuple[int, int]:
    return (-1 if call.left is None else call.left, -1 if call.right is None else call.right)
