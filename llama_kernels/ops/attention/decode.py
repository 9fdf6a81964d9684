"""Attention of few queries and many keys, as in decoding: split over the keys, then combined (Flash-Decoding).

The forward kernel would leave most of a GPU idle, and read k and v once for each query head. Here a program computes
one chunk of the keys of one key head, for a tile of the rows of all its query heads. In decoding, one tile holds all of
these rows. With the drafts of speculative decoding, or a short piece of a prompt, there are up to four tiles.
"""

from __future__ import annotations

import torch

from llama_kernels.core.language import tl, triton
from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv, next_power_of_2, require_contiguous, strides_of
from llama_kernels.ops.attention.call import AttentionCall, empty_outputs, far
from llama_kernels.ops.attention.combine import Parts, combine_launch
from llama_kernels.ops.attention.masks import Mask, key_blocks
from llama_kernels.ops.attention.softmax import SoftmaxState, attend
from llama_kernels.ops.attention.tables import tile_for
from llama_kernels.ops.attention.tiles import Keys, KeyShape, load_bound, load_prefix, matrix

TILE_ROWS = 32  # query rows of a program, of one key head
# The most query rows per key head, and the most queries. With more, the forward kernel fills its tiles and the GPU.
MOST_ROWS, MOST_QUERIES = 128, 32


