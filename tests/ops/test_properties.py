"""Properties that follow from the definitions, exact probes of mask and heads, and repeatability."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core.tensors import cdiv, next_power_of_2
from tests.support.ideal import attention_mask, drawn, ideal_attention
from tests.support.judge import judge
from tests.support.launches import KERNELS_RUN, kernels_launched, names
from tests.support.rope import tables


def heads(B: int, H: int, S: int, D: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, H, S, D, device=device).to(dtype)


def ideals(q, k, v, see: torch.Tensor | None = None, sinks: torch.Tensor | None = None) -> list[list[torch.Tensor]]:
    """The draws of the judge's ideal: out, lse. Causal where `see` is None."""
    Sq, Sk = q.shape[2], k.shape[2]
    see = attention_mask(Sq, Sk, True, (-1, -1), None, None, q.device) if see is None else see
    do, dlse = torch.zeros(*q.shape[:3], v.shape[3], device=q.device), torch.zeros(q.shape[:3], device=q.device)
    return drawn(ideal_attention, q, k, v, see, q.shape[-1] ** -0.5, None, sinks, do, dlse)


# --- attention, probed exactly ---------------------------------------------------------------------------------------

MASKS = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"window_size": (7, 0)},
    "both sides": {"is_causal": False, "window_size": (5, 9)},
}


@pytest.mark.corpus(20, 22)
@pytest.mark.parametrize("Sq, Sk", [(40, 40), (33, 60), (60, 33), (1, 50), (5, 1)])
@pytest.mark.parametrize("name", MASKS)
def test_one_hot_values_show_the_whole_mask(name, Sq, Sk, device):
    """q = 0 makes the probabilities of n visible keys 1/n; one-hot v shows them one by one."""
    options = MASKS[name]
    q, k = torch.zeros(1, 1, Sq, 16, device=device), heads(1, 1, Sk, 16, device)
    v = torch.eye(Sk, device=device)[None, None]
    p = lk.attention(q, k, v, **options)
    see = attention_mask(
        Sq, Sk, options.get("is_causal", True), options.get("window_size", (-1, -1)), None, None, device
    )
    assert torch.equal(p > 0, see)
    judge("p", p, see / see.sum(-1, keepdim=True).clamp(min=1).double(), ideals(q, k, v, see)[0])


@pytest.mark.corpus(78)
@pytest.mark.parametrize(
    "given",
    [
        ("kv_start",), ("kv_end",), ("kv_start", "kv_end"),
        ("kv_prefix",), ("kv_start", "kv_prefix"), ("kv_start", "kv_end", "kv_prefix"),
    ],
    ids="-".join,
)  # fmt: skip
def test_bounds_hide_exactly_what_lies_outside(given, device):
    Sq = Sk = 50
    bounds = {name: torch.randint(0, Sk, (2, Sq), dtype=torch.int32, device=device) for name in given}
    q, k = torch.zeros(2, 1, Sq, 16, device=device), heads(2, 1, Sk, 16, device)
    v = torch.eye(Sk, device=device).expand(2, 1, Sk, Sk)
    p = lk.attention(q, k, v, **bounds)
    start, end, prefix = map(bounds.get, ("kv_start", "kv_end", "kv_prefix"))
    see = attention_mask(Sq, Sk, True, (-1, -1), start, end, device, prefix)
    assert torch.equal(p > 0, see)


