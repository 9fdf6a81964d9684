"""What the attention kernels share on the device: where a tile lies, which blocks it visits, the mask, the softmax.

Names: query row i of a sequence of Sq, key j of one of Sk; BLOCK_M query rows, BLOCK_N keys; D and DV the head widths
of q, k and of v, BLOCK_D and BLOCK_DV the powers of two that hold them. Every tensor is addressed by the strides of
(batch, head, token); packed sequences have batch stride 0 and start at their own token.
"""

from __future__ import annotations

from typing import NamedTuple

from llama_kernels.core.language import LOG2E, cast, dot, tl, triton


class Matrix(NamedTuple):
    """One head of one sequence: row r begins at base + r * stride."""

    base: tl.tensor
    stride: tl.tensor


class Mask(NamedTuple):
    """What decides whether query i sees key j. A None asks nothing."""

    shift: tl.tensor  # Sk - Sq: query i stands at key i + shift, the last query at the last key
    left: tl.tensor  # keys before its own that a query sees
    right: tl.tensor  # keys after its own that a query sees; 0 is causal
    kv_start: tl.tensor  # the first key each row of a tile sees, in the shape of i
    kv_end: tl.tensor  # past the last one, likewise
    Sk: tl.tensor  # keys; None where keys past the end may get anything
    keys: tl.tensor = None  # pointer to one bool a key, False for a key that no query sees; needs Sk


class KeyBlocks(NamedTuple):
    """Whole blocks, whatever the numbers: begin <= full_begin <= full_end. From full_begin to full_end, no mask."""

    begin: tl.tensor
    full_begin: tl.tensor
    full_end: tl.tensor
    end: tl.tensor  # to the key, like first: outside of them nothing is read, which may be anything
    first: tl.tensor  # of use with kv_start only


class SoftmaxState(NamedTuple):
    """Softmax over the keys so far: out = acc / mass and lse = (peak + log2(mass)) / log2(e)."""

    acc: tl.tensor  # [BLOCK_M, BLOCK_DV]
    mass: tl.tensor  # [BLOCK_M]
    peak: tl.tensor  # [BLOCK_M], the largest score, in base 2


class Probs(NamedTuple):
    """Of a block of keys that mass and peak have in them, and acc has not: it becomes acc * shrink + p @ v."""

    p: tl.tensor  # [BLOCK_M, BLOCK_N], rounded to v's dtype, as bits
    shrink: tl.tensor  # [BLOCK_M]


# --- where things lie ------------------------------------------------------------------------------------------------


@triton.jit
def query_tile(pid, sizes, BLOCK_M: tl.constexpr):
    """First row, head and batch of a program over row tiles. The last rows, which a causal mask makes the longest, come
    first; heads run fastest, so that neighbours share keys."""
    heads = sizes.B * sizes.Hq
    tile = tl.num_programs(0) // heads - 1 - pid // heads
    return tile * BLOCK_M, pid % sizes.Hq, pid // sizes.Hq % sizes.B


@triton.jit
def sequence(cu_seqlens_ptr, b, size, minus_longest):
    """First token and length of sequence b: all of it, or as cu_seqlens says, but never outside of the tensor, and no
    longer than -minus_longest (layout.size_arguments says why it is negative)."""
    start = tl.cast(0, tl.int64)
    length = size
    if cu_seqlens_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b), 0), size)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1), first), size)
        start = first.to(tl.int64)
        length = tl.minimum(last - first, -minus_longest)
    return start, length


@triton.jit
def offset(strides, b, h, start):
    """Of head h of a sequence, in elements. 64-bit: any of the products may pass 2^31."""
    return tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1] + start * strides[2]


@triton.jit
def matrix(ptr, strides, b, h, start):
    return Matrix(ptr + offset(strides, b, h, start), strides[2])


