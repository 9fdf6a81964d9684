"""Scores and softmax of the portable attention kernels: the online softmax of the forward, p and ds of the backward."""

from __future__ import annotations

from typing import NamedTuple

from llama_kernels.core.language import INTERPRETED, LOG2E, TRITON_VERSION, cast, dot, tl, triton
from llama_kernels.ops.attention.masks import visible
from llama_kernels.ops.attention.tiles import load_tile

COPIES_P: tl.constexpr = tl.constexpr(TRITON_VERSION < (3, 8) and not INTERPRETED)


class SoftmaxState(NamedTuple):
    """The softmax over the keys so far: out = acc / mass and lse = (peak + log2(mass)) / log2(e)."""

    acc: tl.tensor  # [BLOCK_M, BLOCK_DV]
    mass: tl.tensor  # [BLOCK_M]
    peak: tl.tensor  # [BLOCK_M], the largest score, in base 2


class Probs(NamedTuple):
    """The probabilities of a block of keys that mass and peak include, and acc does not: acc * shrink + p @ v does."""

    p: tl.tensor  # [BLOCK_M, BLOCK_N], rounded to v's dtype, as bits
    shrink: tl.tensor  # [BLOCK_M]


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
def as_bits(x):
    """x as integers, for a loop that carries x into the product of its next step.

    Triton would put a carried half-precision tile into shared memory, and wait for the product there. Carried as
    float32, it would take twice the registers.
    """
    return x.to(tl.int32 if x.dtype == tl.float32 else tl.int16, bitcast=True)


@triton.jit
def in_registers_of_its_own(p):
    """A copy of the carried p, which the product reads while the next p is written. Only Hopper needs it.

    Triton writes the next p into the registers of the one before, and up to 3.7 does so before it waits for the
    asynchronous product that reads them, which the PTX ISA leaves undefined (triton#9433). From 3.8 on it makes this
    copy itself.
    """
    if COPIES_P and tl.target_info.cuda_capability_geq(9, 0) and not tl.target_info.cuda_capability_geq(10, 0):
        p = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [p], dtype=p.dtype, is_pure=False, pack=2)
    return p


@triton.jit
def no_probs(V, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Before the first block: all zeros."""
    p = tl.zeros([BLOCK_M, BLOCK_N], V.base.dtype.element_ty)
    return Probs(as_bits(p), tl.zeros([BLOCK_M], tl.float32))


@triton.jit
def online_softmax_step(state, s, unit, v_dtype: tl.constexpr, MASKED: tl.constexpr):
    """`state` after scores s [BLOCK_M, BLOCK_N], except acc, and their probabilities for `add_values`."""
    peak = tl.maximum(state.peak, tl.max(s, 1) * unit)
    base = peak
    if MASKED:  # for a row that saw no key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) is NaN
        base = tl.where(peak == float("-inf"), 0.0, peak)
    p = tl.exp2(s * unit - base[:, None])  # [BLOCK_M, BLOCK_N]
    shrink = tl.exp2(state.peak - base)
    mass = state.mass * shrink + tl.sum(p, 1)
    return SoftmaxState(state.acc, mass, peak), Probs(as_bits(cast(p, v_dtype)), shrink)


@triton.jit
def add_values(state, probs, v):
    """`state` after the values v [BLOCK_N, BLOCK_DV] that belong to `probs`: acc is rescaled, then p @ v is added."""
    acc = dot(probs.p.to(v.dtype, bitcast=True), v, state.acc * probs.shrink[:, None])
    return SoftmaxState(acc, state.mass, state.peak)


@triton.jit
def add_scores(
    state, qk, mask, i, n, scoring, v_dtype: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """`online_softmax_step` of qk = q @ k^T [BLOCK_M, BLOCK_N], where the first key is n."""
    s = logits(qk, scoring)
    if MASKED:
        s = tl.where(visible(mask, i, n + tl.arange(0, BLOCK_N)[None, :]), s, float("-inf"))
    return online_softmax_step(state, s, scoring.unit, v_dtype, MASKED)


@triton.jit
def attend(
    state, probs, q, K, V, mask, i, blocks, begin, end, scoring,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """`state` after the key blocks in [begin, end), which are some of `blocks`, and `probs`.

    With CARRY a step issues its own q @ k^T, then p @ v of the block before, and computes its softmax while the second
    product runs. The loop carries `probs`: call `first_scores` before it and `last_values` after it. Carried values are
    those of the block of keys before, so there is no prefix then.
    """
    limit = blocks.end if MASKED else None
    floor = blocks.first if MASKED and mask.kv_start is not None else None
    prefix = blocks.prefix if MASKED and mask.prefix is not None else None
    v_floor = floor
    if CARRY and mask.kv_start is not None:  # the block before this one may need the mask
        v_floor = blocks.first
    for n in tl.range(begin, end, BLOCK_N):
        k = load_tile(K, n, limit, D, FAR, BLOCK_N, BLOCK_D, floor, prefix)  # [BLOCK_N, BLOCK_D]
        qk = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if CARRY:
            v = load_tile(V, n - BLOCK_N, limit, DV, FAR, BLOCK_N, BLOCK_DV, v_floor)  # [BLOCK_N, BLOCK_DV]
            state = add_values(state, Probs(in_registers_of_its_own(probs.p), probs.shrink), v)
        state, probs = add_scores(state, qk, mask, i, n, scoring, V.base.dtype.element_ty, MASKED, BLOCK_N)
        if not CARRY:
            v = load_tile(V, n, limit, DV, FAR, BLOCK_N, BLOCK_DV, v_floor, prefix)  # [BLOCK_N, BLOCK_DV]
            state = add_values(state, probs, v)
    return state, probs


@triton.jit
def first_scores(
    state, q, K, V, mask, i, blocks, scoring,
    D: tl.constexpr, FAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The softmax step of the first block. If no row sees a key of it, p is 0."""
    floor = blocks.first if mask.kv_start is not None else None
    k = load_tile(K, blocks.begin, blocks.end, D, FAR, BLOCK_N, BLOCK_D, floor)  # [BLOCK_N, BLOCK_D]
    qk = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
    return add_scores(state, qk, mask, i, blocks.begin, scoring, V.base.dtype.element_ty, True, BLOCK_N)


@triton.jit
def last_values(
    state, probs, V, mask, blocks, DV: tl.constexpr, FAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """`state` after the values of the last block. Where there is no block, zeros stand for those of the first."""
    floor = blocks.first if mask.kv_start is not None else None
    last = tl.maximum(tl.cdiv(blocks.end, BLOCK_N) * BLOCK_N - BLOCK_N, blocks.begin)
    return add_values(state, probs, load_tile(V, last, blocks.end, DV, FAR, BLOCK_N, BLOCK_DV, floor))


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
