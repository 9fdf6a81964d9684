"""Attention of CPU tensors in plain PyTorch: the flash kernel of SDPA where it takes the call, else written out.

The formulas are written out, and in place, because the op runs below autograd, which records no graph there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llama_kernels.ops.attention import cpu_flash
from llama_kernels.ops.attention.call import AttentionCall, Results, Wanted, empty_grads, outputs_to_fill
from llama_kernels.ops.rotation import Rotation
from llama_kernels.reference.attention import spans, unseen, visible
from llama_kernels.reference.rope import rope


def plain_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of `call`."""
    out, lse = outputs_to_fill(call)
    if not call.packed:
        results = _dense_forward(call)
        return _stored(out, results[0]), _stored(lse, results[1])
    for rows, _, dense in _sequences(call):
        results = _dense_forward(dense)
        out[rows], lse[:, rows] = results[0][0].transpose(0, 1).to(out.dtype), results[1][0]
    return out, lse


def _dense_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    if cpu_flash.takes(call):
        return cpu_flash.flash_forward(call)
    s, v, see, _ = _scores(call)
    s.masked_fill_(~see, -torch.inf)
    blind = ~see.any(-1)  # rows that see no key: softmax gives NaN
    p = torch.softmax(s, -1)
    lse = s.amax(-1) - p.amax(-1).log() if s.shape[-1] else s.sum(-1)
    lse = lse.masked_fill(blind, -torch.inf)
    out = torch.einsum("bhgij,bhjd->bhgid", p, v).masked_fill(blind.unsqueeze(-1), 0).flatten(1, 2)
    return cpu_flash.with_sinks(out, lse.flatten(1, 2), call.sinks)


def _scores(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a dense call: the scores (B, Hkv, G, Sq, Sk); v; which key each query sees; and k. All in float32.

    Keys that no query sees are 0 in k and v: they may hold NaN.
    """
    Hq, Hkv, Sq, Sk = call.q.shape[1], call.k.shape[1], call.q.shape[2], call.k.shape[2]
    see = visible(Sq, Sk, False, _window_size(call), call.kv_start, call.kv_end, call.q.device, call.kv_prefix)
    k, v = (x.float().masked_fill(unseen(see), 0) for x in (call.k, call.v))
    q = call.q.float().unflatten(1, (Hkv, Hq // Hkv if Hkv else 1))
    s = torch.einsum("bhgid,bhjd->bhgij", q, k).mul_(call.scale / (call.softcap or 1))
    if call.softcap is not None:
        s.tanh_().mul_(call.softcap)
    return s, v, see, k


def _stored(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x in the dtype and memory order of `out`: x itself where it has them, otherwise copied into `out`."""
    return x if x.dtype == out.dtype and x.stride() == out.stride() else out.copy_(x)


def plain_backward(
    call: AttentionCall, results: Results, wanted: Wanted, rotation: Rotation = Rotation()
) -> tuple[torch.Tensor, ...]:
    """The gradients of `call`; arguments as `launch_backward`."""
    dq, dk, dv, dsinks = (_packed_backward if call.packed else _dense_backward)(call, results)
    cos, sin, position_ids, interleaved = rotation
    if cos is not None and sin is not None:
        dq, dk = rope(dq, dk, cos, -sin, position_ids, interleaved=interleaved)
    grads = zip(empty_grads(call, wanted), (dq, dk, dv, dsinks), strict=True)
    return tuple(_stored(grad, x) if grad.numel() else grad for grad, x in grads)


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
    sinks, scale, softcap = call.sinks, call.scale, call.softcap
    out, lse, do, dlse = results
    if dlse is None and cpu_flash.takes(call):
        delta = lse if sinks is None else (out.float() * do.float()).sum(-1)
        return *cpu_flash.flash_backward(call, results), _dsinks(sinks, lse, delta)
    s, v, see, k = _scores(call)
    groups = s.shape[1:3]
    q, do, out = (x.float().unflatten(1, groups) for x in (call.q, do, out))  # (B, Hkv, G, Sq, D)
    lse = lse.unflatten(1, groups).unsqueeze(-1)  # (B, Hkv, G, Sq, 1)

    p = (s - lse).exp_().masked_fill_(~see, 0)
    dp = torch.einsum("bhgid,bhjd->bhgij", do, v)
    delta = (out * do).sum(-1, keepdim=True)  # of the whole row, of which k and v may be a part
    if dlse is not None:
        delta -= dlse.unflatten(1, groups).unsqueeze(-1)
    ds = dp.sub_(delta).mul_(p)
    if softcap is not None:
        ds.addcmul_(ds, s.div_(softcap).square_(), value=-1)
    dq = torch.einsum("bhgij,bhjd->bhgid", ds, k).flatten(1, 2) * scale
    dk = torch.einsum("bhgij,bhgid->bhjd", ds, q) * scale
    dv = torch.einsum("bhgij,bhgid->bhjd", p, do)
    return dq, dk, dv, _dsinks(sinks, results.lse, delta.squeeze(-1).flatten(1, 2))


def _dsinks(sinks: torch.Tensor | None, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The gradient of sinks, (Hq,) float32, of lse and delta (B, Hq, Sq); zeros where there are none."""
    if sinks is None:
        return delta.new_zeros(lse.shape[1])
    return -(torch.exp(sinks.float()[:, None] - lse) * delta).sum((0, 2))


def _window_size(call: AttentionCall) -> tuple[int, int]:
    return (-1 if call.left is None else call.left, -1 if call.right is None else call.right)
