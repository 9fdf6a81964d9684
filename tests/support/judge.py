"""What counts as right.

Three computations of the same inputs stand beside a kernel's result K:

    R  the reference in float64: the truth;
    I  the ideal: float32 that rounds only where the kernel's contract rounds (inputs, P and dS before a product, lse in
       base e and in base 2, the output). No kernel of this dtype can be expected to do better;
    E  plain PyTorch eager in the kernel's dtype: what the user had.

A GPU's exp2, log2, rsqrt and division are not rounded to nearest: their documented errors (tests/support/hardware.py)
are larger than a rounding of float32, and show in float32 results. So I uses functions with these errors. Which way
each one errs is not documented; so I is drawn with all errors one way, all the other way, some of each, and none, and
the rules below take the worst of the draws. Plain PyTorch eager has no such errors: what they add to I is added to what
E has. The results of Triton's interpreter, which has none either, are judged by the same rules as those of a GPU.
The draws of attention also round P at other places (Arithmetic.above): the error of a sum over all rows, as the
gradient of a sink is, is otherwise one random number for I, and now and then close to zero.

`judge` holds K against them, for an output or a gradient. u is the relative error that one rounding to the dtype makes.

    bulk     relF(K) <= 1.15 relF(I) + 0.25 u      a low-precision accumulator; "twice eager" would let it pass
    tail     max|K - R| <= 2 max|I - R| + 2 ulps    a wrong element
    rows     worst row of K <= 1.5 worst of I + u   a dropped key, a stale row; 2 for rows of under 32 elements
    eager    relF(K) <= 1.05 relF(E)                never worse than before
    exact    shape, the places of NaN and inf

Where an element is a sum that may cancel (`terms` of that size were added up), the ulps are those of the terms: no
order of adding keeps more.

In float32 nothing is rounded on purpose: I is then one more float32 computation in an order of its own, and two such
differ by chance, most in their maxima over few rows. There the factors are 1.5, 3, 4 and 2, and u counts twice. The
last is no chance: flash attention recomputes P from an lse rounded to float32, where eager keeps P. A dropped key is
off by ten thousand times as much.

Nothing here is an absolute tolerance picked by hand.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from llama_kernels.core.language import INTERPRETED
from tests.support.hardware import DRAWS, EXACT, Arithmetic

LOG2E = math.log2(math.e)
UNIT = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 2.5e-7}

# Below this many elements a Frobenius norm is itself a matter of luck, and only the tail and the rows speak.
_ENOUGH = 4096
# A row of fewer elements is judged as an element is: its norm, too, is a matter of luck.
_WIDE = 32


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """relF: the Frobenius norm of the error over that of the truth."""
    x, truth = x.double(), truth.double()
    return ((x - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def judge(
    name: str,
    K: torch.Tensor,
    R: torch.Tensor,
    I: torch.Tensor | Sequence[torch.Tensor],
    E: torch.Tensor | None = None,
    terms: float = 0.0,
) -> None:
    """Raise AssertionError, naming the rule, where K is not as good as it must be. I is one draw of the ideal or
    several; all are of one shape."""
    dtype = K.dtype
    u, ulp = UNIT[dtype], torch.finfo(dtype).eps
    assert K.shape == R.shape, f"{name}: shape {tuple(K.shape)}, not {tuple(R.shape)}"
    K, R = K.detach().cpu().double(), R.detach().cpu().double()
    I = torch.stack([draw.detach().cpu().double() for draw in ([I] if isinstance(I, torch.Tensor) else I)])
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        # Not only the truth's own: a half-precision result may overflow where float64 does not, as the ideal then does.
        there = what(R) | what(I).all(0) | (what(I).any(0) & what(K))
        assert torch.equal(what(K), there), f"{name}: {what.__name__} elsewhere than in the reference"
    finite = R.isfinite() & I.isfinite().all(0)
    K, R, I = (x.masked_fill(~finite, 0) for x in (K, R, I))
    if not R.any():
        assert not K.any(), f"{name}: zero in the reference, {K.abs().max():.3g} here"
        return

    error_K, error_I = K - R, I - R
    by_chance = dtype == torch.float32
    bulk_by, tail_by, rows_by, units, eager_by = (1.5, 3, 4, 2, 2) if by_chance else (1.15, 2, 1.5, 1, 1.05)
    largest = max(R.abs().max().item(), terms)
    tail, allowed = error_K.abs().max().item(), tail_by * error_I.abs().max().item() + 2 * ulp * largest
    assert tail <= allowed, f"{name}: largest error {tail:.3g}, allowed {allowed:.3g}"
    if R.ndim and R.shape[-1] > 1:
        size = R.norm(dim=-1)
        floor = max(0.1 * size.square().mean().sqrt().item(), terms)
        rows_K, rows_I = (e.norm(dim=-1) / size.clamp_min(floor) for e in (error_K, error_I))
        rows_by = rows_by if R.shape[-1] >= _WIDE else max(rows_by, tail_by)
        worst, allowed = rows_K.max().item(), rows_by * rows_I.max().item() + units * u
        assert worst <= allowed, f"{name}: worst row off by {worst:.3g}, allowed {allowed:.3g}"
    if R.numel() >= _ENOUGH:
        bulk, of_draws = relative_error(K, R), [relative_error(draw, R) for draw in I]
        allowed = bulk_by * max(of_draws) + 0.25 * units * u
        assert bulk <= allowed, f"{name}: relative error {bulk:.3g}, allowed {allowed:.3g}"
        if E is not None:
            theirs = relative_error(E.detach().cpu().double().masked_fill(~finite, 0), R)
            allowed = eager_by * theirs + max(of_draws) - min(of_draws)
            assert bulk <= allowed, f"{name}: relative error {bulk:.3g}, eager's {theirs:.3g}"


# --- the mask --------------------------------------------------------------------------------------------------------


def attention_mask(Sq, Sk, is_causal, window_size, kv_start, kv_end, device):
    """Who sees whom, (1 or B, 1, Sq, Sk): the definition, word by word. Query Sq - 1 stands at key Sk - 1."""
    left, right = window_size
    i = torch.arange(Sq, device=device)[:, None] + Sk - Sq
    j = torch.arange(Sk, device=device)
    see = torch.ones(1, 1, Sq, Sk, dtype=torch.bool, device=device)
    see = see & (j <= i) if is_causal else see
    see = see & (i - j <= left) if left >= 0 else see
    see = see & (j - i <= right) if right >= 0 else see
    see = see if kv_start is None else see & (j >= kv_start[:, None, :, None])
    return see if kv_end is None else see & (j < kv_end[:, None, :, None])


# --- the ideal -------------------------------------------------------------------------------------------------------


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 that has been through `dtype` once."""
    return x.to(dtype).float()