@pytest.mark.corpus(54)
@pytest.mark.parametrize("Hq, Hkv", [(4, 4), (8, 2), (6, 1), (6, 3)])
def test_each_query_head_reads_its_own_key_head(Hq, Hkv, device):
    q, k = heads(1, Hq, 20, 16, device), heads(1, Hkv, 20, 16, device)
    v = torch.arange(1.0, Hkv + 1, device=device)[None, :, None, None].expand(1, Hkv, 20, 16)
    expected = (torch.arange(Hq, device=device) // (Hq // Hkv) + 1.0)[None, :, None, None].expand(1, Hq, 20, 16)
    judge("out", lk.attention(q, k, v), expected.double(), ideals(q, k, v)[0])


@pytest.mark.parametrize("name", MASKS)
def test_gradients_reach_exactly_the_visible_keys(name, device):
    """dk and dv of one query's output are zero for all keys that it does not see."""
    options = MASKS[name]
    q, k, v = (heads(1, 1, 30, 16, device).requires_grad_() for _ in range(3))
    out = lk.attention(q, k, v, **options)
    see = attention_mask(
        30, 30, options.get("is_causal", True), options.get("window_size", (-1, -1)), None, None, device
    )
    for row in (0, 11, 29):
        _, dk, dv = torch.autograd.grad(out[:, :, row].sum(), (q, k, v), retain_graph=True)
        assert torch.equal(dv.abs().sum(-1) > 0, see[:, :, row])
        assert not dk[~see[:, :, row]].any()


# --- attention, its mathematics --------------------------------------------------------------------------------------


@pytest.mark.corpus(55)
def test_grouped_attention_equals_attention_with_repeated_keys(device):
    q, k, v = heads(1, 6, 40, 32, device), heads(1, 2, 40, 32, device), heads(1, 2, 40, 32, device)
    repeated = (x.repeat_interleave(3, 1) for x in (k, v))
    assert torch.equal(lk.attention(q, k, v), lk.attention(q, *repeated))


def test_outputs_are_averages_of_values(device):
    """But for the roundings of two sums of 60 terms, and of a division."""
    q, k, v = (heads(1, 2, 60, 32, device) for _ in range(3))
    out, slack = lk.attention(q, k, v), (60 + 4) * torch.finfo(torch.float32).eps * v.abs().amax(2, keepdim=True)
    assert (out <= v.amax(2, keepdim=True) + slack).all() and (out >= v.amin(2, keepdim=True) - slack).all()


def test_a_common_shift_of_the_keys_changes_nothing(device):
    """It adds the same to all logits of a row."""
    q, k, v, shift = (heads(1, 2, S, 32, device) for S in (60, 60, 60, 1))
    k, shift = (x.mul(256).round() / 256 for x in (k, shift))  # so that their sum is exact
    truth = lk.reference.attention(q.double(), k.double(), v.double())
    judge("out", lk.attention(q, k + shift, v), truth, ideals(q, k + shift, v)[0])


@pytest.mark.parametrize("split", [1, 37, 64])
def test_two_parts_of_the_keys_merge_by_their_lse(split, device):
    q, k, v = heads(1, 4, 20, 32, device), heads(1, 2, 90, 32, device), heads(1, 2, 90, 32, device)

    def merged(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), 0)
        return sum(part * (part_lse - lse).exp().unsqueeze(-1) for part, part_lse in parts), lse

    halves = [[x[:, :, s] for x in (k, v)] for s in (slice(0, split), slice(split, None))]
    found = merged([lk.attention(q, *half, is_causal=False, return_lse=True) for half in halves])
    truth = lk.reference.attention(*(x.double() for x in (q, k, v)), is_causal=False, return_lse=True)
    of_halves = [ideals(q, *half, torch.ones(20, half[0].shape[2], dtype=torch.bool, device=device)) for half in halves]
    ideal = [merged(draw) for draw in zip(*(list(zip(*half[:2], strict=True)) for half in of_halves), strict=True)]
    for name, K, R, I in zip(("out", "lse"), found, truth, zip(*ideal, strict=True), strict=True):
        judge(name, K, R, I)


def test_packed_sequences_equal_dense_ones(device):
    lengths = (17, 0, 40, 1)
    cu = torch.tensor([0, 17, 17, 57, 58], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(58, H, 32, device=device) for H in (4, 2, 2))
    packed = lk.attention_varlen(q, k, v, cu, cu, 40, 40)
    for start, length in zip(cu.tolist(), lengths, strict=False):
        dense = [x[start : start + length].transpose(0, 1)[None] for x in (q, k, v)]
        assert torch.equal(packed[start : start + length], lk.attention(*dense)[0].transpose(0, 1))


def test_a_sink_is_a_key_without_value(device):
    q, k, v = (heads(1, 2, 40, 32, device) for _ in range(3))
    sinks = torch.tensor([0.3, -2.0], device=device)
    out, lse = lk.attention(q, k, v, sinks=sinks, return_lse=True)
    plain, plain_lse = lk.reference.attention(*(x.double() for x in (q, k, v)), return_lse=True)
    with_sink = torch.logaddexp(plain_lse, sinks[None, :, None].double())
    ideal = ideals(q, k, v, sinks=sinks)
    judge("lse", lse, with_sink, ideal[1])
    judge("out", out, plain * (plain_lse - with_sink).exp().unsqueeze(-1), ideal[0])


# --- RoPE and RMSNorm ------------------------------------------------------------------------------------------------


