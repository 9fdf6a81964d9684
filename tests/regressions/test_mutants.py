"""Mutants: each is a kernel with one mistake, and a parity check must fail for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from llama_kernels.core.language import cast, tl, triton
from llama_kernels.core.launch_cache import Launch
from llama_kernels.ops import qk_norm_rope, rms_norm, rope
from llama_kernels.ops.attention import backward, combine, decode, dkdv, dq, forward, key_split, masks, softmax
from llama_kernels.ops.attention.call import AttentionCall
from llama_kernels.ops.attention.delta import padded_rows, row_terms
from llama_kernels.ops.attention.masks import KeyBlocks, Mask
from llama_kernels.ops.attention.softmax import SoftmaxState
from llama_kernels.ops.attention.tables import Tile
from llama_kernels.ops.partials import sum_partials
from llama_kernels.ops.rotation import Angles, inverse_rotation, load_angles, load_pairs
from tests.support import attention as attention_cases
from tests.support import decode as decode_cases
from tests.support import qk_norm_rope as qk_norm_rope_cases
from tests.support import rms_norm as rms_norm_cases
from tests.support import rope as rope_cases
from tests.support import rope_attention as rope_attention_cases
from tests.support.planted import check_catches, planted

pytestmark = pytest.mark.interpreter

online_softmax_step, add_values = softmax.online_softmax_step, softmax.add_values
visible, key_blocks = masks.visible, masks.key_blocks
probs_and_score_grads, load_scale, add_chunks = softmax.probs_and_score_grads, rms_norm._load_scale, combine._add_chunks
within = masks.within


@triton.jit
def accumulator_in_half_precision(acc, p, shrink, v):
    return cast(add_values(acc, p, shrink, v), v.dtype).to(tl.float32)


@triton.jit
def mass_not_rescaled(state, s, unit, MASKED: tl.constexpr):
    p, shrink, mass, peak = online_softmax_step(state, s, unit, MASKED)
    return p, shrink, mass + state.mass * (1.0 - shrink), peak


@triton.jit
def acc_not_rescaled(acc, p, shrink, v):
    return add_values(acc, p, shrink * 0.0 + 1.0, v)


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
    """All keys of a block are hidden or visible as its first key is."""
    see = visible(Mask(mask.shift, mask.left, mask.right, mask.kv_start, mask.kv_end, mask.Sk), i, j)
    return see & tl.load(mask.key_mask + j - tl.arange(0, j.shape[1])[None, :])


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
def overlap_counted_twice(mask, first, last, BLOCK_N: tl.constexpr):
    """The blocks between the bounds begin where they would without a prefix."""
    both = key_blocks(mask, first, last, BLOCK_N)
    own = Mask(mask.shift, mask.left, mask.right, mask.kv_start, mask.kv_end, mask.Sk)
    own = key_blocks(own, first, last, BLOCK_N)
    prefix = (both.prefix_full, both.prefix_end, both.prefix)
    return KeyBlocks(own.begin, own.full_begin, own.full_end, own.end, own.first, *prefix)


@triton.jit
def first_keys_not_loaded(mask, first, last, BLOCK_N: tl.constexpr):
    blocks = key_blocks(mask, first, last, BLOCK_N)
    return KeyBlocks(
        blocks.begin, blocks.full_begin, blocks.full_end, blocks.end, blocks.first,
        blocks.prefix_full, blocks.prefix_end, blocks.prefix * 0,
    )  # fmt: skip


@triton.jit
def prefix_one_too_long(mask, i, j):
    prefix = None if mask.prefix is None else mask.prefix + 1
    own = Mask(mask.shift, mask.left, mask.right, mask.kv_start, mask.kv_end, mask.Sk, None, prefix)
    return visible(own, i, j)


@triton.jit
def rows_of_the_prefix_skipped(queries, Sk, first, begin, end, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    return begin, end, Sk


@triton.jit
def scores_in_half_precision(qk, dp, lse2, see, scoring):
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
    tables, axes, b, s, live,
    HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    angles = load_angles(tables, axes, b, s, live, HALF, FULL, INTERLEAVED, INVERSE, BLOCK_R)
    return Angles(angles.cos0, angles.cos0, angles.sin0, angles.sin0)


@triton.jit
def axes_forgotten(
    tables, axes, b, s, live,
    HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first position of a token for every column."""
    return load_angles(tables, None, b, s, live, HALF, FULL, INTERLEAVED, INVERSE, BLOCK_R)