@triton.jit
def _tile_ptrs(x, first, FAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    if FAR:  # a stride so long that even BLOCK of them pass 2^31
        rows = rows.to(tl.int64)
    return x.base + tl.cast(first, tl.int64) * x.stride + (rows[:, None] * x.stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_tile(
    x, first, limit, D: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, floor=None
):  # fmt: skip
    """Rows first to first + BLOCK, as [BLOCK, BLOCK_D]; zeros past D, from row `limit` on and before row `floor`, where
    they are given."""
    ptrs = _tile_ptrs(x, first, FAR, BLOCK, BLOCK_D)
    rows, d = first + tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    there = None
    if limit is not None:
        there = rows < limit
    if floor is not None:
        there = _both(there, rows >= floor)
    if D != BLOCK_D:
        there = _both(there, d < D)
    return tl.load(ptrs) if there is None else tl.load(ptrs, mask=there, other=0.0)


@triton.jit
def store_tile(
    x, first, limit, tile, D: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Round `tile` [BLOCK, BLOCK_D] once and store its rows below `limit`, its columns below D."""
    there = (first + tl.arange(0, BLOCK)[:, None] < limit) & (tl.arange(0, BLOCK_D)[None, :] < D)
    tl.store(_tile_ptrs(x, first, FAR, BLOCK, BLOCK_D), cast(tile, x.base.dtype.element_ty), mask=there)


@triton.jit
def load_bound(ptr, strides, b, start, i, Sq):
    """kv_start or kv_end of rows i, in their shape, None where there is none. Rows from Sq on repeat row Sq - 1, and so
    change no range."""
    bound = None
    if ptr is not None:
        bound = tl.load(ptr + offset(strides, b, 0, start) + tl.minimum(i, Sq - 1).to(tl.int64) * strides[2])
    return bound


# --- the mask, and which blocks it leaves ----------------------------------------------------------------------------


@triton.jit
def _both(see, more):
    return more if see is None else see & more


@triton.jit
def visible(mask, i, j):
    """May query i see key j? The one predicate of the package, in the shape that i and j broadcast to.

    What bounds a row from one side is first made one bound, in the shape of i: that takes fewer registers than a
    compare of each.
    """
    begin, end = mask.kv_start, mask.kv_end
    if mask.left is not None:
        own = i + (mask.shift - mask.left)
        begin = own if begin is None else tl.maximum(begin, own)
    if mask.right is not None:
        own = i + (mask.shift + mask.right + 1)
        end = own if end is None else tl.minimum(end, own)
    see = None
    if mask.Sk is not None:
        see = j < mask.Sk
    if mask.keys is not None:
        see = tl.load(mask.keys + j, mask=see, other=False)
    if end is not None:
        see = _both(see, j < end)
    if begin is not None:
        see = _both(see, j >= begin)
    return see


@triton.jit
def key_blocks(mask, first, last, BLOCK_N: tl.constexpr):
    """The blocks of keys that any of query rows first to last sees, and those that all of them see whole.

    Where nothing cuts the keys off from below they start at 0, as a constant: ptxas serialises the tensor-core pipeline
    of a first loop whose start it cannot see.
    """
    begin, full_begin = 0, 0
    end, full_end = mask.Sk, mask.Sk
    if mask.left is not None:
        begin, full_begin = first + mask.shift - mask.left, last + mask.shift - mask.left
    if mask.right is not None:
        end = tl.minimum(end, last + mask.shift + mask.right + 1)
        full_end = tl.minimum(full_end, first + mask.shift + mask.right + 1)
    if mask.kv_start is not None:
        begin, full_begin = tl.maximum(begin, tl.min(mask.kv_start)), tl.maximum(full_begin, tl.max(mask.kv_start))
    if mask.kv_end is not None:
        end, full_end = tl.minimum(end, tl.max(mask.kv_end)), tl.minimum(full_end, tl.min(mask.kv_end))
    end = tl.maximum(end, 0)
    lowest = 0
    if mask.kv_start is not None:
        lowest = begin
    if mask.left is not None or mask.kv_start is not None:
        begin = tl.minimum(tl.maximum(begin, 0), end) // BLOCK_N * BLOCK_N
        full_begin = tl.minimum(tl.cdiv(tl.maximum(full_begin, begin), BLOCK_N), tl.cdiv(end, BLOCK_N)) * BLOCK_N
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N, full_begin)
    return KeyBlocks(begin, full_begin, full_end, end, lowest)


@triton.jit
def query_blocks(mask, first, last, begin, end, BLOCK_M: tl.constexpr):
    """First row and end of the blocks of query rows, of those from begin to end, that see any of keys first to last."""
    if mask.right is not None:
        begin = tl.maximum(first - mask.shift - mask.right, begin)
    if mask.left is not None:
        end = tl.minimum(end, last - mask.shift + mask.left + 1)
    return begin // BLOCK_M * BLOCK_M, end


# --- scores and softmax ----------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """To float32 rounding. Near zero by its series: (1 - e) / (1 + e) cancels there."""
    z = x * x
    near = x * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def logits(qk, scoring):
    """q @ k^T as the softmax takes it, in units of scoring.unit: exp(logit) is exp2(s * unit)."""
    s = qk
    if scoring.prescale is not None:
        s = qk * scoring.prescale
    if scoring.softcap is not None:
        s = scoring.softcap * tanh(s / scoring.softcap)
    return s


@triton.jit
def as_bits(x):
    """For what goes round a loop into a product. A half-precision tile Triton puts into shared memory there, and waits
    for the product; a float32 one takes twice the registers."""
    return x.to(tl.int32 if x.dtype == tl.float32 else tl.int16, bitcast=True)


@triton.jit
def no_probs(V, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What stands for them before the first block."""
    p = tl.zeros([BLOCK_M, BLOCK_N], V.base.dtype.element_ty)
    return Probs(as_bits(p), tl.zeros([BLOCK_M], tl.float32))


@triton.jit
def online_softmax_step(state, s, unit, v_dtype: tl.constexpr, MASKED: tl.constexpr):
    """Take in scores s [BLOCK_M, BLOCK_N]: `state` but for acc, and the probabilities for `add_values`."""
    peak = tl.maximum(state.peak, tl.max(s, 1) * unit)
    base = peak
    if MASKED:  # where no key was seen yet: exp2(-inf - 0) is 0, exp2(-inf + inf) is not
        base = tl.where(peak == float("-inf"), 0.0, peak)
    p = tl.exp2(s * unit - base[:, None])  # [BLOCK_M, BLOCK_N]
    shrink = tl.exp2(state.peak - base)
    mass = state.mass * shrink + tl.sum(p, 1)
    return SoftmaxState(state.acc, mass, peak), Probs(as_bits(cast(p, v_dtype)), shrink)


@triton.jit
def add_values(state, probs, v):
    """Take in the values v [BLOCK_N, BLOCK_DV] of the last scores: rescale what is there, add what comes."""
    acc = dot(probs.p.to(v.dtype, bitcast=True), v, state.acc * probs.shrink[:, None])
    return SoftmaxState(acc, state.mass, state.peak)


@triton.jit
def add_scores(
    state, qk, mask, i, n, scoring, v_dtype: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The softmax step of q @ k^T [BLOCK_M, BLOCK_N], of the keys from n on."""
    s = logits(qk, scoring)
    if MASKED:
        s = tl.where(visible(mask, i, n + tl.arange(0, BLOCK_N)[None, :]), s, float("-inf"))
    return online_softmax_step(state, s, scoring.unit, v_dtype, MASKED)


@triton.jit
def attend(
    state, probs, q, K, V, mask, i, blocks, begin, end, scoring,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr, MASKED: tl.constexpr, CARRY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """`state` after the key blocks from begin to end, of those that `blocks` names.

    With CARRY a step issues its own q @ k^T and then p @ v of the block before, and runs its softmax beneath the second
    product. So `probs` go round the loop: `first_scores` come before it, `last_values` after.
    """
    limit = blocks.end if MASKED else None
    floor = blocks.first if MASKED and mask.kv_start is not None else None
    v_floor = floor
    if CARRY and mask.kv_start is not None:  # the block before a whole one need not be whole
        v_floor = blocks.first
    for n in tl.range(begin, end, BLOCK_N):
        k = load_tile(K, n, limit, D, FAR, BLOCK_N, BLOCK_D, floor)  # [BLOCK_N, BLOCK_D]
        qk = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if CARRY:
            v = load_tile(V, n - BLOCK_N, limit, DV, FAR, BLOCK_N, BLOCK_DV, v_floor)  # [BLOCK_N, BLOCK_DV]
            state = add_values(state, probs, v)
        state, probs = add_scores(state, qk, mask, i, n, scoring, V.base.dtype.element_ty, MASKED, BLOCK_N)
        if not CARRY:
            v = load_tile(V, n, limit, DV, FAR, BLOCK_N, BLOCK_DV, v_floor)  # [BLOCK_N, BLOCK_DV]
            state = add_values(state, probs, v)
    return state, probs


@triton.jit
def first_scores(
    state, q, K, V, mask, i, blocks, scoring,
    D: tl.constexpr, FAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The softmax step of the first block. Where there is none, no row sees any of its keys, and p is 0."""
    floor = blocks.first if mask.kv_start is not None else None
    k = load_tile(K, blocks.begin, blocks.end, D, FAR, BLOCK_N, BLOCK_D, floor)  # [BLOCK_N, BLOCK_D]
    qk = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
    return add_scores(state, qk, mask, i, blocks.begin, scoring, V.base.dtype.element_ty, True, BLOCK_N)


@triton.jit
def last_values(
    state, probs, V, mask, blocks, DV: tl.constexpr, FAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """`state` with the values of the last block; of the first, unread, where there is none."""
    floor = blocks.first if mask.kv_start is not None else None
    last = tl.maximum(tl.cdiv(blocks.end, BLOCK_N) * BLOCK_N - BLOCK_N, blocks.begin)
    return add_values(state, probs, load_tile(V, last, blocks.end, DV, FAR, BLOCK_N, BLOCK_DV, floor))


@triton.jit
def probs_and_score_grads(qk, dp, lse2, see, scoring):
    """p = exp(logits - lse) and ds = p dp, with delta taken off dp already, on the way back to q @ k^T, short of the
    factor scoring.scale. Either way up: lse2 (lse in base 2) and see, which may be None, broadcast against qk.
    """
    s = logits(qk, scoring)
    p = tl.exp2(s * scoring.unit - lse2)
    if see is not None:
        p = tl.where(see, p, 0.0)
    slope = p  # made before dp is there: so p and the slope of the cap are not held beside it
    if scoring.softcap is not None:
        capped = s / scoring.softcap
        slope = p * (1.0 - capped * capped)
    return p, slope * dp