def test_rotation_keeps_lengths(device):
    q = heads(1, 2, 40, 64, device)
    out, _ = lk.rope(q, None, *tables(40, 64, device))
    torch.testing.assert_close(out.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved, device):
    q, k = heads(1, 1, 1, 64, device), heads(1, 1, 1, 64, device)
    cos, sin = tables(200, 64, device)

    def score(m: int, n: int) -> torch.Tensor:
        at = [torch.tensor([position], device=device) for position in (m, n)]
        (a, _), (b, _) = (
            lk.rope(x, None, cos, sin, p, interleaved=interleaved) for x, p in zip((q, k), at, strict=True)
        )
        return (a * b).sum()

    torch.testing.assert_close(score(7, 3), score(191, 187), rtol=0, atol=1e-4)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_position_zero_is_the_identity(device):
    q = heads(1, 2, 5, 64, device, torch.bfloat16)
    out, _ = lk.rope(q, None, *tables(1, 64, device), torch.zeros(5, dtype=torch.int64, device=device))
    assert torch.equal(out, q)


def test_the_norm_does_not_depend_on_the_scale_of_its_rows(device):
    x = torch.randn(9, 96, device=device)
    assert torch.equal(lk.rms_norm(x * 4, eps=0.0), lk.rms_norm(x, eps=0.0))


def test_normed_rows_have_mean_square_one(device):
    y = lk.rms_norm(7 * torch.randn(9, 96, device=device) + 3, eps=0.0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(9, device=device), rtol=1e-6, atol=0)


def test_no_mean_is_subtracted(device):
    y = lk.rms_norm(torch.full((3, 96), 5.0, device=device), eps=0.0)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-6, atol=0)


# --- repeatability ---------------------------------------------------------------------------------------------------


def _attention_results(q, k, v, do):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = lk.attention(q, k, v, return_lse=True, deterministic=True)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), do)


@pytest.mark.corpus(72, 76)
def test_attention_repeats_bit_for_bit(device):
    inputs = [heads(2, H, 70, 64, device, torch.bfloat16) for H in (4, 2, 2, 4)]
    for first, second in zip(_attention_results(*inputs), _attention_results(*inputs), strict=True):
        assert torch.equal(first, second)


def test_attention_does_not_depend_on_the_batch(device):
    inputs = [heads(3, H, 70, 64, device, torch.bfloat16) for H in (4, 2, 2, 4)]
    for whole, alone in zip(_attention_results(*inputs), _attention_results(*(x[1:2] for x in inputs)), strict=True):
        assert torch.equal(whole[1:2], alone)


def test_decoding_does_not_depend_on_the_batch(device):
    q, k, v = heads(3, 4, 2, 64, device), heads(3, 2, 600, 64, device), heads(3, 2, 600, 64, device)
    with kernels_launched() as launches:
        whole = lk.attention(q, k, v, return_lse=True)
        alone = lk.attention(q[1:2], k[1:2], v[1:2], return_lse=True)
    assert names(launches) == ["_decode_kernel", "_combine_kernel"] or not KERNELS_RUN
    assert all(torch.equal(x[1:2], y) for x, y in zip(whole, alone, strict=True))


def test_rms_norm_rows_do_not_depend_on_other_rows(device):
    x, w, dy = torch.randn(300, 96, device=device), torch.randn(96, device=device), torch.randn(300, 96, device=device)

    def results(rows: slice) -> tuple[torch.Tensor, ...]:
        leaf = x[rows].detach().requires_grad_()
        y = lk.rms_norm(leaf, w)
        return y.detach(), *torch.autograd.grad(y, leaf, dy[rows])

    for whole, alone in zip(results(slice(None)), results(slice(77, 78)), strict=True):
        assert torch.equal(whole[77:78], alone)


@pytest.mark.corpus(72)
def test_weight_gradients_repeat_bit_for_bit(device):
    x, w, dy = torch.randn(300, 96, device=device), torch.randn(96, device=device), torch.randn(300, 96, device=device)
    first, second = (
        torch.autograd.grad(lk.rms_norm(x, leaf), leaf, dy)[0] for leaf in (w.clone().requires_grad_(),) * 2
    )
    assert torch.equal(first, second)


def test_rope_does_not_depend_on_the_batch(device):
    q, k = heads(3, 4, 20, 64, device, torch.bfloat16), heads(3, 2, 20, 64, device, torch.bfloat16)
    whole = lk.rope(q, k, *tables(20, 64, device))
    alone = lk.rope(q[1:2], k[1:2], *tables(20, 64, device))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_cdiv_and_next_power_of_2_equal_those_of_triton():
    """The package has its own, since Triton's take microseconds."""
    triton = pytest.importorskip("triton")
    for n in (1, 2, 3, 63, 64, 65, 1000, 2**20 + 1):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n, m) for m in (1, 3, 64)] == [triton.cdiv(n, m) for m in (1, 3, 64)]
    assert cdiv(0, 5) == 0 and next_power_of_2(0) == 1