def rounds_p(device: torch.device) -> bool:
    """Whether kernels compute on this device, which round P before it meets v. Plain PyTorch, which CPU tensors take
    outside of Triton's interpreter, does not."""
    return device.type != "cpu" or INTERPRETED


def drawn(ideal: Callable[..., Sequence[torch.Tensor | None]], *call: Any, **options: Any) -> list[list[torch.Tensor]]:
    """The results of `ideal(*call, by=arithmetic, **options)` that are not None, each as a list of its draws: under the
    errors of a GPU's instructions, or one draw without them where plain PyTorch computes."""
    device = next(x.device for x in call if isinstance(x, torch.Tensor))
    draws = [ideal(*call, by=arithmetic, **options) for arithmetic in (DRAWS if rounds_p(device) else [EXACT])]
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


def ideal_norm_rope(x, weight, cos, sin, interleaved, eps, offset, dy, by: Arithmetic = EXACT):
    """(y, dx, dweight or None) of heads (..., D) that are normed, then rotated: float32, every result rounded once."""
    D = x.shape[-1]
    rstd = by.inverse_root(_mean(x.float().square(), by) + eps)
    xhat = x.float() * rstd
    scale = 1.0 if weight is None else offset + weight.float()
    y = eager_rope(xhat * scale, cos, sin, interleaved)
    turned_back = eager_rope(dy.float(), cos, transposed(sin, D, interleaved), interleaved)
    g = turned_back * scale
    dx = rstd * (g - xhat * _mean(g * xhat, by))
    dweight = None if weight is None else (turned_back * xhat).reshape(-1, D).sum(0).to(weight.dtype)
    return y.to(x.dtype), dx.to(x.dtype), dweight


