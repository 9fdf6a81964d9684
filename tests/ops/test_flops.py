"""What FlopCounterMode counts of attention: what it counts of PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import llama_kernels as lk
from llama_kernels.ops.attention.masked_decode import decode_attention

pytestmark = pytest.mark.once

FORWARD, BOTH = 2 * (32 + 48), 2 * (4 * 32 + 3 * 48)  # of a query and a key: D = 32, Dv = 48


def flops_of(call, *tensors: torch.Tensor) -> int:
    """Of call(*tensors), and of its backward where a tensor requires grad."""
    with FlopCounterMode(display=False) as counted:
        out = call(*tensors)
        if out.requires_grad:
            out.sum().backward()
    return counted.get_total_flops()


def heads(Hq: int, Hkv: int, Sq: int, Sk: int, Dv: int = 48, train: bool = True) -> tuple[torch.Tensor, ...]:
    shapes = (2, Hq, Sq, 32), (2, Hkv, Sk, 32), (2, Hkv, Sk, Dv)
    return tuple(torch.randn(shape, requires_grad=train) for shape in shapes)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "and backward"])
def test_a_call_counts_as_that_of_pytorch(train):
    """By the functions that PyTorch has for its kernels on a GPU; of that for CPU tensors it counts nothing."""
    q, k, v = heads(4, 4, 64, 64, train=train)
    expected = sdpa_flop_count(q.shape, k.shape, v.shape)
    if train:
        expected += sdpa_backward_flop_count((*q.shape[:3], 48), q.shape, k.shape, v.shape)
    assert flops_of(lk.attention, q, k, v) == expected


@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"window_size": (8, 0)}], ids=str)
def test_every_pair_of_a_query_and_a_key_counts(options):
    q, k, v = heads(6, 2, 40, 70)
    assert flops_of(lambda *qkv: lk.attention(*qkv, **options), q, k, v) == 2 * 6 * 40 * 70 * BOTH


def test_rotated_attention_counts_as_attention():
    q, k, v = heads(4, 2, 40, 40)
    tables = lk.rope_tables(lk.rope_frequencies(32)[0], 40)
    assert flops_of(lambda *qkv: lk.rope_attention(*qkv, *tables), q, k, v) == 2 * 4 * 40 * 40 * BOTH


def test_a_masked_step_of_decoding_counts_every_key():
    q, k, v = heads(4, 2, 1, 100, train=False)
    key_mask = torch.rand(2, 100) < 0.5
    assert flops_of(lambda *qkv: decode_attention(*qkv, key_mask), q, k, v) == 2 * 4 * 100 * FORWARD


def packed(train: bool) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(60, H, D, requires_grad=train) for H, D in ((4, 32), (2, 32), (2, 48)))


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return lk.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 40, 40)


def test_packed_sequences_count_by_their_lengths():
    cu_seqlens = torch.tensor([0, 40, 40, 60], dtype=torch.int32)
    assert flops_of(attend_packed, *packed(train=True), cu_seqlens) == 4 * (40 * 40 + 20 * 20) * BOTH


def test_tokens_past_max_seqlen_do_not_count():
    cu_seqlens = torch.tensor([0, 55, 60], dtype=torch.int32)
    assert flops_of(attend_packed, *packed(train=True), cu_seqlens) == 4 * (40 * 40 + 5 * 5) * BOTH


def test_packed_sequences_without_values_count_as_the_longest():
    with FakeTensorMode():
        cu_seqlens = torch.zeros(4, dtype=torch.int32)
        assert flops_of(attend_packed, *packed(train=False), cu_seqlens) == 4 * (3 * 40 * 40) * FORWARD
