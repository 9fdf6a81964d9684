"""What the judge compares with: the ideal of each op, float32 that rounds only where the kernel must, and plain eager.

A kernel must round its inputs, P and dS before a product, lse in base e and in base 2, and its results. The ideal uses
exp2, log2, rsqrt and division with the errors of a GPU's instructions (tests/support/hardware.py).
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama_kernels.core.language import INTERPRETED
from tests.support.hardware import DRAWS, EXACT, Arithmetic, in_more_orders

LOG2E = math.log2(math.e)


def attention_mask(Sq, Sk, is_causal, window_size, kv_start, kv_end, device, kv_prefix=None):
    """Which query sees which key, (1 or B, 1, Sq, Sk): the definition. The last query is aligned with the last key."""
    left, right = window_size
    i = torch.arange(Sq, device=device)[:, None] + Sk - Sq
    j = torch.arange(Sk, device=device)
    see = torch.ones(1, 1, Sq, Sk, dtype=torch.bool, device=device)
    see = see & (j <= i) if is_causal else see
    see = see & (i - j <= left) if left >= 0 else see
    see = see & (j - i <= right) if right >= 0 else see
    see = see if kv_start is None else see & (j >= kv_start[:, None, :, None])
    see = see if kv_end is None else see & (j < kv_end[:, None, :, None])
    return see if kv_prefix is None else see | (j < kv_prefix[:, None, :, None])


# --- the ideal -------------------------------------------------------------------------------------------------------


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 that has been through `dtype` once."""
    return x.to(dtype).float()


def rounds_p(device: torch.device) -> bool:
    """Whether kernels compute on this device. They round P before its product with v. Plain PyTorch, which CPU tensors
    take outside of Triton's interpreter, does not."""
    return device.type != "cpu" or INTERPRETED


def drawn(ideal: Callable[..., Sequence[torch.Tensor | None]], *call: Any, **options: Any) -> list[list[torch.Tensor]]:
    """The results of `ideal(*call, by=arithmetic, **options)` that are not None, each as a list of its draws: under the
    errors of a GPU's instructions, or one draw without them where plain PyTorch computes."""
    first = next(x for x in call if isinstance(x, torch.Tensor))
    arithmetics = DRAWS if rounds_p(first.device) else (EXACT,)
    arithmetics = in_more_orders(arithmetics) if _adds_term_after_term(first) else arithmetics
    draws = [ideal(*call, by=arithmetic, **options) for arithmetic in arithmetics]
    return [list(results) for results in zip(*draws, strict=True) if results[0] is not None]


def ideal_rms_norm(x, residual, weight, eps, offset, dy, ds, by: Arithmetic = EXACT):
    """(y, residual_out or None, dx, dresidual, dweight): float32, every result rounded once."""
    s = x.float() if residual is None else rounded(x.float() + residual.float(), residual.dtype)
    N = s.shape[-1]
    mean = functools.partial(_mean, by=by)
    rstd = by.inverse_root(mean(s.square()) + eps)
    xhat = s * rstd
    scale = 1.0 if weight is None else offset + weight.float()
    g = dy.float() * scale
    # For N = 1 the bracket cancels to eps rstd^2.
    ds_ = g * rstd * (eps * rstd.square()) if N == 1 else rstd * (g - xhat * mean(g * xhat))
    ds_ = ds_ if ds is None else ds_ + ds.float()
    dweight = None if weight is None else (dy.float() * xhat).reshape(-1, N).sum(0).to(weight.dtype)
    return (
        (xhat * scale).to(x.dtype),
        None if residual is None else s.to(residual.dtype),
        ds_.to(x.dtype),
        None if residual is None else ds_.to(residual.dtype),
        dweight,
    )


def _mean(x: torch.Tensor, by: Arithmetic) -> torch.Tensor:
    return by.divide(x.sum(-1, keepdim=True), torch.tensor(float(x.shape[-1]), device=x.device))


def ideal_tangent(x, weight, tx, tweight, eps, offset, dtype, by: Arithmetic = EXACT):
    """(the tangent of y,) of RMSNorm, where x has the tangent tx and the weight has tweight: rounded once, to dtype."""
    rstd = by.inverse_root(_mean(x.float().square(), by) + eps)
    xhat, tx = x.float() * rstd, tx.float()
    ty = tx * rstd * (eps * rstd.square()) if x.shape[-1] == 1 else rstd * (tx - xhat * _mean(tx * xhat, by))
    ty = ty if weight is None else ty * (offset + weight.float()) + xhat * tweight.float()
    return (ty.to(dtype),)


def ideal_norm_rope(x, weight, cos, sin, interleaved, eps, offset, dy, by: Arithmetic = EXACT):
    """(y, dx, dweight or None) of heads (..., D) that are normed, then rotated: float32, every result rounded once."""
    D = x.shape[-1]
    rstd = by.inverse_root(_mean(x.float().square(), by) + eps)
    xhat = x.float() * rstd
    scale = 1.0 if weight is None else offset + weight.float()
    y = eager_rope(xhat * scale, cos, sin, interleaved)
    unrotated = eager_rope(dy.float(), cos, transposed(sin, D, interleaved), interleaved)
    g = unrotated * scale
    dx = rstd * (g - xhat * _mean(g * xhat, by))
    dweight = None if weight is None else (unrotated * xhat).reshape(-1, D).sum(0).to(weight.dtype)
    return y.to(x.dtype), dx.to(x.dtype), dweight


