"""The blocks of a packed batch as a list from which programs take their tiles, and the tokens that no sequence owns.

Only the GPU knows how long the sequences are. In a grid of the longest sequence times the number of sequences, most
programs would have no tile. So one small launch first lists the blocks of PACKED_BLOCK tokens of each sequence, and the
programs of the later launches take tiles from this list. How many programs there are follows from the number of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.core.language import cast, tl, triton
from llama_kernels.core.launch_cache import Launch
from llama_kernels.core.tensors import cdiv, optional_strides_of
from llama_kernels.ops.attention.call import AttentionCall, Sizes, far, width_class
from llama_kernels.ops.attention.tiles import PACKED_BLOCK, length, matrix, sequence, tile_ptrs

_SEQUENCES: tl.constexpr = tl.constexpr(256)  # in a step over all sequences
FEW_PROGRAMS = 2048  # up to this number, a program is launched for every tile that there may be


class TileLists(NamedTuple):
    """Lists of the blocks of queries and of keys, (2 + 2 * capacity,) int32 each. They may be one list.

    First the number of blocks, and a number that is not used. Then for each block its sequence, and its number within
    the sequence. The blocks with the largest number come first, so that long programs start first: under a causal mask,
    block n of queries sees n + 1 blocks of keys. Blocks of keys count from the last key, for the same reason.
    """

    of_q: torch.Tensor
    of_k: torch.Tensor


class Fill(NamedTuple):
    """Results that no kernel writes for a token that no sequence owns: it gets 0, and -inf in lse."""

    of_q: torch.Tensor | None  # out or dq
    lse: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None


@triton.jit
def _blocks_of(cu_seqlens_ptr, b, sequences, size, longest):
    """How many blocks each of sequences b has, and whether it is longer than `longest`."""
    known = tl.minimum(b, sequences - 1)
    _, whole = sequence(cu_seqlens_ptr, known, size, size)
    _, count = sequence(cu_seqlens_ptr, known, size, longest)
    return tl.where(b < sequences, tl.cdiv(count, PACKED_BLOCK), 0), (b < sequences) & (whole > count)


@triton.jit
def _count(cu_seqlens_ptr, n, sequences, size, longest):
    """Three sums over all sequences: blocks, blocks after block n of their sequence, and sequences that are cut off."""
    blocks, above = tl.zeros([_SEQUENCES], tl.int32), tl.zeros([_SEQUENCES], tl.int32)
    cut = tl.zeros([_SEQUENCES], tl.int32)
    for first in range(0, sequences, _SEQUENCES):
        b = first + tl.arange(0, _SEQUENCES)
        count, longer = _blocks_of(cu_seqlens_ptr, b, sequences, size, longest)
        blocks, above, cut = blocks + count, above + tl.maximum(count - n - 1, 0), cut + longer.to(tl.int32)
    return tl.sum(blocks), tl.sum(above), tl.sum(cut)


@triton.jit
def _list_blocks(list_ptr, cu_seqlens_ptr, n, above, capacity, sequences, size, longest):
    """List block n of every sequence that has one, after `above` blocks with a larger number."""
    for first in range(0, sequences, _SEQUENCES):
        b = first + tl.arange(0, _SEQUENCES)
        count, _ = _blocks_of(cu_seqlens_ptr, b, sequences, size, longest)
        has = (count > n).to(tl.int32)
        at = above + tl.cumsum(has) - has
        entry, listed = list_ptr + 2 + 2 * at, (count > n) & (at < capacity)
        tl.store(entry, b, mask=listed)
        tl.store(entry + 1, tl.zeros_like(b) + n, mask=listed)
        above += tl.sum(has)


@triton.jit
def _unowned(cu_seqlens_ptr, t, cut, sequences, size, longest):
    """Which of tokens t no sequence owns: those before the first, after the last, and those that are cut off.

    If cu_seqlens decreases somewhere, there may be tokens among them that a sequence owns. None is missing.
    """
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr), 0), size)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequences), 0), size)
    unowned = (t < first) | (t >= end)
    if cut > 0:
        for b in range(sequences):
            start, whole = sequence(cu_seqlens_ptr, b, size, size)
            unowned |= (t >= start + longest) & (t < start + whole)
    return unowned & (t < size)


@triton.jit
def _fill(ptr, strides, heads, first, unowned, D: tl.constexpr, FAR: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros for every head of the tokens from `first` on that are `unowned`, [PACKED_BLOCK]. ptr may be None."""
    if ptr is not None:
        d = tl.arange(0, BLOCK_D)[None, :]
        zeros = cast(tl.zeros([PACKED_BLOCK, BLOCK_D], tl.float32), ptr.dtype.element_ty)
        for h in range(heads):
            ptrs = tile_ptrs(matrix(ptr, strides, 0, h, 0), first, FAR, PACKED_BLOCK, BLOCK_D)
            tl.store(ptrs, zeros, mask=unowned[:, None] & (d < D))