def chunk_of(Sk: int, Hkv: int) -> int:
    """Keys per program: 256 to 1,024.

    It depends on Sk and Hkv alone, so that the same query and keys give the same bits in any batch and on any GPU.
    Between these limits there are 9 to 16 chunks of each of eight or more key heads: with eight, 72 to 128 programs a
    sequence, where a GPU has about 130 SMs. With fewer heads there are more chunks, at most 64. A chunk of 256 keys,
    128 KiB of k and v at D = 128 in half precision, is 256 times the size of one row of its result.
    """
    chunks = min(max(128 // max(Hkv, 1), 16), 64)
    return min(max(next_power_of_2(cdiv(Sk, chunks)), 256), 1024)


def fits_decode(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether there are at most MOST_QUERIES, and 1 to MOST_ROWS query rows per key head, Hq // Hkv * Sq."""
    return q.shape[2] <= MOST_QUERIES and 0 < q.shape[1] // max(k.shape[1], 1) * q.shape[2] <= MOST_ROWS


@triton.jit
def _row_offsets(strides, b, h_kv, group, Sq, r):
    """Where rows r of a key head begin: first the queries of its first query head, then of its second. 64-bit."""
    heads, i = (h_kv * group + r // Sq).to(tl.int64), (r % Sq).to(tl.int64)
    return tl.cast(b, tl.int64) * strides[0] + heads * strides[1] + i * strides[2]


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, lse2_ptr, kv_start_ptr, kv_end_ptr, kv_prefix_ptr, key_mask_ptr,
    q_strides, k_strides, v_strides, part_strides, lse2_strides,
    kv_start_strides, kv_end_strides, kv_prefix_strides, key_mask_stride,
    sizes, scoring, window, chunk,
    D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr, SEVERAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """part = softmax(q @ k^T scale + mask) @ v over one chunk of the keys of one key head, and its lse2, in base 2.

    q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, DV), part (B, Hq, Sq, chunks, DV) and lse2 (B, Hq, Sq, chunks)
    float32. The tile holds the group * Sq rows that read this key head; with SEVERAL, BLOCK_M of them. A chunk of which
    no row sees a key is not loaded: its lse2 is -inf, its part is not written, and the sum over the chunks skips it.
    key_mask (B, Sk) bool, of contiguous rows, hides single keys, which are loaded all the same.
    Bytes: k and v once, part. FLOPs: 2 (D + DV) for each visible pair, of BLOCK_M rows.
    """
    pid, Hkv = tl.program_id(0), sizes.Hq // sizes.group
    rows, r = sizes.group * sizes.Sq, tl.arange(0, BLOCK_M)
    if SEVERAL:  # tiles of the same keys run at the same time
        tiles = tl.cdiv(rows, BLOCK_M)
        r += pid % tiles * BLOCK_M
        pid = pid // tiles
    h_kv, b, c = pid % Hkv, pid // Hkv % sizes.B, pid // (Hkv * sizes.B)
    i = (r % sizes.Sq)[:, None]
    kv_start = load_bound(kv_start_ptr, kv_start_strides, b, 0, i, sizes.Sq)  # [BLOCK_M, 1]
    kv_end = load_bound(kv_end_ptr, kv_end_strides, b, 0, i, sizes.Sq)  # [BLOCK_M, 1]
    prefix = load_prefix(kv_prefix_ptr, kv_prefix_strides, b, 0, i, sizes.Sq, sizes.Sk)  # [BLOCK_M, 1]
    key_mask = None
    if key_mask_ptr is not None:
        key_mask = key_mask_ptr + tl.cast(b, tl.int64) * key_mask_stride
    mask = Mask(sizes.Sk - sizes.Sq, window.left, window.right, kv_start, kv_end, sizes.Sk, key_mask, prefix)
    blocks = key_blocks(mask, 0, sizes.Sq - 1, BLOCK_N)
    begin, end = tl.maximum(c * chunk, blocks.begin), tl.minimum(c * chunk + chunk, blocks.end)
    lse2_rows = lse2_ptr + _row_offsets(lse2_strides, b, h_kv, sizes.group, sizes.Sq, r) + c
    unseen = begin >= end
    if kv_prefix_ptr is not None:
        unseen &= c * chunk >= blocks.prefix_end
    if unseen:
        tl.store(lse2_rows, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=r < rows)
        return

    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    q_rows = q_ptr + _row_offsets(q_strides, b, h_kv, sizes.group, sizes.Sq, r)[:, None]
    q = tl.load(q_rows + d, mask=(r < rows)[:, None] & (d < D), other=0.0)  # [BLOCK_M, BLOCK_D]
    state = SoftmaxState(
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
    )
    K, V = matrix(k_ptr, k_strides, b, h_kv, 0), matrix(v_ptr, v_strides, b, h_kv, 0)
    keys = Keys(K, V, mask, i, blocks)
    SHAPE: tl.constexpr = KeyShape(D, DV, FAR, BLOCK_N, BLOCK_D, BLOCK_DV)
    if kv_prefix_ptr is not None:
        prefix_end = tl.minimum(c * chunk + chunk, blocks.prefix_end)
        state = attend(state, q, keys, c * chunk, prefix_end, scoring, SHAPE, MASKED=True)
    state = attend(state, q, keys, begin, end, scoring, SHAPE, MASKED=True)

    mass = tl.where(state.mass == 0.0, 1.0, state.mass)  # a row that saw no key of this chunk
    part_rows = part_ptr + _row_offsets(part_strides, b, h_kv, sizes.group, sizes.Sq, r)[:, None] + c * DV
    tl.store(part_rows + dv, state.acc * (1.0 / mass)[:, None], mask=(r < rows)[:, None] & (dv < DV))
    tl.store(lse2_rows, state.peak + tl.log2(mass), mask=r < rows)


# --- launcher --------------------------------------------------------------------------------------------------------


@cached_launch
def _launch_decode_kernels(call: AttentionCall, part, lse2, o, lse, key_mask) -> list[Launch]:
    call.require_contiguous_vectors()
    require_contiguous(key_mask)
    q, k, v, sizes, widths = call.q, call.k, call.v, call.sizes, call.widths
    if not sizes.B:
        return []
    chunks, tile = lse2.shape[-1], tile_for("decode", call)
    rows = sizes.group * sizes.Sq
    BLOCK_M = min(max(next_power_of_2(rows), 16), TILE_ROWS)
    options = {**tile.launch_options, "BLOCK_M": BLOCK_M}
    decode = Launch(
        _decode_kernel,
        (chunks * sizes.B * sizes.Hkv * cdiv(rows, BLOCK_M),),
        (
            q, k, v, part, lse2, call.kv_start, call.kv_end, call.kv_prefix, key_mask,
            *map(strides_of, (q, k, v, part, lse2)), *call.bound_strides,
            None if key_mask is None else key_mask.stride(0),
            sizes, call.scoring, call.window, chunk_of(sizes.Sk, sizes.Hkv),
        ),
        {**widths, "FAR": far(k, v), "SEVERAL": rows > BLOCK_M, **options},
    )  # fmt: skip
    parts = Parts(part, lse2, (*strides_of(part), o.shape[-1]), (*strides_of(lse2), 1), chunks)
    return [decode, combine_launch(parts, call, o, lse, many=False)]


def launch_decode(call: AttentionCall, key_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of a dense call that `fits_decode`. key_mask: (B, Sk) bool, its last dimension contiguous."""
    o, lse = empty_outputs(call)
    chunks = max(cdiv(call.longest_k, chunk_of(call.longest_k, call.k.shape[1])), 1)
    part = lse.new_empty(*lse.shape, chunks * o.shape[-1])
    lse2 = lse.new_empty(*lse.shape, chunks)
    _launch_decode_kernels(call, part, lse2, o, lse, key_mask)
    return o, lse
