"""What CPU tensors run in few steps, as decoding needs it: one query, RoPE and RMSNorm, with the bits of the reference.

test_cpu_flash.py has longer calls of attention.
"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from llama_kernels import reference
from llama_kernels.ops.attention import cpu_flash
from llama_kernels.reference.rope import rope_transpose
from tests.support.environment import DEVICE, INTERPRETED
from tests.support.judge import UNIT

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="about what CPU tensors run without the interpreter"),
]

HEADS = pytest.mark.parametrize("heads", [(4, 2), (8, 4), (4, 4)], ids=str)
OPTIONS = pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}])


def decoding(heads: tuple[int, int], B: int = 4, Sk: int = 75, D: int = 32) -> tuple[torch.Tensor, ...]:
    """q in the memory order of a model, k and v."""
    torch.manual_seed(0)
    Hq, Hkv = heads
    return torch.randn(B, 1, Hq, D).transpose(1, 2), torch.randn(B, Hkv, Sk, D), torch.randn(B, Hkv, Sk, D)


def column(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)[:, None]


def with_sinks_of(heads: tuple[int, int], options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.repeat(heads[0] // 4) if name == "sinks" else x for name, x in options.items()}


# --- one query -------------------------------------------------------------------------------------------------------


@OPTIONS
@HEADS
def test_a_query_has_the_bits_of_a_call_with_the_keys_that_it_sees(heads, options):
    """Keys that it does not see are not read: they hold NaN."""
    q, k, v = decoding(heads, B=5)
    options = with_sinks_of(heads, options)
    start, end, left = column(0, 11, 40, 70, 80), column(75, 60, 99, 20, 99), 50
    seen = [(24, 75), (24, 60), (40, 75), (0, 0), (0, 0)]
    nan_k, nan_v = (torch.full_like(x, torch.nan) for x in (k, v))
    for b, (first, last) in enumerate(seen):
        nan_k[b, :, first:last], nan_v[b, :, first:last] = k[b, :, first:last], v[b, :, first:last]
    out, lse = lk.attention(
        q, nan_k, nan_v, kv_start=start, kv_end=end, window_size=(left, 0), return_lse=True, **options
    )
    for b, (first, last) in enumerate(seen):
        one = slice(b, b + 1)
        alone = lk.attention(q[one], k[one, :, first:last], v[one, :, first:last], return_lse=True, **options)
        assert torch.equal(out[one], alone[0]) and torch.equal(lse[one], alone[1])
    assert out[:3].any() and not out[3].any()
    assert out.stride() == q.stride() and lse.is_contiguous()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_batch_without_sequences(softcap):
    q, k, v = (x[:0] for x in decoding((4, 2)))
    bound = column(3)[:0]
    out, lse = lk.attention(q, k, v, kv_start=bound, kv_end=bound, softcap=softcap, return_lse=True)
    assert out.shape == q.shape and lse.shape == (0, 4, 1)


@pytest.mark.parametrize("starts", [(3, 3, 3, 3), (0, 9, 9, 30)], ids=["same keys", "different keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@HEADS
def test_a_query_does_not_depend_on_the_batch(heads, dtype, starts):
    q, k, v = (x.to(dtype) for x in decoding(heads, D=64))
    start = column(*starts)
    whole = lk.attention(q, k, v, kv_start=start, return_lse=True)
    for b in range(4):
        one = slice(b, b + 1)
        alone = lk.attention(q[one], k[one], v[one], kv_start=start[one], return_lse=True)
        assert all(torch.equal(x[one], y) for x, y in zip(whole, alone, strict=True))


@pytest.mark.parametrize("options", [{"window_size": (20, 0)}, {"kv_start": column(0, 5, 0, 5)}], ids=str)
def test_a_query_needs_no_mask(options):
    q, k, v = decoding((4, 2))
    with mock.patch.object(cpu_flash, "chunks", side_effect=AssertionError):
        assert lk.attention(q, k, v, **options).isfinite().all()


@pytest.mark.parametrize("heads, rows", [((4, 2), (4, 1)), ((8, 4), (4, 2)), ((4, 4), (4, 1))], ids=str)
def test_query_heads_become_rows_of_their_key_head(heads, rows):
    q, k, v = decoding(heads, Sk=600)
    with mock.patch.object(cpu_flash, "_FORWARD", wraps=cpu_flash._FORWARD) as kernel:
        results = lk.attention(q, k, v, return_lse=True)
    assert kernel.call_args.args[0].shape[1:3] == rows
    exact = reference.attention(q.double(), k.double(), v.double(), return_lse=True)
    plain = reference.attention(q, k, v, return_lse=True)
    for K, E, R in zip(results, plain, exact, strict=True):
        assert (K - R).norm() <= 2 * (E - R).norm() + UNIT[torch.float32] * R.norm()


# --- RoPE and RMSNorm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("columns", [16, 32, 40, 64], ids="{} columns".format)
def test_a_rotation_and_its_inverse_have_the_bits_of_the_reference(columns, interleaved, dtype):
    """Heads are 64 wide, so tables of 40 and 64 columns have an angle for each element."""
    torch.manual_seed(0)
    for packed, positions in itertools.product((False, True), (None, torch.randint(20, (11,)))):
        shape = (11,) if packed else (2, 11)
        q, k = (torch.randn(*shape, H, 64).to(dtype) for H in (5, 2))
        if not packed:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        tables = (torch.randn(20, columns, dtype=torch.float64) for _ in range(2))
        given = (*tables, positions)
        leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
        rotated = lk.rope(*leaves, *given, interleaved=interleaved)
        expected = reference.rope(q, k, *given, interleaved=interleaved)
        assert all(map(torch.equal, rotated, expected))
        assert [x.stride() for x in rotated] == [q.stride(), k.stride()]
        gradients = torch.autograd.grad(rotated, leaves, (k := torch.ones_like(expected[0]), expected[1]))
        assert all(map(torch.equal, gradients, rope_transpose(k, expected[1], *given, interleaved=interleaved)))


@pytest.mark.parametrize("offset", [0.0, 1.0], ids="offset {}".format)
@pytest.mark.parametrize("dtype, other", [*itertools.product((torch.float32, torch.bfloat16), repeat=2)], ids=str)
def test_norms_have_the_bits_of_the_reference(dtype, other, offset):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 96).to(dtype).transpose(0, 1)
    residual, weight = torch.randn(3, 4, 200).to(other)[..., 50:146], torch.randn(96).to(other)
    for w in (weight, None):
        assert torch.equal(lk.rms_norm(x, w, offset=offset), reference.rms_norm(x, w, offset=offset))
        results = lk.add_rms_norm(x, residual, w, offset=offset)
        assert all(map(torch.equal, results, reference.add_rms_norm(x, residual, w, offset=offset)))
        assert results[0].stride() == x.stride() and results[1].is_contiguous()


@pytest.mark.parametrize("offset", [0.0, 1.0], ids="offset {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [16, 32, 64], ids="{} columns".format)
def test_normed_and_rotated_heads_have_the_bits_of_the_reference(columns, dtype, offset):
    torch.manual_seed(0)
    q, k = (torch.randn(2, 11, H, 64).to(dtype).transpose(1, 2) for H in (5, 2))
    tables, weight = (torch.randn(20, columns) for _ in range(2)), torch.randn(64).to(dtype)
    cos, sin = tables
    for heads, weights in itertools.product(((q, k), (q, None)), ((weight, weight), (None, None))):
        weights = weights if heads[1] is not None else (weights[0], None)
        given = (*heads, *weights, cos, sin, torch.randint(20, (11,)))
        results = lk.qk_norm_rope(*given, offset=offset)
        expected = reference.qk_norm_rope(*given, offset=offset)
        for x, y, like in zip(results, expected, heads, strict=True):
            assert (x is y is None) or (torch.equal(x, y) and x.stride() == like.stride())


@pytest.mark.parametrize(
    "slots",
    [
        torch.tensor([3, 7, 4]),
        torch.tensor([[3, 7, 4]]),
        torch.tensor([[0, 9, 1], [5, 2, 8]]),
        torch.tensor([-1, 9, 10]),
    ],
    ids=["of all", "of all, 2-D", "of each sequence", "some outside"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_gets_the_bits_of_the_reference(dtype, slots):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, H, D).to(dtype).transpose(1, 2) for H, D in ((4, 32), (2, 32), (2, 24)))
    cos, sin = torch.randn(2, 12, 16)
    caches = [torch.randn(2, 2, 10, D).to(dtype) for D in (32, 24)]
    expected = [cache.clone() for cache in caches]
    rotated = lk.rope_into_cache(q, k, v, *caches, slots, cos, sin)
    assert torch.equal(rotated, reference.rope_into_cache(q, k, v, *expected, slots, cos, sin))
    assert rotated.stride() == q.stride()
    assert all(map(torch.equal, caches, expected))


def test_ops_compute_in_float32_under_autocast():
    q, k, v = decoding((8, 4))
    x, table = torch.randn(2, 5, 96), torch.randn(1, 32)
    start = column(0, 5, 9, 9)

    def results() -> list[torch.Tensor]:
        """The last are of the formulas, whose products autocast would run in bfloat16."""
        of_attention = (torch.ops.llama_kernels.attention_forward(*_fields(q, k, v, start, cap)) for cap in (None, 5.0))
        return [lk.rms_norm(x), *lk.rope(q, k[:, :, :1], table, table), *itertools.chain(*of_attention)]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, results(), expected))


def _fields(q: Any, k: Any, v: Any, start: torch.Tensor, softcap: float | None) -> tuple[Any, ...]:
    """The arguments of the registered op. The public function would cast q, k and v to the dtype of autocast."""
    return (q, k, v, None, start, None, None, None, 1, k.shape[2], 0.2, softcap, None, None)
