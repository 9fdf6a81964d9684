"""Random calls, shrunk by hypothesis to the smallest that fails: any shape, mask, packing, position, stride."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llama_kernels as lk
from llama_kernels.language import INTERPRETED
from llama_kernels.ops.attention.tables import Tile
from tests.conftest import DEVICE
from tests.judge import guarded, guarded_allocations
from tests.test_attention import Case, check
from tests.test_rms_norm import check as check_norm
from tests.test_rope import check as check_rope
from tests.test_rope import qk, tables

# Derandomised: a failure that comes and goes teaches people to press the button again. Grow max_examples to hunt.
few = settings(
    max_examples=12 if INTERPRETED or DEVICE == "cuda" else 100,  # slow to interpret, and to compile
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
sides = st.one_of(st.just(-1), st.integers(0, 40))
small_tiles = st.sampled_from([Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1, split=True), None])


def anything(seed: int):
    """kv_start or kv_end of any value, sorted or not, before the first key and past the last."""

    def bound(i: torch.Tensor, Sk: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-3, Sk + 4, i.shape, generator=generator).to(i.device)

    return bound


@st.composite
def attention_cases(draw) -> Case:
    Hkv = draw(st.integers(1, 3))
    options = {
        "is_causal": draw(st.booleans()),
        "window_size": (draw(sides), draw(sides)),
        "softcap": draw(st.sampled_from([None, None, 5.0])),
        "scale": draw(st.sampled_from([None, None, 0.5, -0.2])),
        "sinks": draw(st.booleans()),
        "kv_start": draw(st.one_of(st.none(), st.integers(0, 9).map(anything))),
        "kv_end": draw(st.one_of(st.none(), st.none(), st.integers(10, 19).map(anything))),
    }
    heads = (Hkv * draw(st.integers(1, 4)), Hkv)
    D, DV = draw(st.integers(1, 48)), draw(st.integers(1, 48))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4))
        lengths_q, lengths_k = zip(*lengths, strict=True)
        return Case(1, *heads, sum(lengths_q), sum(lengths_k), D, DV, packed=(lengths_q, lengths_k), **options)
    return Case(draw(st.integers(1, 2)), *heads, draw(st.integers(1, 70)), draw(st.integers(0, 70)), D, DV, **options)


@few
@given(case=attention_cases(), dtype=dtypes, tile=small_tiles)
def test_attention(case, dtype, tile, device):
    torch.manual_seed(0)
    check(case, dtype, device, tile=tile)


@few
@given(leading=st.lists(st.integers(1, 7), max_size=3), N=st.integers(1, 600), dtype=dtypes, weight_dtype=dtypes,
       weight=st.booleans(), residual=st.booleans(), offset=st.sampled_from([0.0, 1.0]),
       size=st.sampled_from([1e-3, 1.0, 30.0]))  # fmt: skip
def test_norm(leading, N, dtype, weight_dtype, weight, residual, offset, size, device):
    torch.manual_seed(0)
    check_norm((*leading, N), dtype, device, weight=weight, weight_dtype=weight_dtype, residual=residual, offset=offset,
               size=size)  # fmt: skip


@few
@given(B=st.integers(1, 2), Hq=st.integers(1, 9), Hkv=st.integers(1, 9), S=st.integers(1, 40), half=st.integers(1, 70),
       rest=st.integers(0, 20), dtype=dtypes, given_ids=st.booleans(), interleaved=st.booleans(),
       inplace=st.booleans())  # fmt: skip
def test_rope(B, Hq, Hkv, S, half, rest, dtype, given_ids, interleaved, inplace, device):
    torch.manual_seed(0)
    q, k = qk(B, Hq, Hkv, S, 2 * half + rest, dtype, device)
    position_ids = torch.randint(0, 50, (B, S), device=device) if given_ids else None
    check_rope(q, k, *tables(50, 2 * half, device), position_ids, interleaved=interleaved, inplace=inplace)


@few
@given(bounds=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=5), tokens=st.integers(0, 30),
       longest=st.integers(0, 30))  # fmt: skip
def test_bounds_from_nowhere_read_nothing_from_nowhere(bounds, tokens, longest, device):
    """Any cu_seqlens at all: finite results and no crash."""
    torch.manual_seed(0)
    q, k, v = (guarded(torch.randn(tokens, H, 16, device=device)).requires_grad_() for H in (2, 1, 1))
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    with guarded_allocations():
        out = lk.attention_varlen(q, k, v, cu, cu, longest, longest)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(x.isfinite().all() for x in (out, *grads))


@few
@given(positions=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9))
def test_positions_from_nowhere_are_clamped(positions, device):
    q = torch.randn(1, 1, len(positions), 8, device=device)
    cos, sin = (guarded(table) for table in tables(5, 8, device))
    out, _ = lk.rope(q, None, cos, sin, torch.tensor(positions, dtype=torch.int64, device=device))
    inside = torch.tensor([min(max(p, 0), 4) for p in positions], device=device)
    assert torch.equal(out, lk.rope(q, None, cos, sin, inside)[0])
