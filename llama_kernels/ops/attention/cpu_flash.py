"""Attention of CPU tensors by the kernel of PyTorch's scaled_dot_product_attention, which stores no (Sq, Sk) scores.

It computes in float32 and rounds once, as cpu.py does. `takes` says for which calls it is used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.ops.attention.call import AttentionCall, Results
from llama_kernels.reference.attention import unseen, visible

_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


class _Arguments(NamedTuple):
    """What PyTorch's kernel takes, in float32, k and v repeated to the heads of q."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    is_causal: bool  # aligned at the first keys; the mask says the rest
    mask: torch.Tensor | None  # added to the scores: 0 or -inf


def takes(call: AttentionCall) -> bool:
    """Whether PyTorch's kernel computes the dense `call`.

    It has no softcap and takes v as wide as k. It scales scores that are masked already, so that a scale of 0 or less
    gives NaN.
    """
    there = _FORWARD is not None and _BACKWARD is not None
    plain = call.softcap is None and call.scale > 0 and call.q.shape[-1] == call.v.shape[-1]
    return there and plain and 0 not in (*call.q.shape, *call.k.shape)


def flash_forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in float32. A row that sees no key gives 0, and -inf where there are no sinks."""
    q, k, v, is_causal, mask = _arguments(call)
    out, lse = _FORWARD(q, k, v, 0.0, is_causal, attn_mask=mask, scale=call.scale)
    if mask is not None:
        lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    if call.sinks is not None:  # one more score in each row, which has no value
        with_sink = torch.logaddexp(lse, call.sinks.float()[:, None])
        share = torch.exp(lse - with_sink).masked_fill(lse == -torch.inf, 0)
        out, lse = out * share.unsqueeze(-1), with_sink
    return out, lse


def flash_backward(call: AttentionCall, results: Results) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv in float32, of results without dlse."""
    q, k, v, is_causal, mask = _arguments(call)
    # The kernel computes p as exp(s - lse): 0 for a row that saw no key.
    lse = results.lse.masked_fill(results.lse == -torch.inf, torch.inf)
    do, out = results.do.float(), results.out.float()
    dq, dk, dv = _BACKWARD(do, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=call.scale)
    groups = (call.k.shape[1], -1)
    return dq, dk.unflatten(1, groups).sum(2), dv.unflatten(1, groups).sum(2)


def _arguments(call: AttentionCall) -> _Arguments:
    q, k, v = (x.float() for x in (call.q, call.k, call.v))
    Sq, Sk, sizes = q.shape[2], k.shape[2], call.sizes
    window, unbounded = call.window, call.kv_start is None and call.kv_end is None
    is_causal = unbounded and window.left is None and window.right == 0 and Sq == Sk and call.kv_prefix is None
    mask = None
    if not is_causal and not (unbounded and window.left is None and window.right is None):
        left, right = (-1 if side is None else side for side in window)
        see = visible(Sq, Sk, False, (left, right), call.kv_start, call.kv_end, q.device, call.kv_prefix)
        k, v = (x.masked_fill(unseen(see), 0) for x in (k, v))  # keys that no query sees may hold NaN
        mask = q.new_zeros(see.shape).masked_fill(~see, -torch.inf)
        mask = mask if see.ndim == 2 else mask.squeeze(1)  # (Sq, Sk) or (B, 1, Sq, Sk)
    k, v = (x.repeat_interleave(sizes.group, 1) for x in (k, v))
    return _Arguments(q, k, v, is_causal, mask)