@triton.jit
def _tile_list_kernel(
    list_q_ptr, list_k_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, of_q_ptr, lse_ptr, dk_ptr, dv_ptr,
    of_q_strides, lse_stride, dk_strides, dv_strides,
    sizes,
    OF_Q: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, FAR: tl.constexpr,
    BLOCK_OF_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Lists the blocks of all sequences, as `TileLists`, and fills what belongs to tokens that no sequence owns.

    Program n lists block n of every sequence, and fills the tokens from n * PACKED_BLOCK on; first programs for the
    queries, then for the keys. list_k may be None, where it is list_q or not wanted. If sequences overlap so much that
    a list cannot hold their blocks, the lists are empty, and everything is filled.
    Bytes: cu_seqlens, from L2, and the lists; beyond that only what is filled.
    """
    pid, B = tl.program_id(0), sizes.B
    Sq, Sk = sizes.Sq, length(sizes.Sk)
    longest_q, longest_k = length(sizes.longest_q), length(sizes.longest_k)
    for_queries = pid < tl.cdiv(Sq, PACKED_BLOCK)
    n = tl.where(for_queries, pid, pid - tl.cdiv(Sq, PACKED_BLOCK))
    q_blocks, q_above, q_cut = _count(cu_seqlens_q_ptr, n, B, Sq, longest_q)
    fits = q_blocks <= Sq // PACKED_BLOCK + B
    if cu_seqlens_k_ptr is not None:
        k_blocks, k_above, k_cut = _count(cu_seqlens_k_ptr, n, B, Sk, longest_k)
        fits &= k_blocks <= Sk // PACKED_BLOCK + B
    t = n * PACKED_BLOCK + tl.arange(0, PACKED_BLOCK)
    if for_queries:
        if n == 0:
            tl.store(list_q_ptr, tl.where(fits, q_blocks, 0))
        _list_blocks(list_q_ptr, cu_seqlens_q_ptr, n, q_above, Sq // PACKED_BLOCK + B, B, Sq, longest_q)
        unowned = _unowned(cu_seqlens_q_ptr, t, q_cut, B, Sq, longest_q) | (t < tl.where(fits, 0, Sq))
        if tl.max(unowned.to(tl.int32)) > 0:
            _fill(of_q_ptr, of_q_strides, sizes.Hq, n * PACKED_BLOCK, unowned, OF_Q, FAR, BLOCK_OF_Q)
            if lse_ptr is not None:
                for h in range(sizes.Hq):
                    rows = lse_ptr + tl.cast(h, tl.int64) * lse_stride + t
                    tl.store(rows, tl.full([PACKED_BLOCK], float("-inf"), tl.float32), mask=unowned)
    elif cu_seqlens_k_ptr is not None:
        if list_k_ptr is not None:
            if n == 0:
                tl.store(list_k_ptr, tl.where(fits, k_blocks, 0))
            _list_blocks(list_k_ptr, cu_seqlens_k_ptr, n, k_above, Sk // PACKED_BLOCK + B, B, Sk, longest_k)
        unowned = _unowned(cu_seqlens_k_ptr, t, k_cut, B, Sk, longest_k) | (t < tl.where(fits, 0, Sk))
        if tl.max(unowned.to(tl.int32)) > 0:
            Hkv = sizes.Hq // sizes.group
            _fill(dk_ptr, dk_strides, Hkv, n * PACKED_BLOCK, unowned, D, FAR, BLOCK_D)
            _fill(dv_ptr, dv_strides, Hkv, n * PACKED_BLOCK, unowned, DV, FAR, BLOCK_DV)


# --- launcher --------------------------------------------------------------------------------------------------------


def tile_lists(call: AttentionCall, of_keys: bool) -> TileLists | None:
    """Empty lists for `call`, which the launch of `list_tiles` writes. None: the call is dense."""
    if not call.packed:
        return None
    (Sq, _, _), (Sk, _, _), sequences = call.q.shape, call.k.shape, call.sequences

    def empty(tokens: int) -> torch.Tensor:
        return call.q.new_empty(2 + 2 * _capacity(tokens, sequences), dtype=torch.int32)

    of_q = empty(Sq)
    one = call.cu_seqlens_q is call.cu_seqlens_k and (Sq, call.longest_q) == (Sk, call.longest_k)
    return TileLists(of_q, empty(Sk) if of_keys and not one else of_q)


def list_tiles(
    lists: TileLists, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor | None, sizes: Sizes, fill: Fill
) -> Launch:
    """The launch that writes `lists` and `fill`. cu_seqlens_k: None where neither needs it."""
    list_k = None if lists.of_k is lists.of_q else lists.of_k
    widths = [1 if x is None else x.shape[-1] for x in (fill.of_q, fill.dk, fill.dv)]
    args = (
        lists.of_q, list_k, cu_seqlens_q, cu_seqlens_k, *fill,
        optional_strides_of(fill.of_q), None if fill.lse is None else fill.lse.stride(0),
        optional_strides_of(fill.dk), optional_strides_of(fill.dv), sizes.as_arguments(),
    )  # fmt: skip
    options = {
        **dict(zip(("OF_Q", "D", "DV"), widths, strict=True)),
        **dict(zip(("BLOCK_OF_Q", "BLOCK_D", "BLOCK_DV"), map(width_class, widths), strict=True)),
        "FAR": far(*(x for x in (fill.of_q, fill.dk, fill.dv) if x is not None)), "num_warps": 4,
    }  # fmt: skip
    programs = cdiv(sizes.Sq, PACKED_BLOCK.value) + (0 if cu_seqlens_k is None else cdiv(sizes.Sk, PACKED_BLOCK.value))
    return Launch(_tile_list_kernel, (programs,), args, options)


def is_persistent(call: AttentionCall) -> bool:
    """Whether programs of the forward, dq and dkdv kernels may compute several tiles, one after another.

    The loop over tiles takes registers. With options that take registers, and with wide heads, there are none.
    """
    widest = max(call.q.shape[-1], call.v.shape[-1])
    return call.packed and not call.has_options and widest <= 128 and call.q.dtype != torch.float32


def programs_for(tokens: int, sequences: int, heads: int, rows: int, persistent: bool) -> int:
    """The number of programs of a kernel that takes tiles from a list. A tile is `rows` of one head of a block.

    There is a program for each tile that there may be. If persistent, programs can take several tiles, and there are
    fewer of them where that is more than FEW_PROGRAMS and more than a tenth above what full blocks need. The number
    depends on shapes alone, and no result depends on it.
    """
    if not tokens or not heads:
        return 0
    of_a_block, blocks = heads * (PACKED_BLOCK.value // rows), tokens // PACKED_BLOCK.value
    enough = max(blocks + cdiv(blocks, 10), cdiv(FEW_PROGRAMS, of_a_block))
    capacity = _capacity(tokens, sequences)
    return (min(capacity, enough) if persistent else capacity) * of_a_block


def _capacity(tokens: int, sequences: int) -> int:
    """The most blocks that `sequences` with `tokens` in total can have: each has at most one that is not full."""
    return tokens // PACKED_BLOCK.value + sequences
