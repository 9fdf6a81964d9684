"""Scores and softmax of the portable attention kernels: the online softmax of the forward, p and ds of the backward."""

from __future__ import annotations

from typing import NamedTuple

from llama_kernels.core.language import LOG2E, cast, dot, tl, triton
from llama_kernels.ops.attention.masks import visible
from llama_kernels.ops.attention.tiles import load_keys


class SoftmaxState(NamedTuple):
    """The softmax over the keys so far: out = acc / mass and lse = (peak + log2(mass)) / log2(e)."""

    acc: tl.tensor  # [BLOCK_M, BLOCK_DV]
    mass: tl.tensor  # [BLOCK_M]
    peak: tl.tensor  # [BLOCK_M], the largest score, in base 2


@triton.jit
def tanh(x):
    """tanh to float32 rounding. Near zero by its series, since (1 - e) / (1 + e) loses digits there."""
    z = x * x
    near = x * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def logits(qk, scoring):
    """The scores s of qk = q @ k^T. exp(logit) is exp2(s * scoring.unit)."""
    s = qk
    if scoring.prescale is not None:
        s = qk * scoring.prescale
    if scoring.softcap is not None:
        s = scoring.softcap * tanh(s / scoring.softcap)
    return s


@triton.jit
def online_softmax_step(state, s, unit, MASKED: tl.constexpr):
    """p of scores s [BLOCK_M, BLOCK_N], the factor by which acc shrinks, and the new mass and peak."""
    peak = tl.maximum(state.peak, tl.max(s, 1) * unit)
    base = peak
    if MASKED:  # for a row that saw no key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) is NaN
        base = tl.where(peak == float("-inf"), 0.0, peak)
    p = tl.exp2(s * unit - base[:, None])  # [BLOCK_M, BLOCK_N]
    shrink = tl.exp2(state.peak - base)
    return p, shrink, state.mass * shrink + tl.sum(p, 1), peak


@triton.jit
def add_values(acc, p, shrink, v):
    """acc [BLOCK_M, BLOCK_DV], rescaled, plus p @ v, for which p is rounded to the dtype of v [BLOCK_N, BLOCK_DV]."""
    return dot(cast(p, v.dtype), v, acc * shrink[:, None])


@triton.jit
def attend(state, q, keys, begin, end, scoring, SHAPE: tl.constexpr, MASKED: tl.constexpr):
    """`state` after the key blocks in [begin, end), which are some of `keys.blocks`. q: [BLOCK_M, BLOCK_D]."""
    for n in tl.range(begin, end, SHAPE.BLOCK_N):
        k = load_keys(keys.K, n, keys, SHAPE.D, SHAPE.BLOCK_D, SHAPE, MASKED)  # [BLOCK_N, BLOCK_D]
        s = logits(dot(q, tl.trans(k)), scoring)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            s = tl.where(visible(keys.mask, keys.i, n + tl.arange(0, SHAPE.BLOCK_N)[None, :]), s, float("-inf"))
        p, shrink, mass, peak = online_softmax_step(state, s, scoring.unit, MASKED)
        v = load_keys(keys.V, n, keys, SHAPE.DV, SHAPE.BLOCK_DV, SHAPE, MASKED)  # [BLOCK_N, BLOCK_DV]
        state = SoftmaxState(add_values(state.acc, p, shrink, v), mass, peak)
    return state


@triton.jit
def probs_and_score_grads(qk, dp, lse2, see, scoring):
    """p = exp(logits - lse), and ds, the gradient of q @ k^T but for the factor scoring.scale.

    dp: do @ v^T - delta. lse2: lse in base 2. see: which keys are visible; None: all. lse2 and see broadcast against
    qk, which may be transposed.
    """
    s = logits(qk, scoring)
    p = tl.exp2(s * scoring.unit - lse2)
    if see is not None:
        p = tl.where(see, p, 0.0)
    slope = p  # computed before dp arrives, so that p and the slope of the cap are not held beside dp
    if scoring.softcap is not None:
        capped = s / scoring.softcap
        slope = p * (1.0 - capped * capped)
    return p, slope * dp
