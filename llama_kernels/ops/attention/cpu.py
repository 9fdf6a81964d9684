"""Attention of CPU tensors: by the flash kernel of PyTorch's SDPA where it takes the call, else written out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llama_kernels.core.tensors import dense_in_order_of
from llama_kernels.ops.attention import cpu_flash, cpu_formulas
from llama_kernels.ops.attention.call import AttentionCall, Results, Wanted, empty_grads, outputs_to_fill
from llama_kernels.ops.attention.cpu_slices import calls_of, ranges_of
from llama_kernels.ops.cpu_rotation import rotate_on_cpu
from llama_kernels.ops.rotation import Rotation
from llama_kernels.reference.attention import spans


def plain_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of `call`."""
    if not call.packed:
        out, lse = _dense_forward(call)
        out = dense_in_order_of(call.q, out).to(call.out_dtype or call.q.dtype)
        return out, lse.clone(memory_format=torch.contiguous_format)
    out, lse = outputs_to_fill(call)
    for rows, _, dense in _sequences(call):
        results = _dense_forward(dense)
        out[rows], lse[:, rows] = results[0][0].transpose(0, 1).to(out.dtype), results[1][0]
    return out, lse


def _dense_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in float32."""
    if (ranges := ranges_of(call)) is not None:
        if cpu_flash.takes(call):
            return cpu_flash.one_query_forward(call, ranges)
        outs, lses = zip(*map(cpu_formulas.forward, calls_of(call, ranges)), strict=True)
        return torch.cat(outs), torch.cat(lses)
    return cpu_flash.flash_forward(call) if cpu_flash.takes(call) else cpu_formulas.forward(call)


def _stored(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x in the dtype and memory order of `out`: x itself where it has them, else copied into `out`."""
    return x if x.dtype == out.dtype and x.stride() == out.stride() else out.copy_(x)


def plain_backward(
    call: AttentionCall, results: Results, wanted: Wanted, rotation: Rotation = Rotation()
) -> tuple[torch.Tensor, ...]:
    """The gradients of `call`; arguments as `launch_backward`."""
    dq, dk, dv, dsinks = (_packed_backward if call.packed else _dense_backward)(call, results)
    if rotation.cos is not None:
        dq, dk = rotate_on_cpu(rotation.transposed, dq, dk)
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
    """For each sequence of a packed call: the places of its queries and of its keys, and the dense call of them."""
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
    grads = _grads(call, results)
    if call.sinks is None:
        return *grads, results.lse.new_zeros(call.q.shape[1])
    lse = results.lse.masked_fill(results.lse == -torch.inf, torch.inf)  # rows that see nothing, where the sink is -inf
    shares = torch.exp(call.sinks.float()[:, None] - lse)  # of the sinks in the softmax of each row
    return *grads, -(shares * _delta(results)).sum((0, 2))


def _grads(call: AttentionCall, results: Results) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv in float32."""
    if results.dlse is None and cpu_flash.takes(call):
        return cpu_flash.flash_backward(call, results)
    return cpu_formulas.backward(call, results, _delta(results))


def _delta(results: Results) -> torch.Tensor:
    """(B, Hq, Sq), float32: the row sums of out * do, less dlse. Of whole rows, of which k and v may be a part."""
    delta = (results.out.float() * results.do.float()).sum(-1)
    return delta if results.dlse is None else delta.sub_(results.dlse)
