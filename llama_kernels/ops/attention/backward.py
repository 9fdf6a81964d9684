"""Attention backward (arXiv 2307.08691): dq.py for a tile of query rows, then dkdv.py for a tile of keys.

With P = exp(logits - lse), dP = do @ v^T and delta = rowsum(o * do) - dlse, the gradient of the logits is
dS = P * (dP - delta), and dv = P^T @ do, dk = dS^T @ q, dq = dS @ k. P is recomputed, never stored. There are
no atomics. The first kernel also computes delta; delta.py has a kernel for it where the first one does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from llama_kernels.core.launch_cache import Launch, cached_launch
from llama_kernels.core.tensors import cdiv, empty_in_order_of, optional_strides_of, strides_of
from llama_kernels.ops.attention import dispatch, hopper
from llama_kernels.ops.attention.call import (
    AttentionCall,
    Grads,
    Results,
    RowInputs,
    Sizes,
    Wanted,
    empty_grads,
    far,
    lse_strides,
    width_class,
)
from llama_kernels.ops.attention.delta import empty_rows, empty_shares, fill_of, launch_delta, programs_of_rows
from llama_kernels.ops.attention.dkdv import _dkdv_kernel
from llama_kernels.ops.attention.dq import _dq_kernel
from llama_kernels.ops.attention.rounding import round_launch
from llama_kernels.ops.attention.tables import Tile, tile_for
from llama_kernels.ops.attention.tile_list import TileLists, is_persistent, list_tiles, programs_for, tile_lists
from llama_kernels.ops.rotation import Rotation

# Programs of dk and dv for one sequence: about two for each SM of a large GPU. Where the keys give fewer programs,
# several share the query heads of a key head.
ENOUGH_PROGRAMS = 256
MOST_COLUMNS = 512  # of dq in one launch
# The fewest query rows of a part of a group. Adding up the parts then takes less than a tenth of the time of computing
# them.
ROWS_OF_A_PART = 16384


def parts_of_group(call: AttentionCall, BLOCK_N: int) -> int:
    """How many programs share the query heads of a key head, for dk and dv of BLOCK_N keys.

    It depends on the sizes of one sequence alone, so its gradients are the same bits in any batch. For a packed batch
    it is 1, since only the GPU knows the lengths of the sequences.
    """
    sizes, left, parts = call.sizes, call.window.left, 1
    if call.packed:
        return parts
    tiles = cdiv(sizes.Sk, BLOCK_N) * sizes.Hkv
    rows = sizes.group * (sizes.Sq if left is None else min(sizes.Sq, left + BLOCK_N))
    while tiles * parts < ENOUGH_PROGRAMS and sizes.group % (2 * parts) == 0 and rows >= 2 * parts * ROWS_OF_A_PART:
        parts *= 2
    return parts


class _DeltaArguments(NamedTuple):
    """What the kernel of dq computes delta, lse2 and dsinks from, beside `do` and the sinks."""

    out: torch.Tensor
    lse: torch.Tensor
    dlse: torch.Tensor | None
    shares: torch.Tensor | None  # of its programs in dsinks, to be filled; None: dsinks is not wanted


class _Sums(NamedTuple):
    """The sums over parts of a group, before they are added up: (B, Hkv * parts, Sk, D or DV) float32."""

    dk: torch.Tensor | None
    dv: torch.Tensor | None


def _arguments(
    call: AttentionCall, rows: RowInputs, outputs: tuple[torch.Tensor | None, ...], rotation: Rotation,
    tile_list: torch.Tensor | None, sizes: Sizes,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:  # fmt: skip
    """The tensors that both kernels take, then strides and numbers, each in order. outputs: dq, or dk and dv."""
    tensors = (
        call.q, call.k, call.v, *rows, *outputs,
        call.kv_start, call.kv_end, call.kv_prefix, call.cu_seqlens_q, call.cu_seqlens_k, *rotation.tensors, tile_list,
    )  # fmt: skip
    others = (
        *map(strides_of, (call.q, call.k, call.v, rows.do)), lse_strides(rows.delta),
        *map(optional_strides_of, outputs),
        *call.bound_strides, *rotation.strides,
        sizes.as_arguments(), call.scoring, call.window, rotation.positions,
    )  # fmt: skip
    return tensors, others


def _flags(
    call: AttentionCall, do: torch.Tensor, outputs: tuple[torch.Tensor | None, ...], rotation: Rotation
) -> dict[str, Any]:
    """The compile-time arguments that both kernels take. outputs: as in `_arguments`."""
    written = (x for x in outputs if x is not None)
    flags = {"FAR": far(call.q, call.k, call.v, do, *written), "PERSISTENT": is_persistent(call)}
    return {**call.widths, **flags, "HALF": rotation.half, "INTERLEAVED": rotation.interleaved}


def _dkdv_launches(
    call: AttentionCall, rows: RowInputs, grads: Grads, rotation: Rotation, list_k: torch.Tensor | None,
    sums: _Sums | None,
) -> list[Launch]:  # fmt: skip
    """The launches that write dk and dv of `grads`. sums: None where one program sums over a group."""
    sizes, tile, parts, launches = call.sizes, tile_for("dkdv", call), 1, []
    dk, dv, ends_with = grads.dk, grads.dv, rotation
    if sums is not None:  # the parts are added up and rotated afterwards
        parts, (dk, dv), ends_with = parts_of_group(call, tile.BLOCK_N), sums, Rotation()
    of_part = sizes._replace(group=sizes.group // parts)
    programs = cdiv(sizes.Sk, tile.BLOCK_N) * sizes.B * of_part.Hkv
    if list_k is not None:
        programs = programs_for(sizes.Sk, sizes.B, sizes.Hkv, tile.BLOCK_N, is_persistent(call))
    if not programs:
        return []
    for pair in ((dk, None), (None, dv)) if tile.split else ((dk, dv),):
        if pair != (None, None):
            tensors, others = _arguments(call, rows, pair, ends_with, list_k, of_part)
            options = {**_flags(call, rows.do, pair, ends_with), "PARTS": parts, **tile.launch_options}
            launches.append(Launch(_dkdv_kernel, (programs,), (*tensors, *others), options))
    if sums is not None:
        keys_as_rows = sizes._replace(Hq=sizes.Hkv, Sq=sizes.Sk, longest_q=sizes.longest_k)
        for total, grad, by in zip(sums, (grads.dk, grads.dv), (rotation, Rotation()), strict=True):
            if grad is not None:
                launches.append(round_launch(total, grad, None, None, keys_as_rows, 1.0, by))
    return launches


def _tile_of_dq(call: AttentionCall, rotation: Rotation) -> Tile:
    return tile_for("dq", call, rotated=rotation.half > 0)


def _dq_computes_delta(call: AttentionCall, rotation: Rotation) -> bool:
    """Whether the kernel of dq, if it runs, computes delta. Not in several launches, of which each would need it.

    Not in float32: products without tensor cores take do from registers, and with the sum over o * do before them they
    take so many that they spill.
    """
    tile = _tile_of_dq(call, rotation)
    return tile.computes_delta and not tile.split and call.q.dtype != torch.float32


def _programs_of_dq(call: AttentionCall, rotation: Rotation) -> int:
    BLOCK_M = _tile_of_dq(call, rotation).BLOCK_M
    return programs_of_rows(call.sizes, BLOCK_M, call.packed, is_persistent(call))


def _dq_launches(
    call: AttentionCall, rows: RowInputs, dq: torch.Tensor, rotation: Rotation, list_q: torch.Tensor | None,
    of_delta: _DeltaArguments | None,
) -> list[Launch]:  # fmt: skip
    """The launches that write dq: one, or one for each part of the columns of wide heads.

    of_delta: what lse2 and delta of `rows` are computed from, in one launch. None: they have been filled.
    """
    tile = _tile_of_dq(call, rotation)
    out, lse, dlse, shares = of_delta or (None, None, None, None)
    own_tensors = (out, lse, dlse, None if shares is None else call.sinks, shares)
    own_strides = (optional_strides_of(out), *(None if x is None else lse_strides(x) for x in (lse, dlse)))
    tensors, others = _arguments(call, rows, (dq,), rotation, list_q, call.sizes)
    args = (*own_tensors, *tensors, *own_strides, *others)
    D, flags = call.q.shape[-1], {**_flags(call, rows.do, (dq, out), rotation), **tile.launch_options}
    step = tile.columns if tile.split else D
    grid = (_programs_of_dq(call, rotation),)
    return [
        Launch(_dq_kernel, grid, args, {**flags, "FIRST": first, "COLUMNS": width_class(min(D - first, step))})
        for first in range(0, D, step)
    ]


@cached_launch
def _launch_backward_kernels(
    call: AttentionCall, rows: RowInputs, grads: Grads, rotation: Rotation, lists: TileLists | None,
    sums: _Sums | None, of_delta: _DeltaArguments | None,
) -> list[Launch]:  # fmt: skip
    """The launches that fill `grads`. of_delta: None where `rows` and `lists` have been filled; else they are first."""
    call.require_contiguous_vectors()
    (list_q, list_k), launches = lists or (None, None), []
    if lists is not None and of_delta is not None:
        launches.append(list_tiles(lists, call.cu_seqlens_q, call.cu_seqlens_k, call.sizes, fill_of(grads)))
    if grads.dq is not None:
        launches += _dq_launches(call, rows, grads.dq, rotation, list_q, of_delta)
    return launches + _dkdv_launches(call, rows, grads, rotation, list_k, sums)


def _sums(call: AttentionCall, grads: Grads) -> _Sums | None:
    """Sums to be filled for dk and dv of `grads`. None: one program sums over a group."""
    sizes, parts = call.sizes, parts_of_group(call, tile_for("dkdv", call).BLOCK_N)
    if parts == 1:
        return None
    shape = (sizes.B, sizes.Hkv * parts, sizes.Sk)
    wanted = (grads.dk, grads.dv)
    return _Sums(*(x if x is None else x.new_empty(*shape, x.shape[-1], dtype=torch.float32) for x in wanted))


def launch_backward(
    call: AttentionCall, results: Results, wanted: Wanted, rotation: Rotation = Rotation()
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dsinks of `call`, by the kernels that dispatch.py says.

    rotation: of q and k before the call; dq and dk get its inverse before they are rounded.
    """
    sizes = call.sizes
    dq, dk, dv, no_dsinks = empty = empty_grads(call, wanted)
    if not (sizes.B and sizes.Hq and sizes.Sq):  # no program would write the gradients
        return tuple(grad.zero_() for grad in empty)
    grads = Grads(dq if wanted.dq else None, dk if wanted.dk else None, dv if wanted.dv else None)
    lists = tile_lists(call, of_keys=True)
    choice = dispatch.backward(call, results.do, wanted)
    rows = empty_rows(call, results, sizes)
    if choice.tile is None and wanted.dq and _dq_computes_delta(call, rotation):
        shares = empty_shares(_programs_of_dq(call, rotation), sizes, results.lse) if wanted.dsinks else None
        of_delta = _DeltaArguments(results.out, results.lse, results.dlse, shares)
        _launch_backward_kernels(call, rows, grads, rotation, lists, _sums(call, grads), of_delta)
    else:
        dq_sum = None if choice.tile is None else empty_in_order_of(dq, dtype=torch.float32)
        shares = launch_delta(call, results, rows, wanted.dsinks, dq_sum, lists, grads)
        if choice.tile is None or not hopper.try_backward(call, choice.tile, rows, dq_sum, grads, rotation, lists):
            _launch_backward_kernels(call, rows, grads, rotation, lists, _sums(call, grads), None)
    return dq, dk, dv, no_dsinks if shares is None else shares.sum(0).to(no_dsinks.dtype)