@triton.jit
def inverse_for_the_transpose(
    tables, axes, b, s, live,
    HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    angles = load_angles(tables, axes, b, s, live, HALF, FULL, INTERLEAVED, INVERSE, BLOCK_R)
    if INVERSE:
        angles = Angles(angles.cos0, angles.cos1, angles.sin1, angles.sin0)
    return angles


@triton.jit
def sum_over_the_rotated_dims(a, b):
    return tl.sum(a.x0 * b.x0 + a.x1 * b.x1, 2)[:, :, None]


@triton.jit
def rotated_instead_of_inverse(
    x, tables, b, s, live,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The inverse of the inverse rotation: the same angles, in the other direction."""
    x0, x1 = tl.split(x.reshape(BLOCK_T, 2, BLOCK_D // 2).permute(0, 2, 1))
    swapped = tl.join(x1, x0).permute(0, 2, 1).reshape(BLOCK_T, BLOCK_D)
    y = inverse_rotation(swapped, tables, b, s, live, HALF, INTERLEAVED, BLOCK_T, BLOCK_D)
    y0, y1 = tl.split(y.reshape(BLOCK_T, 2, BLOCK_D // 2).permute(0, 2, 1))
    return tl.join(y1, y0).permute(0, 2, 1).reshape(BLOCK_T, BLOCK_D)


@triton.jit
def inverse_rotation_by_the_next_row(
    x, tables, b, s, live,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    return inverse_rotation(x, tables, b, s + 1, live, HALF, INTERLEAVED, BLOCK_T, BLOCK_D)


@triton.jit
def rounded_before_the_inverse_rotation(
    x, tables, b, s, live,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x = cast(x, tl.bfloat16).to(tl.float32)
    return inverse_rotation(x, tables, b, s, live, HALF, INTERLEAVED, BLOCK_T, BLOCK_D)


def last_partial_dropped(partials: torch.Tensor, out: torch.Tensor) -> Launch:
    return sum_partials(partials[:-1], out)


def _one_head_for_all(call: AttentionCall) -> Any:
    sizes = _sizes.fget(call)
    return sizes._replace(group=sizes.Hq)


def _delta_forgotten(call: AttentionCall, results: Any, rows: Any, *rest: Any) -> Any:
    shares = _launch_delta(call, results, rows, *rest)
    rows.delta.zero_()
    return shares


@triton.jit
def delta_forgotten_in_dq(o, do, inputs, outputs, b, h, start, i, Sq):
    lse2, delta, dsinks = row_terms(o, do, inputs, outputs, b, h, start, i, Sq)
    return lse2, delta * 0, dsinks


@triton.jit
def delta_of_another_row_stored(o, do, inputs, outputs, b, h, start, i, Sq):
    """dq is right, but dk and dv read delta of the row before."""
    lse2, delta, dsinks = row_terms(o, do, inputs, outputs, b, h, start, i, Sq)
    tl.store(outputs.delta_ptr + padded_rows(outputs, b, h, start, i + 1), delta, mask=i + 1 < Sq)
    return lse2, delta, dsinks


@triton.jit
def not_counted_from_the_chunk(bound, first, count):
    return within(bound, 0, count)


@triton.jit
def a_key_of_the_next_chunk(bound, first, count):
    return within(bound, first, count + 1)


_sizes, _launch_delta = AttentionCall.sizes, backward.launch_delta

# --- checks ----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
DENSE = attention_cases.Case(1, 4, 2, 70, 90, 32, 32)


def attention(case: attention_cases.Case, dtype: torch.dtype = torch.float16, gradients: bool = True) -> None:
    attention_cases.check(case, dtype, CPU, tile=Tile(32, 16, 4, 1), gradients=gradients)


dense = functools.partial(attention, DENSE)
dense_forward = functools.partial(attention, DENSE, gradients=False)
dense_float32 = functools.partial(attention, DENSE, torch.float32)
window = functools.partial(attention, attention_cases.Case(1, 2, 2, 70, 90, 32, 32, window_size=(20, 0)))
PREFIX = {"kv_start": attention_cases.documents, "kv_prefix": attention_cases.shared}
prefix = functools.partial(attention, attention_cases.Case(1, 2, 2, 150, 150, 32, 32, **PREFIX))
many_keys = functools.partial(
    attention, attention_cases.Case(1, 2, 2, 64, 512, 32, 32, is_causal=False), torch.bfloat16, gradients=False
)


def decoding() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "chunk_of", lambda Sk, Hkv: attention_cases.CHUNK)
        patch.setattr(combine, "_CHUNKS_PER_STEP", 2)
        attention(attention_cases.Case(1, 4, 2, 2, 150, 32, 32), gradients=False)


def split_over_keys() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_split, "LEAST_KEYS", 64)
        key_split._chunks.cache_clear()
        attention(attention_cases.Case(1, 2, 1, 40, 300, 16, 16, kv_start=attention_cases.padded_left), gradients=False)
    key_split._chunks.cache_clear()


def masked_decoding() -> None:
    decode_cases.check(decode_cases.Case(2, 4, 2, 2, 100, 16, 16), torch.float16, CPU)


def norm(offset: float = 0.0) -> None:
    rms_norm_cases.check((70, 96), torch.bfloat16, CPU, offset=offset)


norm_with_offset, add_and_norm = functools.partial(norm, 1.0), functools.partial(rms_norm_cases.add_is_two_ops, CPU)


def rotation() -> None:
    q, k = rope_cases.qk(1, 2, 2, 13, 32, torch.float16, CPU)
    rope_cases.check(q, k, *rope_cases.tables(13, 32, CPU))


def rotation_by_element() -> None:
    q, k = rope_cases.qk(1, 2, 2, 9, 32, torch.float16, CPU)
    rope_cases.check(q, k, *rope_cases.unlike_tables(9, 32, CPU))


def rotation_by_axes() -> None:
    axes = torch.tensor([0, 1, 2, 1] * 4)
    rope_cases.check_axes(32, rope_cases.tables(60, 32, CPU), axes, 3, torch.float16)


def heads() -> None:
    q, k = rope_cases.qk(2, 2, 2, 70, 40, torch.float16, CPU)
    qk_norm_rope_cases.check(q, k, *qk_norm_rope_cases.weights(40, q.dtype, CPU), *rope_cases.tables(70, 32, CPU))


def heads_by_element() -> None:
    q, k = rope_cases.qk(1, 2, 2, 9, 32, torch.float16, CPU)
    qk_norm_rope_cases.check(q, k, *qk_norm_rope_cases.weights(32, q.dtype, CPU), *rope_cases.unlike_tables(9, 32, CPU))


def rotated_attention() -> None:
    case = attention_cases.Case(2, 4, 2, 70, 70, 32, 32)
    rope_attention_cases.check(case, torch.float16, CPU, tile=Tile(32, 16, 4, 1))


# --- mutants ---------------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    modules: tuple[Any, ...]
    replaced: str  # a function of each of them
    by: Any
    check: Callable[[], None]  # that must fail


MUTANTS = {
    "accumulator in half precision": Mutant((softmax,), "add_values", accumulator_in_half_precision, many_keys),
    "mass not rescaled": Mutant((softmax,), "online_softmax_step", mass_not_rescaled, dense_forward),
    "acc not rescaled": Mutant((softmax,), "add_values", acc_not_rescaled, dense_forward),
    "one key too many": Mutant((softmax, dkdv, dq), "visible", one_key_too_many, dense),
    "one key too many, backward": Mutant((dkdv, dq), "visible", one_key_too_many, dense),
    "window one short": Mutant((softmax, dkdv, dq), "visible", window_one_short, window),
    "overlap counted twice": Mutant((forward,), "key_blocks", overlap_counted_twice, prefix),
    "overlap counted twice, backward": Mutant((dq,), "key_blocks", overlap_counted_twice, prefix),
    "first keys not loaded": Mutant((forward,), "key_blocks", first_keys_not_loaded, prefix),
    "first keys not loaded, backward": Mutant((dq,), "key_blocks", first_keys_not_loaded, prefix),
    "prefix one too long": Mutant((softmax,), "visible", prefix_one_too_long, prefix),
    "prefix one too long, backward": Mutant((dkdv, dq), "visible", prefix_one_too_long, prefix),
    "rows of the prefix skipped": Mutant((dkdv,), "_with_rows_of_prefix", rows_of_the_prefix_skipped, prefix),
    "last keys dropped": Mutant((forward,), "key_blocks", last_keys_dropped, dense_forward),
    "last keys dropped, backward": Mutant((dq,), "key_blocks", last_keys_dropped, dense),
    "boundary block not masked": Mutant((forward,), "key_blocks", boundary_block_not_masked, dense_forward),
    "last keys dropped, decoding": Mutant((decode,), "key_blocks", last_keys_dropped, decoding),
    "chunks not rescaled": Mutant((combine,), "_add_chunks", chunks_not_rescaled, decoding),
    "not counted from the chunk": Mutant((forward,), "within", not_counted_from_the_chunk, split_over_keys),
    "a key of the next chunk": Mutant((forward,), "within", a_key_of_the_next_chunk, split_over_keys),
    "key mask forgotten": Mutant((softmax,), "visible", key_mask_forgotten, masked_decoding),
    "key mask of a whole block": Mutant((softmax,), "visible", key_mask_of_the_block, masked_decoding),
    "one head for all": Mutant((AttentionCall,), "sizes", property(_one_head_for_all), dense),
    "delta forgotten": Mutant((backward,), "launch_delta", _delta_forgotten, dense_float32),
    "delta forgotten in dq": Mutant((dq,), "row_terms", delta_forgotten_in_dq, dense),
    "delta of another row stored": Mutant((dq,), "row_terms", delta_of_another_row_stored, dense),
    "scores in half precision": Mutant((dkdv, dq), "probs_and_score_grads", scores_in_half_precision, dense_float32),
    "sum not rounded": Mutant((rms_norm,), "_load_summed", sum_not_rounded, add_and_norm),
    "weight forgotten": Mutant((rms_norm,), "_load_scale", weight_forgotten, norm),
    "offset forgotten": Mutant((rms_norm,), "_load_scale", offset_forgotten, norm_with_offset),
    "dweight of a program dropped": Mutant((rms_norm,), "sum_partials", last_partial_dropped, norm),
    "dweight of a program dropped, heads": Mutant((qk_norm_rope,), "sum_partials", last_partial_dropped, heads),
    "mean over the rotated dimensions alone": Mutant(
        (qk_norm_rope,), "_inner_products", sum_over_the_rotated_dims, heads
    ),
    "weight of other pairs": Mutant((qk_norm_rope,), "load_pairs", pairs_swapped, heads),
    "pairs swapped": Mutant((rope,), "load_pairs", pairs_swapped, rotation),
    "axes forgotten": Mutant((rope,), "load_angles", axes_forgotten, rotation_by_axes),
    "entries of the first half twice": Mutant((rope,), "load_angles", first_entries_twice, rotation_by_element),
    "inverse for the transpose": Mutant((rope,), "load_angles", inverse_for_the_transpose, rotation_by_element),
    "inverse for the transpose, heads": Mutant(
        (qk_norm_rope,), "load_angles", inverse_for_the_transpose, heads_by_element
    ),
    "gradients rotated forward": Mutant((dkdv, dq), "inverse_rotation", rotated_instead_of_inverse, rotated_attention),
    "gradients rotated by the next row": Mutant(
        (dkdv, dq), "inverse_rotation", inverse_rotation_by_the_next_row, rotated_attention
    ),
    "gradients rounded before the rotation": Mutant(
        (dkdv, dq), "inverse_rotation", rounded_before_the_inverse_rotation, rotated_attention
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_parity_fails_for_a_mutant(name):
    mutant = MUTANTS[name]
    check_catches(mutant.check, mutant.modules, mutant.replaced, mutant.by)


def test_a_mutant_is_gone_after_its_check():
    with planted((rms_norm,), "_load_scale", weight_forgotten), pytest.raises(AssertionError):
        norm()
    norm()