def ideal_attention(
    q, k, v, see, scale, softcap, sinks, do, dlse, closing=lambda grad: grad, by: Arithmetic = EXACT
):  # fmt: skip
    """(out, lse, dq, dk, dv, dsinks or None) of dense attention. `see` broadcasts to (B, Hq, Sq, Sk). `closing` is done
    to dq and dk before they are rounded."""
    dtype, Hkv = q.dtype, k.shape[1]
    G = q.shape[1] // Hkv
    q_, do_ = q.float(), do.float()
    k_, v_ = (x.float().repeat_interleave(G, 1) for x in (k, v))

    def capped(s):
        return by.divide(s, torch.tensor(float(softcap), device=s.device))

    def scores(qk):
        s = qk * scale if softcap is None else softcap * by.tanh(capped(qk * scale))
        return s.masked_fill(~see, -math.inf)

    s = scores(q_ @ k_.mT)
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
    s = scores(q_.flip(-1) @ k_.flip(-1).mT)  # recomputed in another order: its roundings do not cancel those in lse
    p = by.exp2(s * LOG2E - lse.masked_fill(empty, 0) * LOG2E)
    ds = p * (do_ @ v_.mT - delta)
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
    cos, sin, turned, rest = cos.to(x.dtype), sin.to(x.dtype), x[..., :R], x[..., R:]
    x0, x1 = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    across = torch.stack((-x1, x0), -1).flatten(-2) if interleaved else torch.cat((-x1, x0), -1)
    return torch.cat((turned * cos + across * sin, rest), -1)


def transposed(sin, D, interleaved):
    """The sines with which `eager_rope` of heads of width D is its own transpose: each element has its partner's."""
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


# --- guards ----------------------------------------------------------------------------------------------------------

_BAND = 256  # elements of NaN before and after


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x`, of its strides, amid NaN: whoever reads past its ends shows it in the result."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    fill = math.nan if x.dtype.is_floating_point else torch.iinfo(x.dtype).max
    buffer = torch.full((extent + 2 * _BAND,), fill, dtype=x.dtype, device=x.device)
    inner = buffer.as_strided(x.shape, x.stride(), _BAND)
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())
    with torch.no_grad():
        inner[once].copy_(x[once])
    return inner.requires_grad_(x.requires_grad)


@contextlib.contextmanager
def guarded_allocations() -> Iterator[None]:
    """Whatever is allocated inside lies amid guards; on leaving, whoever wrote into one is an error."""
    buffers: list[tuple[torch.Tensor, int]] = []
    new_empty = torch.Tensor.new_empty

    def allocate(
        shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
        buffer = torch.zeros(extent + 2 * _BAND, dtype=dtype, device=device)
        if dtype.is_floating_point:
            buffer[_BAND : _BAND + extent] = math.nan
        buffer[:_BAND] = buffer[_BAND + extent :] = 7
        buffers.append((buffer, extent))
        return buffer.as_strided(shape, strides, _BAND)

    def guarded_empty_strided(shape, strides, *, dtype, device):
        return allocate(tuple(shape), tuple(strides), dtype, device)

    def guarded_new_empty(self, *shape, dtype=None, **elsewhere):
        if elsewhere:  # not a launcher's: Triton's interpreter allocates too
            return new_empty(self, *shape, dtype=dtype, **elsewhere)
        shape = tuple(shape[0]) if shape and isinstance(shape[0], (tuple, list, torch.Size)) else tuple(shape)
        strides = torch.empty(shape, device="meta").stride()
        return allocate(shape, strides, dtype or self.dtype, self.device)

    with (
        mock.patch.object(torch, "empty_strided", guarded_empty_strided),
        mock.patch.object(torch.Tensor, "new_empty", guarded_new_empty),
    ):
        yield
    for buffer, extent in buffers:
        untouched = (buffer[:_BAND] == 7).all() and (buffer[_BAND + extent :] == 7).all()
        assert untouched, f"written outside of an allocation of {extent} elements"


def relaid(x: torch.Tensor, seed: int | None) -> torch.Tensor:
    """`x` with its leading dimensions in another memory order, those of one element with a stride that means nothing.
    None: as it is."""
    if seed is None or not x.numel():
        return x
    generator = torch.Generator().manual_seed(seed)
    order = [*torch.randperm(x.ndim - 1, generator=generator).tolist(), x.ndim - 1]
    dense = x.detach().permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])
    strange = torch.randint(0, 10**8, (x.ndim,), generator=generator).tolist()
    strides = [s if n > 1 else t for n, s, t in zip(x.shape[:-1], dense.stride(), strange, strict=False)]
    return dense.as_strided(x.shape, (*strides, 1)).requires_grad_(x.requires_grad)


def memory_order(x: torch.Tensor) -> list[int]:
    """Strides, but of dimensions of one element, which may be anything."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


@contextlib.contextmanager
def unchanged(*tensors: torch.Tensor | None) -> Iterator[None]:
    """Inputs and gradients that go in stay as they are, bit for bit."""
    before = [None if x is None else x.detach().clone() for x in tensors]
    yield
    for i, (x, copy) in enumerate(zip(tensors, before, strict=True)):
        if x is not None:
            assert torch.equal(x.detach().nan_to_num(nan=1.5), copy.nan_to_num(nan=1.5)), f"tensor {i} was changed"
