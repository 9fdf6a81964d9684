"""Packed batches: programs are launched for the tokens there are, and every token is either computed or filled."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import llama_kernels as lk
from bench.attention_options import attention_options
from llama_kernels.core.language import INTERPRETED
from llama_kernels.core.launch_cache import Launch
from llama_kernels.ops.attention import backward, delta, forward, tables, tile_list
from llama_kernels.ops.attention.call import AttentionCall, Grads, RowInputs, Sizes, empty_outputs
from llama_kernels.ops.attention.tile_list import PACKED_BLOCK, Fill
from llama_kernels.ops.rotation import Rotation
from tests.support import attention
from tests.support.attention import cu_seqlens, packed
from tests.support.guards import guarded, guarded_allocations
from tests.support.launches import kernels_launched, names

# --- programs --------------------------------------------------------------------------------------------------------

LENGTHS = (8192, *(384,) * 64)
HEADS = {"q": 32, "k": 8}


def launches_of_a_step(D: int) -> dict[str, Launch]:
    """What forward and backward launch for a batch of LENGTHS, by kernel. Nothing is computed, nor compiled."""
    T = sum(LENGTHS)
    q, k, v, o = (torch.empty(T, H, D, dtype=torch.bfloat16, device="meta") for H in (32, 8, 8, 32))
    cu = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="meta")
    call = AttentionCall(q, k, v, *attention_options(8192, 8192, 0.1, cu_seqlens_q=cu, cu_seqlens_k=cu))
    lists, (_, lse) = tile_list.tile_lists(call, of_keys=True), empty_outputs(call)
    of_delta = backward._DeltaArguments(o, lse, None, None)
    launches = [
        *forward._launch_forward_kernels.__wrapped__(call, o, lse, lists),
        *backward._launch_backward_kernels.__wrapped__(
            call, RowInputs(o, lse, lse), Grads(q, k, v), Rotation(), lists, None, of_delta
        ),
    ]
    return {launch.kernel.__name__: launch for launch in launches}


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("family", tables.FAMILIES)
def test_nearly_all_programs_have_a_tile(family, D, monkeypatch):
    """One document of 8,192 tokens and 64 of 384: at least 90% of the programs, which no longer were 7%."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tables, "arch_of", lambda _: family)
    launches = launches_of_a_step(D)
    for kernel, heads, rows in (
        ("_forward_kernel", 32, "BLOCK_M"),
        ("_dq_kernel", 32, "BLOCK_M"),
        ("_dkdv_kernel", 8, "BLOCK_N"),
    ):
        (programs,), size = launches[kernel].grid, launches[kernel].options[rows]
        tiles = heads * sum(-(-length // size) for length in LENGTHS)
        assert min(tiles, programs) >= 0.9 * programs, kernel
        assert programs >= 2000 and programs % heads == 0
    assert launches["_tile_list_kernel"].grid == (2 * sum(LENGTHS) // PACKED_BLOCK.value,)


def test_few_tokens_of_many_sequences_are_spread_over_the_gpu():
    """As when decoding: each sequence has a program of its own. Only where there are many do programs take turns."""
    assert tile_list.programs_for(64, 64, 8, 128, persistent=True) == 64 * 8
    assert tile_list.programs_for(64, 64, 8, 16, persistent=True) == 2048
    assert tile_list.programs_for(4096, 64, 32, 128, persistent=True) == 64 * 32
    assert tile_list.programs_for(4096, 64, 32, 128, persistent=False) == 96 * 32
    assert (
        tile_list.programs_for(0, 3, 8, 128, persistent=True)
        == tile_list.programs_for(9, 3, 0, 128, persistent=True)
        == 0
    )


# --- the list --------------------------------------------------------------------------------------------------------


def run_the_list(bounds: list[int], tokens: int, longest: int) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """The blocks that the kernel lists, (sequence, number), and which tokens it fills."""
    sequences, H = len(bounds) - 1, 2
    sizes = Sizes(sequences, H, 1, tokens, tokens, longest, longest)
    out, lse = torch.full((tokens, H, 16), 9.0), torch.full((H, tokens), 9.0)
    listed = guarded(torch.zeros(2 + 2 * (tokens // PACKED_BLOCK.value + sequences), dtype=torch.int32))
    cu = torch.tensor(bounds, dtype=torch.int32)
    launch = tile_list.list_tiles(tile_list.TileLists(listed, listed), cu, None, sizes, Fill(out, lse))
    launch.kernel[launch.grid](*launch.args, **launch.options)
    filled = (out == 0).all(-1)
    assert torch.equal(filled[:, 0], filled[:, 1]) and torch.equal(filled.T, lse == -torch.inf)
    assert ((out == 9) | (out == 0)).all() and ((lse == 9) | (lse == -torch.inf)).all()
    return [tuple(pair) for pair in listed[2 : 2 + 2 * listed[0]].view(-1, 2).tolist()], filled[:, 0]


@pytest.mark.skipif(not INTERPRETED, reason="runs the kernel on CPU tensors, in Triton's interpreter")
@pytest.mark.parametrize("sequences", [1, 4, 300])
def test_the_list_has_every_block_once_and_long_programs_first(sequences):
    chance = random.Random(sequences)
    usual = (0, 1, 127, 128, 129, chance.randint(200, 700)) if sequences < 300 else (0, 1, 2)
    lengths = [700, *(chance.choice(usual) for _ in range(sequences - 1))]
    lead, tail, longest = chance.randint(0, 200), chance.randint(0, 200), 600
    bounds = list(itertools.accumulate(lengths, initial=lead))
    blocks, filled = run_the_list(bounds, bounds[-1] + tail, longest)
    counts = [-(-min(length, longest) // PACKED_BLOCK.value) for length in lengths]
    assert sorted(blocks) == [(b, n) for b, count in enumerate(counts) for n in range(count)]
    assert [n for _, n in blocks] == sorted((n for _, n in blocks), reverse=True)
    owned = torch.zeros(bounds[-1] + tail, dtype=torch.bool)
    for start, length in zip(bounds, lengths, strict=False):
        owned[start : start + min(length, longest)] = True
    assert torch.equal(filled, ~owned)


@pytest.mark.skipif(not INTERPRETED, reason="runs the kernel on CPU tensors, in Triton's interpreter")
def test_sequences_that_overlap_do_not_overflow_the_list():
    blocks, filled = run_the_list([0, 300, 0, 300, 0, 300], 300, 300)
    assert not blocks and filled.all()


# --- results ---------------------------------------------------------------------------------------------------------

CASES = (
    packed((50, 0, 140, 1), (50, 0, 140, 1), 4, 2, 32, 32),
    packed((1,) * 7, (130,) * 7, 4, 2, 16, 16),  # one new token of each sequence
    packed((130, 30), (20, 150), 2, 1, 16, 16, is_causal=False, sinks=True),
    packed((140, 50), (50, 140), 2, 1, 16, 16),  # as many tokens, and as long, but other sequences
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_that_take_several_tiles(case, device, monkeypatch):
    """Every program takes as many as there are: only one tile of each head is anyone's first."""
    for module in (forward, backward, delta):
        monkeypatch.setattr(module, "programs_for", lambda tokens, sequences, heads, rows, persistent: heads)
    for module in (forward, backward):
        monkeypatch.setattr(module, "is_persistent", lambda call: True)
    lk.core.launch_cache.clear()
    attention.check(case, torch.float16, device)
    lk.core.launch_cache.clear()


@pytest.mark.parametrize("longest_k", [200, 100])
@pytest.mark.parametrize("longest_q", [200, 100])
@pytest.mark.parametrize(
    "bounds", [(5, 40, 40, 290), (60, 300, 0, 50), (0, 0, 0, 0)], ids=["apart and cut off", "decreasing", "no token"]
)
def test_tokens_that_no_sequence_owns(bounds, longest_q, longest_k, device):
    """They give 0 and -inf, and get no gradient, wherever they are. Queries and keys may be cut off elsewhere."""
    T = 320
    q, k, v = (torch.randn(T, H, 16, device=device).requires_grad_() for H in (4, 2, 2))
    do, dlse = torch.randn(T, 4, 16, device=device), torch.randn(4, T, device=device)
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)

    def results(ops):
        out, lse = ops.attention_varlen(q, k, v, cu, cu, longest_q, longest_k, return_lse=True)
        return out, lse, *torch.autograd.grad((out, lse), (q, k, v), (do, dlse))

    with guarded_allocations():
        ours = results(lk)
    of_queries, of_keys = torch.zeros(2, T, dtype=torch.bool, device=device)
    for start, end in itertools.pairwise(bounds):
        of_queries[start : max(start, min(end, start + longest_q))] = True
        of_keys[start : max(start, min(end, start + longest_k))] = True
    out, lse, dq, dk, dv = ours
    for x, owned in ((out, of_queries), (lse.exp().T, of_queries), (dq, of_queries), (dk, of_keys), (dv, of_keys)):
        assert not x[~owned].any()
    for x, expected in zip(ours, results(lk.reference), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_no_sequence(device):
    q, k, v = (torch.randn(20, H, 16, device=device).requires_grad_() for H in (4, 2, 2))
    cu = torch.tensor([7], dtype=torch.int32, device=device)
    with guarded_allocations():
        out, lse = lk.attention_varlen(q, k, v, cu, cu, 20, 20, return_lse=True)
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    assert (lse == -torch.inf).all() and not any(x.any() for x in (out, *grads))


def test_queries_and_keys_may_have_bounds_of_their_own(device):
    """Two tensors of bounds that are equal, and one tensor, give the same bits."""
    q, k, v, do = (torch.randn(200, H, 32, device=device).half().requires_grad_() for H in (4, 2, 2, 4))
    cu = cu_seqlens((150, 50), device)

    def results(cu_k):
        out = lk.attention_varlen(q, k, v, cu, cu_k, 150, 150)
        return out, *torch.autograd.grad(out, (q, k, v), do)

    with kernels_launched() as launches:
        one, two = results(cu), results(cu.clone())
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not launches or names(launches) == ["_tile_list_kernel", "_forward_kernel", "_dq_kernel", "_dkdv_kernel"]


def test_a_sequence_does_not_depend_on_what_else_is_packed(device):
    q, k, v, do = (torch.randn(330, H, 32, device=device).half() for H in (4, 2, 2, 4))

    def second_sequence(lengths: tuple[int, ...], first: int):
        tokens = slice(first, first + sum(lengths))
        inputs = [x[tokens].clone().requires_grad_() for x in (q, k, v)]
        cu = cu_seqlens(lengths, device)
        out, lse = lk.attention_varlen(*inputs, cu, cu, max(lengths), max(lengths), return_lse=True)
        grads = torch.autograd.grad(out, inputs, do[tokens])
        own = slice(100 - first, 250 - first)
        return [x[own] for x in (out, lse.T, *grads)]

    alone, among_others = second_sequence((150,), 100), second_sequence((100, 150, 80), 0)
    assert all(torch.equal(a, b) for a, b in zip(alone, among_others, strict=True))
    again = second_sequence((100, 150, 80), 0)
    assert all(torch.equal(a, b) for a, b in zip(again, among_others, strict=True))
