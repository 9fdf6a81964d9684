"""Whether a kernel's result is right. Three computations of the same inputs stand beside it:

    K  the kernel's result: an output or a gradient
    R  the reference in float64
    I  the ideal: float32 that rounds only where the kernel must round (tests/support/ideal.py)
    E  plain PyTorch eager in the kernel's dtype, what the user would have otherwise

relF(X) is the Frobenius norm of X - R over that of R. u is the relative error that one rounding to the dtype makes.

    rule     bfloat16 and float16                  float32   what breaks it
    bulk     relF(K) <= 1.15 relF(I) + 0.25 u      1.5, 2u   accumulation in low precision
    tail     max|K - R| <= 2 max|I - R| + 2 ulps   3         one wrong element
    rows     worst row of K <= 1.5 worst of I + u  4, 2u     one wrong row: a dropped key, a stale tile
    eager    relF(K) <= 1.05 relF(E)               2         less exact than what the user had
    exact    shape, positions of NaN and of inf    the same  a mask or a bound that is off

Why these factors:
- K and I round at the same places but add in different orders. In bfloat16 and float16 the roundings dominate, and
  over at least 4,096 elements relF(K) and relF(I) differ by a few percent: 1.15 and 1.05. Twice eager, as other
  projects allow, would let a low-precision accumulator pass.
- The maximum and the worst row are single samples of an error: 2 and 1.5. A row of under 32 elements is judged like an
  element. A dropped key is off by ten thousand times as much.
- In float32 nothing is rounded on purpose. I is then one of many float32 computations, and two of them differ by
  chance, most in their maxima: the second column. eager has 2, since flash attention recomputes P from an lse rounded
  to float32, where eager keeps P.
- Where an element is a sum of terms that may cancel (`terms` is their size), the ulps are those of the terms: no order
  of addition keeps more.

I is drawn several times, and each rule takes the worst draw. A GPU's exp2, log2, rsqrt and division have documented
errors (tests/support/hardware.py), whose direction is not documented: the draws have them all up, all down, mixed and
absent. The draws of attention also round P at different places, since the error of a sum over all rows, as the gradient
of a sink is, is otherwise one random number, which may be close to zero. E has no such errors: what they add to I is
added to what E is allowed. No tolerance is an absolute number picked by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.support.launches import KERNELS_RUN

UNIT = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4, torch.float32: 2.5e-7}
DTYPES = tuple(UNIT)  # that the ops take

# The Frobenius norm of fewer elements varies by chance. Only the tail and the rows of them are judged.
_ENOUGH = 4096
# A row of fewer elements is judged like an element.
_WIDE = 32


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """relF: the Frobenius norm of the error over that of the truth."""
    x, truth = x.double(), truth.double()
    return ((x - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def equal_results(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Whether kernels gave the same results, bit for bit. Those of the reference, which adds up in the order of memory,
    may differ by two roundings."""
    if len(a) != len(b):
        return False
    if KERNELS_RUN:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return all(relative_error(x, y) <= 2 * UNIT[x.dtype] for x, y in zip(a, b, strict=True))


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
        # A half-precision result may also overflow where float64 does not. The ideal then overflows too.
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
