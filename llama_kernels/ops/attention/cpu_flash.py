"""Attention of CPU tensors by the kernel of PyTorch's scaled_dot_product_attention, which stores no (Sq, Sk) scores.

It computes in float32 and rounds once, as cpu.py does. `takes` says for which calls it is used. The kernel knows full
and plain causal calls; of others it gets some rows at a time, with a mask over the keys that they see.
"""

from __future__ import annotations

import torch

from llama_kernels.core.versions import major_minor
from llama_kernels.ops.attention.call import AttentionCall, Results
from llama_kernels.ops.attention.cpu_chunks import Chunk, chunks, empty_gradients, empty_results

_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_TAKES_GROUPS = (major_minor(torch.__version__) or (0, 0)) >= (2, 13)  # fewer heads of k and v than of q
_LEAST_KEY_HEADS = 4  # of which the query heads become rows; fewer would leave threads of the CPU without work
_ROWS = 192  # of q at a time, where there is a mask; under 192 the kernel takes smaller tiles


def takes(call: AttentionCall) -> bool:
    """Whether PyTorch's kernel computes the dense `call`.

    It has no softcap and takes v as wide as k. It scales scores that are masked already, so that a scale of 0 or less
    gives NaN.
    """
    there = _FORWARD is not None and _BACKWARD is not None
    plain = call.softcap is None and call.scale > 0 and call.q.shape[-1] == call.v.shape[-1]
    return there and plain and 0 not in (*call.q.shape, *call.k.shape)


def flash_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in float32. A row that sees no key gives 0, and -inf or its sink."""
    out, lse = _without_sinks(call)
    if call.sinks is None:
        return out, lse
    with_sink = torch.logaddexp(lse, call.sinks.float()[:, None])  # one more score in each row, which has no value
    share = torch.exp(lse - with_sink).masked_fill_(lse == -torch.inf, 0)
    return out.mul_(share.unsqueeze(-1)), with_sink


def _without_sinks(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    is_causal = _is_causal(call)
    if is_causal is False and call.q.shape[2] == 1 and call.q.shape[1] > call.k.shape[1] >= _LEAST_KEY_HEADS:
        return _one_query(call)
    q, k, v = _float32_qkv(call)
    if is_causal is not None:
        return _FORWARD(q, k, v, 0.0, is_causal, scale=call.scale)
    out, lse = empty_results(call)
    for chunk in chunks(call, _ROWS):
        keys = (chunk.of_keys(x) for x in (k, v))
        out_part, lse_part = _FORWARD(q[:, :, chunk.rows], *keys, 0.0, False, attn_mask=_mask(chunk), scale=call.scale)
        out[:, :, chunk.rows] = out_part
        lse[:, :, chunk.rows] = lse_part.masked_fill(chunk.blind[:, None], -torch.inf)
    return out, lse


def _one_query(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of q (B, Hq, 1, D). The query heads of a key head become its rows, so that the kernel reads each key
    once. That takes 0.55 to 0.75 times as long with 4 query heads."""
    q, k, v = (_rows_apart(x.float()) for x in (call.q, call.k, call.v))
    out, lse = _FORWARD(q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]), k, v, 0.0, False, scale=call.scale)
    return out.flatten(1, 2)[:, None].transpose(1, 2), lse.flatten(1, 2)[..., None]


def flash_backward(call: AttentionCall, results: Results) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv in float32, of results without dlse."""
    q, k, v = _float32_qkv(call)
    do, out, lse = _rows_apart(results.do.float()), _rows_apart(results.out.float()), results.lse.contiguous()
    is_causal = _is_causal(call)
    if is_causal is not None:
        dq, *dkv = _BACKWARD(do, q, k, v, out, lse, 0.0, is_causal, scale=call.scale)
        return dq, *(_of_groups(x, call) for x in dkv)
    dq, dk, dv = empty_gradients(call)
    for chunk in chunks(call, _ROWS):
        rows, keys = chunk.rows, [chunk.of_keys(x) for x in (k, v)]
        # The kernel computes p as exp(s - lse): 0 for a row that saw no key.
        lse_part = lse[:, :, rows].masked_fill(chunk.blind[:, None], torch.inf)
        saved = (do[:, :, rows], q[:, :, rows], *keys, out[:, :, rows], lse_part)
        parts = _BACKWARD(*saved, 0.0, False, attn_mask=_mask(chunk), scale=call.scale)
        dq[:, :, rows] = parts[0]
        dk[:, :, chunk.keys] += _of_groups(parts[1], call)
        dv[:, :, chunk.keys] += _of_groups(parts[2], call)
    return dq, dk, dv


def _is_causal(call: AttentionCall) -> bool | None:
    """The kernel's argument is_causal, for a call that needs no mask tensor. None: the call needs one."""
    window = call.window
    if window.left is not None or any(x is not None for x in (call.kv_start, call.kv_end, call.kv_prefix)):
        return None
    if window.right is None:
        return False
    return True if window.right == 0 and call.q.shape[2] == call.k.shape[2] else None


def _float32_qkv(call: AttentionCall) -> tuple[torch.Tensor, ...]:
    """q, k and v as the kernel takes them."""
    q, k, v = (_rows_apart(x.float()) for x in (call.q, call.k, call.v))
    if call.sizes.group > 1 and not _TAKES_GROUPS:
        k, v = (x.repeat_interleave(call.sizes.group, 1) for x in (k, v))
    return q, k, v


def _rows_apart(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where rows overlap, as after `expand`, or the last dimension is not contiguous.

    Products with a matrix of overlapping rows add up in another order. The kernel takes the last dimension for
    contiguous.
    """
    return x if x.stride(3) == 1 and x.stride(2) >= x.shape[3] else x.contiguous()


def _mask(chunk: Chunk) -> torch.Tensor | None:
    """(B or 1, 1, rows, keys), added to the scores: 0 or -inf."""
    if chunk.see is None:
        return None
    zero = torch.zeros((), device=chunk.see.device, dtype=torch.float32)
    return torch.where(chunk.see[:, None], zero, zero - torch.inf)


def _of_groups(x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """The gradient of k or v, of that of the heads that the kernel was given."""
    return x.unflatten(1, (call.k.shape[1], -1)).sum(2) if x.shape[1] > call.k.shape[1] else x