def _adds_term_after_term(x: torch.Tensor) -> bool:
    """A GPU multiplies float32 without tensor cores, term after term: less exact for wide heads than in blocks."""
    return x.dtype == torch.float32 and x.is_cuda


def term_after_term(a: torch.Tensor, b: torch.Tensor, order: int) -> torch.Tensor:
    """a @ b, where each element is a sum of one term after another: in memory's order if `order` is 0, or in random
    order, another for each number."""
    terms = list(range(a.shape[-1]))
    if order:
        random.Random(order).shuffle(terms)
    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for n in terms:
        total = torch.addcmul(total, a[..., n : n + 1], b[..., n : n + 1, :])
    return total


def ideal_attention(
    q, k, v, see, scale, softcap, sinks, do, dlse, closing=lambda grad: grad, by: Arithmetic = EXACT
):  # fmt: skip
    """(out, lse, dq, dk, dv, dsinks or None) of dense attention. `see` broadcasts to (B, Hq, Sq, Sk). `closing` is
    applied to dq and dk before they are rounded."""
    dtype, Hkv = q.dtype, k.shape[1]
    G = q.shape[1] // Hkv
    product = functools.partial(term_after_term, order=by.order) if _adds_term_after_term(q) else torch.matmul
    q_, do_ = q.float(), do.float()
    k_, v_ = (x.float().repeat_interleave(G, 1) for x in (k, v))

    def capped(s):
        return by.divide(s, torch.tensor(float(softcap), device=s.device))

    def scores(qk):
        s = qk * scale if softcap is None else softcap * by.tanh(capped(qk * scale))
        return s.masked_fill(~see, -math.inf)

    s = scores(product(q_, k_.mT))
    sink = None if sinks is None else sinks.float()[None, :, None, None].expand(*s.shape[:-1], 1)
    s, sink = s * LOG2E, None if sink is None else sink * LOG2E
    m = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    m = m if sink is None else torch.maximum(m, sink)
    m = m.masked_fill(m == -math.inf, 0) + by.above
    p = by.exp2(s - m)
    mass = p.sum(-1, keepdim=True) + (0 if sink is None else by.exp2(sink - m))
    empty = mass == 0
    share = by.divide(torch.ones_like(mass), mass.masked_fill(empty, 1))
    out = (((rounded(p, dtype) if rounds_p(q.device) else p) @ v_) * share).to(dtype)
    lse = ((m + by.log2(mass)) / LOG2E).masked_fill(empty, -math.inf)

    delta = (out.float() * do_).sum(-1, keepdim=True) - dlse.float().unsqueeze(-1)
    delta = delta.masked_fill(empty, 0)
    s = scores(
        product(q_.flip(-1), k_.flip(-1).mT)
    )  # recomputed in another order: its roundings do not cancel those in lse
    p = by.exp2(s * LOG2E - lse.masked_fill(empty, 0) * LOG2E)
    ds = p * (product(do_, v_.mT) - delta)
    if softcap is not None:
        ds = ds * (1 - capped(s.masked_fill(~see, 0)).square())
    ds, p = rounded(ds, dtype), rounded(p, dtype)
    dq = closing(ds @ k_ * scale).to(dtype)
    dk = closing((ds.mT @ q_ * scale).unflatten(1, (Hkv, G)).sum(2)).to(dtype)
    dv = (p.mT @ do_).unflatten(1, (Hkv, G)).sum(2).to(dtype)
    if sinks is None:
        return out, lse.squeeze(-1), dq, dk, dv, None
    dsinks = -(by.exp2(sink - lse * LOG2E) * delta).sum((0, 2, 3)).to(sinks.dtype)
    return out, lse.squeeze(-1), dq, dk, dv, dsinks


# --- plain eager -----------------------------------------------------------------------------------------------------


def eager_rms_norm(x, weight, eps, offset):
    """As Hugging Face's modelling code has it: normalised in float32, rounded, then scaled."""
    y = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else y * (offset + weight).to(x.dtype)


def eager_rope(x, cos, sin, interleaved):
    """In x's dtype. cos, sin: (..., S, R/2) or (..., S, R), of a shape to broadcast with x."""
    if 2 * cos.shape[-1] <= x.shape[-1]:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    R = cos.shape[-1]
    cos, sin, part, rest = cos.to(x.dtype), sin.to(x.dtype), x[..., :R], x[..., R:]
    x0, x1 = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    across = torch.stack((-x1, x0), -1).flatten(-2) if interleaved else torch.cat((-x1, x0), -1)
    return torch.cat((part * cos + across * sin, rest), -1)


def transposed(sin, D, interleaved):
    """The sines for the transpose of `eager_rope` of heads of width D: each element has its partner's, negated."""
    if 2 * sin.shape[-1] <= D:
        return -sin
    if interleaved:
        return -sin.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return -sin.roll(sin.shape[-1] // 2, -1)


def eager_attention(q, k, v, see, scale, softcap, sinks):
    """As Hugging Face's eager_attention_forward: scores in q's dtype, softmax in float32, rounded."""
    G = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    s = q @ k.mT * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~see, -math.inf)
    sink = s.new_full((1,), -math.inf) if sinks is None else sinks.to(s.dtype)[None, :, None, None]
    s = torch.cat((s, sink.expand(*s.shape[:-1], 1)), -1).float()
    p = torch.softmax(s, -1).masked_fill((s == -math.inf).all(-1, keepdim=True), 0)
    return p[..., :-1].to(q.dtype) @ v
