"""Attention of CPU tensors written out in plain PyTorch, for some rows of q at a time, whose scores fit the cache.

The steps run in place, which they may because the op runs below autograd.
"""

from __future__ import annotations

import torch

from llama_kernels.ops.attention.call import AttentionCall, Results
from llama_kernels.ops.attention.cpu_chunks import Chunk, chunks, empty_gradients, empty_results

_ROWS = 64  # of q at a time


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the dense `call`, in float32. A row that sees no key gives 0, and -inf or its sink."""
    out, lse = empty_results(call)
    if call.sinks is not None:  # one more score in each row, which has no value
        lse.copy_(call.sinks[:, None])
    k, v = (_float32_copy(x) for x in (call.k, call.v))
    for chunk in chunks(call, _ROWS):
        s = _scores(call, _rows_of(call.q, call, chunk), chunk.of_keys(k).flatten(0, 1))
        if call.softcap is not None:
            s.tanh_().mul_(call.softcap)
        _hide(s, -torch.inf, call, chunk)
        sink = _rows_of(lse.unsqueeze(-1), call, chunk)  # -inf where there are none
        top = torch.maximum(s.amax(-1, keepdim=True), sink)
        top.clamp_min_(torch.finfo(s.dtype).min)  # of a row that sees no key: exp(-inf + inf) is NaN
        mass = s.sub_(top).exp_().sum(-1, keepdim=True).add_(sink.sub_(top).exp_())
        part = torch.bmm(s, chunk.of_keys(v).flatten(0, 1)).div_(mass.masked_fill(mass == 0, 1))
        _store(out, part, call, chunk)
        _store(lse.unsqueeze(-1), mass.log_().add_(top), call, chunk)
    return out, lse


def backward(
    call: AttentionCall, results: Results, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of the dense `call`, in float32.

    delta: (B, Hq, Sq), the row sums of out * do, less dlse.
    """
    dq, dk, dv = empty_gradients(call)
    k, v = (_float32_copy(x) for x in (call.k, call.v))
    per_row = (call.q, results.do, results.lse.unsqueeze(-1), delta.unsqueeze(-1))
    for chunk in chunks(call, _ROWS):
        q_part, do, lse, delta_part = (_rows_of(x, call, chunk) for x in per_row)
        k_part, v_part = (chunk.of_keys(x).flatten(0, 1) for x in (k, v))
        s = _scores(call, q_part, k_part)
        if call.softcap is None:
            p = s.sub_(lse).exp_()
        else:  # s is the tanh from here on
            p = torch.add(-lse, s.tanh_(), alpha=call.softcap).exp_()
        _hide(p, 0.0, call, chunk)
        ds = torch.bmm(do, v_part.mT).sub_(delta_part).mul_(p)
        if call.softcap is not None:
            ds = torch.ops.aten.tanh_backward(ds, s)  # ds * (1 - s * s)
        _store(dq, torch.bmm(ds, k_part), call, chunk)
        for grad, of_scores, x in ((dk, ds, q_part), (dv, p, do)):
            grad[chunk.sequences, :, chunk.keys] += torch.bmm(of_scores.mT, x).unflatten(0, (-1, grad.shape[1]))
    return dq.mul_(call.scale), dk.mul_(call.scale), dv


def _scores(call: AttentionCall, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(B * Hkv, G * rows, keys): q @ k^T * scale, divided by softcap where there is one."""
    s = q.new_empty(*q.shape[:2], k.shape[1])
    return s.baddbmm_(q, k.mT, beta=0, alpha=call.scale / (call.softcap or 1))


def _hide(s: torch.Tensor, value: float, call: AttentionCall, chunk: Chunk) -> None:
    """Put `value` in the places of s (B * Hkv, G * rows, keys) where a row does not see a key."""
    if chunk.see is not None:
        _apart(s, call).masked_fill_(~chunk.see[:, None, None], value)


# --- the heads of a group, G = Hq / Hkv, as more rows of one key head -------------------------------------------------


def _groups(call: AttentionCall) -> tuple[int, int]:
    Hq, Hkv = call.q.shape[1], call.k.shape[1]
    return Hkv, Hq // Hkv if Hkv else 1


def _float32_copy(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: products of strided matrices may be slower, and add up in another order."""
    return x.new_empty(x.shape, dtype=torch.float32).copy_(x)


def _rows_of(x: torch.Tensor, call: AttentionCall, chunk: Chunk) -> torch.Tensor:
    """A float32 copy (B * Hkv, G * rows, N) of the chunk's rows of x (B, Hq, Sq, N)."""
    return _float32_copy(chunk.of_rows(x).unflatten(1, _groups(call))).flatten(2, 3).flatten(0, 1)


def _apart(x: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """A view (B, Hkv, G, rows, N) of x (B * Hkv, G * rows, N)."""
    Hkv, G = _groups(call)
    return x.view(-1, Hkv, G, x.shape[1] // G, x.shape[2])


def _store(whole: torch.Tensor, part: torch.Tensor, call: AttentionCall, chunk: Chunk) -> None:
    """Copy part (B * Hkv, G * rows, N) into the chunk's rows of whole (B, Hq, Sq, N)."""
    chunk.of_rows(whole).unflatten(1, _groups(call)).copy_(_apart(part, call))
