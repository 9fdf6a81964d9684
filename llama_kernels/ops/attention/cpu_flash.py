"""Attention of CPU tensors by the kernel of PyTorch's scaled_dot_product_attention, which stores no (Sq, Sk) scores.

It computes in float32 and rounds once, as cpu.py does. `takes` says for which calls it is used. The kernel knows full
and plain causal calls; of others it gets some rows at a time, with a mask over the keys that they see.
"""

from __future__ import annotations

import torch

from llama_kernels.core.versions import major_minor
from llama_kernels.ops.attention.call import AttentionCall, Results
from llama_kernels.ops.attention.cpu_chunks import Chunk, chunks, empty_gradients, empty_results
from llama_kernels.ops.attention.cpu_slices import Range

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
    q, k, v = _float32_qkv(call)
    is_causal = _is_causal(call)
    if is_causal is not None:
        return _with_sinks(call, *_FORWARD(q, k, v, 0.0, is_causal, scale=call.scale))
    out, lse = empty_results(call)
    for chunk in chunks(call, _ROWS, unmasked=True):
        qkv = (chunk.of_rows(q), chunk.of_keys(k), chunk.of_keys(v))
        out_part, lse_part = _FORWARD(*qkv, 0.0, chunk.is_causal, attn_mask=_mask(chunk), scale=call.scale)
        chunk.of_rows(out).copy_(out_part)
        chunk.of_rows(lse).copy_(_with_rows_that_see_nothing(lse_part, chunk, -torch.inf))
    return _with_sinks(call, out, lse)


def one_query_forward(call: AttentionCall, ranges: list[Range]) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in float32, of one query in each sequence, which sees the keys of its range in `ranges_of(call)`.

    From _LEAST_KEY_HEADS on, the query heads of a key head become rows of the kernel, which then reads each key once.
    That takes 0.55 to 0.75 times as long with 4 query heads.
    """
    q, k, v = _float32(call.q), call.k, call.v
    B, Hq, _, D = q.shape
    heads_as_rows = Hq > k.shape[1] >= _LEAST_KEY_HEADS
    if heads_as_rows:
        q = q.reshape(B, k.shape[1], -1, D)
    if len(ranges) == 1:
        out, lse = _of_range(q, k, v, ranges[0], call.scale)
    else:
        each = zip(*(x.chunk(len(ranges)) for x in (q, k, v)), ranges, strict=True)
        parts = [_of_range(q_b, k_b, v_b, keys, call.scale) for q_b, k_b, v_b, keys in each]
        out, lse = map(torch.cat, zip(*parts, strict=True))
    if heads_as_rows:
        out, lse = out.reshape(B, Hq, 1, D), lse.reshape(B, Hq, 1)
    return _with_sinks(call, out, lse)


def _of_range(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Range, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of q in float32, which sees the keys of the range alone. No others are converted to float32."""
    first, end = keys
    if first == end:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    if end - first < k.shape[2]:
        k, v = k.narrow(2, first, end - first), v.narrow(2, first, end - first)
    k, v = (_of_query_heads(_float32(x), q.shape[1]) for x in (k, v))
    return _FORWARD(q, k, v, 0.0, False, scale=scale)


def _with_sinks(call: AttentionCall, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out, changed in place, and lse with the sinks of the call: one more score in each row, which has no value."""
    if call.sinks is None:
        return out, lse
    with_sink = torch.logaddexp(lse, call.sinks.float()[:, None])
    share = torch.exp(lse - with_sink).masked_fill_(lse == -torch.inf, 0)
    return out.mul_(share.unsqueeze(-1)), with_sink


def flash_backward(call: AttentionCall, results: Results) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv in float32, of results without dlse."""
    q, k, v = _float32_qkv(call)
    do, out, lse = _float32(results.do), _float32(results.out), results.lse.contiguous()
    is_causal = _is_causal(call)
    if is_causal is not None:
        dq, *dkv = _BACKWARD(do, q, k, v, out, lse, 0.0, is_causal, scale=call.scale)
        return dq, *(_of_groups(x, call) for x in dkv)
    dq, dk, dv = empty_gradients(call)
    for chunk in chunks(call, _ROWS, unmasked=True):
        do_part, q_part, out_part, lse_part = (chunk.of_rows(x) for x in (do, q, out, lse))
        # The kernel computes p as exp(s - lse): 0 for a row that saw no key.
        lse_part = _with_rows_that_see_nothing(lse_part, chunk, torch.inf)
        saved = (do_part, q_part, chunk.of_keys(k), chunk.of_keys(v), out_part, lse_part)
        dq_part, *dkv = _BACKWARD(*saved, 0.0, chunk.is_causal, attn_mask=_mask(chunk), scale=call.scale)
        chunk.of_rows(dq).copy_(dq_part)
        for grad, part in zip((dk, dv), dkv, strict=True):
            grad[chunk.sequences, :, chunk.keys] += _of_groups(part, call)
    return dq, dk, dv


def _is_causal(call: AttentionCall) -> bool | None:
    """The kernel's argument is_causal, for a call that needs no mask tensor. None: the call needs one."""
    window = call.window
    if window.left is not None or any(x is not None for x in (call.kv_start, call.kv_end, call.kv_prefix)):
        return None
    if window.right is None:
        return False
    return True if window.right == 0 and call.q.shape[2] == call.k.shape[2] else None


def _with_rows_that_see_nothing(lse: torch.Tensor, chunk: Chunk, value: float) -> torch.Tensor:
    """lse (B, H, rows) of a chunk, with `value` for rows that see no key."""
    return lse if chunk.sees_nothing is None else lse.masked_fill(chunk.sees_nothing[:, None], value)


def _float32_qkv(call: AttentionCall) -> tuple[torch.Tensor, ...]:
    """q, k and v as the kernel takes them."""
    return _float32(call.q), *(_of_query_heads(_float32(x), call.q.shape[1]) for x in (call.k, call.v))


def _of_query_heads(x: torch.Tensor, Hq: int) -> torch.Tensor:
    """k or v with as many heads as q has, where the kernel does not take fewer."""
    return x if _TAKES_GROUPS or Hq == x.shape[1] else x.repeat_interleave(Hq // x.shape[1], 1)


def _float32(x: torch.Tensor) -> torch.Tensor:
    return _rows_apart(x.float())


def _rows_apart(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where rows overlap, as after `expand`, or the last dimension is not contiguous.

    Products with a matrix of overlapping rows add up in another order. The kernel takes the last dimension for
    contiguous.
    """
    return x if x.stride(3) == 1 and x.stride(2) >= x.shape[3] else x.contiguous()


def _mask(chunk: Chunk) -> torch.Tensor | None:
    """(1, 1, rows, keys), added to the scores: 0 or -inf."""
    if chunk.see is None:
        return None
    zero = torch.zeros((), device=chunk.see.device, dtype=torch.float32)
    return torch.where(chunk.see[:, None], zero, zero - torch.inf)


def _of_groups(x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """The gradient of k or v, of that of the heads that the kernel was given."""
    return x.unflatten(1, (call.k.shape[1], -1)).sum(2) if x.shape[1] > call.k.shape[1] else x
