"""dk and dv of few keys: several programs compute a part of a group of query heads each, and the parts are added up."""

from __future__ import annotations

import pytest
import torch

import llama_kernels as lk
from bench.attention_options import attention_options
from llama_kernels.core import launch_cache
from llama_kernels.ops.attention import backward
from llama_kernels.ops.attention.call import AttentionCall
from tests.support import attention, rope_attention
from tests.support.attention import Case, padded_left
from tests.support.launches import KERNELS_RUN, kernels_launched, names


def parts(Hq: int, Hkv: int, S: int, B: int = 1, left: int | None = None) -> int:
    q, k = (torch.empty(B, H, S, 128, device="meta") for H in (Hq, Hkv))
    call = AttentionCall(q, k, k, *attention_options(S, S, 0.1, left=left))
    return backward.parts_of_group(call, 128)


def test_a_group_is_divided_where_its_keys_are_few():
    """And where a part has so many rows that they take longer than adding up the parts."""
    assert [parts(32, 1, S) for S in (1024, 2048, 4096, 8192, 16384)] == [2, 4, 8, 4, 2]
    assert [parts(*heads, 8192) for heads in ((8, 1), (32, 8), (32, 32), (8, 8))] == [4, 1, 1, 1]
    assert parts(32, 1, 4096, B=64) == parts(32, 1, 4096)
    assert parts(32, 1, 4096, left=511) == 1
    assert parts(24, 1, 4096) == 4 and parts(6, 2, 16384) == 1


@pytest.fixture
def divided(monkeypatch):
    """Every group is divided as far as it goes."""
    monkeypatch.setattr(backward, "ROWS_OF_A_PART", 1)
    launch_cache.clear()
    yield
    launch_cache.clear()


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 8, 2, 70, 100, 32, 32),
        Case(2, 6, 1, 40, 40, 24, 40, softcap=3.0, sinks=True, kv_start=padded_left),
        Case(1, 2, 1, 40, 70, 256, 256),  # dk and dv in launches of their own
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_in_parts(case, dtype, divided, device):
    with kernels_launched() as launches:
        attention.check(case, dtype, device)
    assert not KERNELS_RUN or "_round_sum_kernel" in names(launches)


def test_gradients_in_parts_with_the_inverse_rotation(divided, device):
    rope_attention.check(rope_attention.square(60, 32, B=2), torch.float16, device, 16)


@pytest.mark.parametrize("wanted", ["k", "v"])
def test_one_of_the_gradients_in_parts(wanted, divided, device):
    q, k, v, do = (torch.randn(1, H, 40, 16, device=device) for H in (4, 1, 1, 4))
    leaf = {"k": k, "v": v}[wanted].requires_grad_()
    ours, expected = (torch.autograd.grad(ops.attention(q, k, v), leaf, do)[0] for ops in (lk, lk.reference))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_gradients_in_parts_repeat_and_do_not_depend_on_the_batch(divided, device):
    inputs = [torch.randn(3, H, 60, 32, device=device).bfloat16() for H in (8, 2, 2, 8)]

    def gradients(q, k, v, do):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(lk.attention(*leaves), leaves, do)

    whole, again, alone = gradients(*inputs), gradients(*inputs), gradients(*(x[1:2] for x in inputs))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))
