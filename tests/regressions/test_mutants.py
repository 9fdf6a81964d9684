"""The suite must fail where a kernel is wrong: each planted mistake is one that the parity tests have to catch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama_kernels.core.language import INTERPRETED, cast, tl, triton
from llama_kernels.core.launch_cache import Launch
from llama_kernels.ops import qk_norm_rope, rms_norm, rope
from llama_kernels.ops.attention import backward, decode, dkdv, dq, forward, masks, softmax
from llama_kernels.ops.attention.call import AttentionCall
from llama_kernels.ops.attention.masks import KeyBlocks, Mask
from llama_kernels.ops.attention.softmax import Probs, SoftmaxState
from llama_kernels.ops.attention.tables import Tile
from llama_kernels.ops.partials import sum_partials
from llama_kernels.ops.rotation import Angles, inverse_rotation, load_angles, load_pairs
from tests.support import attention as attention_cases
from tests.support import decode as decode_cases
from tests.support import qk_norm_rope as qk_norm_rope_cases
from tests.support import rms_norm as rms_norm_cases
from tests.support import rope as rope_cases
from tests.support import rope_attention as rope_attention_cases
from tests.support.planted import check_catches

pytestmark = pytest.mark.interpreter

online_softmax_step, add_values, first_scores = softmax.online_softmax_step, softmax.add_values, softmax.first_scores
visible, key_blocks = masks.visible, masks.key_blocks
probs_and_score_grads, load_summed, load_scale = (
    softmax.probs_and_score_grads,
    rms_norm._load_summed,
    rms_norm._load_scale,
)
add_chunks = decode._add_chunks


@triton.jit
def accumulator_in_half_precision(state, probs, v):
    state = add_values(state, probs, v)
    return SoftmaxState(cast(state.acc, v.dtype).to(tl.float32), state.mass, state.peak)


@triton.jit
def mass_not_rescaled(state, s, unit, v_dtype: tl.constexpr, MASKED: tl.constexpr):
    after, probs = online_softmax_step(state, s, unit, v_dtype, MASKED)
    mass = after.mass + state.mass * (1.0 - tl.exp2(state.peak - after.peak))
    return SoftmaxState(after.acc, mass, after.peak), probs


@triton.jit
def last_values_dropped(
    state, probs, V, mask, blocks, DV: tl.constexpr, FAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    return SoftmaxState(state.acc * probs.shrink[:, None], state.mass, state.peak)


@triton.jit
def first_scores_twice(
    state, q, K, V, mask, i, blocks, scoring,
    D: tl.constexpr, FAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    state, _ = first_scores(state, q, K, V, mask, i, blocks, scoring, D, FAR, BLOCK_N, BLOCK_D)
    return first_scores(state, q, K, V, mask, i, blocks, scoring, D, FAR, BLOCK_N, BLOCK_D)


@triton.jit
def carried_without_rescaling(state, probs, v):
    return SoftmaxState(add_values(state, Probs(probs.p, probs.shrink * 0.0 + 1.0), v).acc, state.mass, state.peak)


@triton.jit
def one_key_too_many(mask, i, j):
    right = None if mask.right is None else mask.right + 1
    return visible(Mask(mask.shift, mask.left, right, mask.kv_start, mask.kv_end, mask.Sk), i, j)


@triton.jit
def window_one_short(mask, i, j):
    left = None if mask.left is None else mask.left - 1
    return visible(Mask(mask.shift, left, mask.right, mask.kv_start, mask.kv_end, mask.Sk), i, j)


@triton.jit
def key_mask_forgotten(mask, i, j):
    return visible(Mask(mask.shift, mask.left, mask.right, mask.kv_start, mask.kv_end, mask.Sk), i, j)


@triton.jit
def key_mask_of_the_block(mask, i, j):
    """One answer for all keys of a block, that of its first key."""
    see = visible(Mask(mask.shift, mask.left, mask.right, mask.kv_start, mask.kv_end, mask.Sk), i, j)
    return see & tl.load(mask.keys + j - tl.arange(0, j.shape[1])[None, :])


@triton.jit
def last_keys_dropped(mask, first, last, BLOCK_N: tl.constexpr):
    blocks = key_blocks(mask, first, last, BLOCK_N)
    return KeyBlocks(blocks.begin, blocks.full_begin, blocks.full_end, blocks.full_end, blocks.first)


@triton.jit
def boundary_block_not_masked(mask, first, last, BLOCK_N: tl.constexpr):
    blocks = key_blocks(mask, first, last, BLOCK_N)
    full_end = tl.minimum(blocks.full_end + BLOCK_N, blocks.end)
    return KeyBlocks(blocks.begin, blocks.full_begin, full_end, blocks.end, blocks.first)


@triton.jit
def tile_of_the_scores_in_half_precision(qk, dp, lse2, see, scoring):
    p, ds = probs_and_score_grads(cast(qk, tl.float16).to(tl.float32), dp, lse2, see, scoring)
    return p, ds


@triton.jit
def chunks_not_rescaled(state, part, lse2):
    after = add_chunks(state, part, lse2)
    return SoftmaxState(after.acc, after.mass + state.mass * (1.0 - tl.exp2(state.peak - after.peak)), after.peak)


@triton.jit
def sum_not_rounded(x_rows, residual_rows, s_ptr, cols, mask):
    s = rms_norm._load(x_rows, cols, mask)
    if residual_rows is not None:
        s += rms_norm._load(residual_rows, cols, mask)
    return s


@triton.jit
def weight_forgotten(weight_ptr, cols, offset, N: tl.constexpr):
    return load_scale(weight_ptr, cols, offset, N) * 0.0 + 1.0


@triton.jit
def offset_forgotten(weight_ptr, cols, offset, N: tl.constexpr):
    return load_scale(weight_ptr, cols, 0.0, N)


@triton.jit
def pairs_swapped(vectors, there, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
    x0, x1 = load_pairs(vectors, there, HALF, INTERLEAVED, BLOCK_R)
    return x1, x0


@triton.jit
def first_entries_twice(
    tables, b, s, live,
    HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    angles = load_angles(
        tables, b, s, live,
        HALF, FULL, INTERLEAVED, INVERSE, BLOCK_R,
    )  # fmt: skip
    return Angles(angles.cos0, angles.cos0, angles.sin0, angles.sin0)


@triton.jit
def inverse_for_the_transpose(
    tables, b, s, live,
    HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    angles = load_angles(
        tables, b, s, live,
        HALF, FULL, INTERLEAVED, INVERSE, BLOCK_R,
    )  # fmt: skip
    if INVERSE:
        angles = Angles(angles.cos0, angles.cos1, angles.sin1, angles.sin0)
    return angles


@triton.jit
def sum_over_the_rotated_dims(a, b):
    return tl.sum(a.x0 * b.x0 + a.x1 * b.x1, 2)[:, :, None]


@triton.jit
def turned_on_instead_of_back(
    x, tables, b, s, live,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """By the transpose of what turns back: the same angles, the other way."""
    x0, x1 = tl.split(x.reshape(BLOCK, 2, BLOCK_D // 2).permute(0, 2, 1))
    swapped = tl.join(x1, x0).permute(0, 2, 1).reshape(BLOCK, BLOCK_D)
    y = inverse_rotation(
        swapped, tables, b, s, live,
        HALF, INTERLEAVED, BLOCK, BLOCK_D,
    )  # fmt: skip
    y0, y1 = tl.split(y.reshape(BLOCK, 2, BLOCK_D // 2).permute(0, 2, 1))
    return tl.join(y1, y0).permute(0, 2, 1).reshape(BLOCK, BLOCK_D)


@triton.jit
def turned_back_by_the_next_row(
    x, tables, b, s, live,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    return inverse_rotation(
        x, tables, b, s + 1, live,
        HALF, INTERLEAVED, BLOCK, BLOCK_D,
    )  # fmt: skip


@triton.jit
def turned_back_after_rounding(
    x, tables, b, s, live,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x = cast(x, tl.bfloat16).to(tl.float32)
    return inverse_rotation(
        x, tables, b, s, live,
        HALF, INTERLEAVED, BLOCK, BLOCK_D,
    )  # fmt: skip


def last_partial_dropped(partials: torch.Tensor, out: torch.Tensor) -> Launch:
    return sum_partials(partials[:-1], out)


def _one_head_for_all(call: AttentionCall) -> Any:
    sizes = _sizes.fget(call)
    return sizes._replace(group=sizes.Hq)


def _delta_forgotten(*call: Any) -> Any:
    lse2, delta, dsinks = _launch_delta(*call)
    return lse2, delta.zero_(), dsinks


_sizes, _launch_delta = AttentionCall.sizes, backward.launch_delta
_DENSE = attention_cases.Case(1, 4, 2, 70, 90, 32, 32)
_WINDOW = attention_cases.Case(1, 2, 2, 70, 90, 32, 32, window_size=(20, 0))
_DECODING = attention_cases.Case(1, 4, 2, 2, 150, 32, 32)
_LONG = attention_cases.Case(1, 2, 2, 64, 512, 32, 32, is_causal=False)


def attention(case: attention_cases.Case, dtype: torch.dtype = torch.float16, carry: bool = False) -> None:
    attention_cases.check(case, dtype, torch.device("cpu"), tile=Tile(32, 16, 4, 1, carry=carry))


def decoding() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "chunk_of", lambda Sk: attention_cases.CHUNK)
        patch.setattr(decode, "_CHUNKS_PER_STEP", 2)
        attention(_DECODING)


def masked_decoding() -> None:
    decode_cases.check(decode_cases.Case(2, 4, 2, 2, 100, 16, 16), torch.float16, torch.device("cpu"))


def norm(**options: Any) -> None:
    rms_norm_cases.check((70, 96), torch.bfloat16, torch.device("cpu"), **options)


def rotation() -> None:
    q, k = rope_cases.qk(1, 2, 2, 13, 32, torch.float16, torch.device("cpu"))
    rope_cases.check(q, k, *rope_cases.tables(13, 32, torch.device("cpu")))


def rotation_by_element() -> None:
    device = torch.device("cpu")
    q, k = rope_cases.qk(1, 2, 2, 9, 32, torch.float16, device)
    rope_cases.check(q, k, *rope_cases.unlike_tables(9, 32, device))


def heads_by_element() -> None:
    device, D = torch.device("cpu"), 32
    q, k = rope_cases.qk(1, 2, 2, 9, D, torch.float16, device)
    qk_norm_rope_cases.check(
        q, k, *qk_norm_rope_cases.weights(D, q.dtype, device), *rope_cases.unlike_tables(9, D, device)
    )  # fmt: skip


def heads() -> None:
    device, D = torch.device("cpu"), 40
    q, k = rope_cases.qk(2, 2, 2, 70, D, torch.float16, device)
    qk_norm_rope_cases.check(
        q, k, *qk_norm_rope_cases.weights(D, q.dtype, device), *rope_cases.tables(70, 32, device)
    )  # fmt: skip


def rotated() -> None:
    case = attention_cases.Case(2, 4, 2, 70, 70, 32, 32)
    rope_attention_cases.check(case, torch.float16, torch.device("cpu"), tile=Tile(32, 16, 4, 1))


# name: (modules, what is replaced there, by what, and the check that must fail)
MUTANTS: dict[str, tuple[tuple[Any, ...], str, Any, Any]] = {
    "accumulator in half precision": (
        (softmax,), "add_values", accumulator_in_half_precision, lambda: attention(_LONG, torch.bfloat16)),
    "mass not rescaled": ((softmax,), "online_softmax_step", mass_not_rescaled, lambda: attention(_DENSE)),
    "last values dropped": ((forward,), "last_values", last_values_dropped, lambda: attention(_DENSE, carry=True)),
    "first scores twice": ((forward,), "first_scores", first_scores_twice, lambda: attention(_DENSE, carry=True)),
    "carried without rescaling": (
        (softmax,), "add_values", carried_without_rescaling, lambda: attention(_DENSE, carry=True)),
    "one key too many": ((softmax, dkdv, dq), "visible", one_key_too_many, lambda: attention(_DENSE)),
    "one key too many, backward": ((dkdv, dq), "visible", one_key_too_many, lambda: attention(_DENSE)),
    "window one short": ((softmax, dkdv, dq), "visible", window_one_short, lambda: attention(_WINDOW)),
    "last keys dropped": ((forward,), "key_blocks", last_keys_dropped, lambda: attention(_DENSE)),
    "last keys dropped, backward": ((dq,), "key_blocks", last_keys_dropped, lambda: attention(_DENSE)),
    "boundary block not masked": ((forward,), "key_blocks", boundary_block_not_masked, lambda: attention(_DENSE)),
    "last keys dropped, decoding": ((decode,), "key_blocks", last_keys_dropped, decoding),
    "chunks not rescaled": ((decode,), "_add_chunks", chunks_not_rescaled, decoding),
    "key mask forgotten": ((softmax,), "visible", key_mask_forgotten, masked_decoding),
    "key mask of a whole block": ((softmax,), "visible", key_mask_of_the_block, masked_decoding),
    "one head for all": ((AttentionCall,), "sizes", property(_one_head_for_all), lambda: attention(_DENSE)),
    "delta forgotten": ((backward,), "launch_delta", _delta_forgotten, lambda: attention(_DENSE)),
    "scores in half precision": (
        (dkdv, dq), "probs_and_score_grads", tile_of_the_scores_in_half_precision,
        lambda: attention(_DENSE, torch.float32)),
    "sum not rounded": (
        (rms_norm,), "_load_summed", sum_not_rounded, lambda: rms_norm_cases.add_is_two_ops(torch.device("cpu"))),
    "weight forgotten": ((rms_norm,), "_load_scale", weight_forgotten, norm),
    "offset forgotten": ((rms_norm,), "_load_scale", offset_forgotten, lambda: norm(offset=1.0)),
    "dweight of a program dropped": ((rms_norm,), "sum_partials", last_partial_dropped, norm),
    "dweight of a program dropped, heads": ((qk_norm_rope,), "sum_partials", last_partial_dropped, heads),
    "normed over the rotated dims alone": ((qk_norm_rope,), "_sum", sum_over_the_rotated_dims, heads),
    "weight of other pairs": ((qk_norm_rope,), "load_pairs", pairs_swapped, heads),
    "pairs swapped": ((rope,), "load_pairs", pairs_swapped, rotation),
    "entries of the first half twice": ((rope,), "load_angles", first_entries_twice, rotation_by_element),
    "inverse for the transpose": ((rope,), "load_angles", inverse_for_the_transpose, rotation_by_element),
    "inverse for the transpose, heads": (
        (qk_norm_rope,), "load_angles", inverse_for_the_transpose, heads_by_element),
    "gradients turned on, not back": ((dkdv, dq), "inverse_rotation", turned_on_instead_of_back, rotated),
    "gradients turned back by the next row": ((dkdv, dq), "inverse_rotation", turned_back_by_the_next_row, rotated),
    "gradients turned back after rounding": ((dkdv, dq), "inverse_rotation", turned_back_after_rounding, rotated),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_caught(name):
    modules, replaced, mutant, check = MUTANTS[name]
    assert INTERPRETED
    check_catches(check, modules, replaced, mutant)
