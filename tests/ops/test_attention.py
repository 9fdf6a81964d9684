"""Attention: outputs and gradients against float64 by the rules of judge.py, and exact probes of mask and heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from unittest import mock

import pytest
import torch

import llama_kernels as lk
from bench.attention_options import attention_options
from llama_kernels.ops.attention import cpu_flash, decode, dispatch
from llama_kernels.ops.attention.call import AttentionCall
from llama_kernels.ops.attention.tables import Tile
from tests.support.attention import (
    CHUNK,
    SMALL_TILES,
    Case,
    check,
    check_never_worse_than_eager,
    tiles,
)
from tests.support.attention_cases import CASES, DECODING
from tests.support.environment import DEVICE, INTERPRETED
from tests.support.hardware import EXACT, Arithmetic
from tests.support.ideal import LOG2E, drawn
from tests.support.judge import DTYPES, judge
from tests.support.launches import KERNELS_RUN, kernels_launched, names


def with_dtypes(cases: Sequence[Case]) -> list[tuple[Case, torch.dtype]]:
    """Each case in one of three dtypes, in turn. tests/compiled has the compiled kernels in all three."""
    dtypes = (DTYPES[i % 3] for i in range(len(cases)))
    fits = (dtype if case.D <= 512 else torch.float16 for case, dtype in zip(cases, dtypes, strict=True))
    return list(zip(cases, fits, strict=True))


@pytest.mark.corpus(14, 15, 18, 34, 44, 78, 79)
@pytest.mark.parametrize("case, dtype", with_dtypes(CASES), ids=str)
def test_outputs_and_gradients(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.skipif(not KERNELS_RUN, reason="about the kernels: plain PyTorch takes any width")
def test_heads_that_fit_no_program_are_refused(device):
    x = torch.randn(1, 1, 8, 576, device=device)
    with pytest.raises(ValueError, match=r"attention: q .*576 in float32.*at most 512"):
        lk.attention(x, x, x[..., :512])


@pytest.mark.once
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="about what CPU tensors run without the interpreter")
@pytest.mark.parametrize("case", (*CASES, *DECODING), ids=str)
def test_cpu_tensors_without_the_flash_kernel_of_pytorch(case, device):
    with mock.patch.object(cpu_flash, "takes", lambda call: False):
        check(case, torch.bfloat16, device)


NARROW = [case for case in CASES if case.D <= 64]


@pytest.mark.corpus(16, 33)
@pytest.mark.parametrize(
    "case, tile",
    [(case, SMALL_TILES[i % len(SMALL_TILES)]) for i, case in enumerate(NARROW)],
    ids=str,
)
def test_every_boundary_between_masked_and_unmasked_blocks(case, tile, device):
    check(case, torch.float16, device, tile=tile)


@pytest.mark.parametrize("before", range(3))
def test_any_number_of_masked_and_unmasked_blocks(before, device):
    """One row tile: the blocks that kv_start cuts, those that every row sees whole, those that kv_end cuts."""
    N = 16
    for whole, after in itertools.product(range(4), range(3)):

        def start(i: torch.Tensor, Sk: int) -> torch.Tensor:
            return i * N * before // (N - 1)

        def end(i: torch.Tensor, Sk: int, first: int = before + whole, more: int = after) -> torch.Tensor:
            return N * first + i * N * more // (N - 1)

        Sk = N * (before + whole + after) + 5  # no row sees the last five keys
        bounds = {"kv_start": start if before else None, "kv_end": end}
        case = Case(1, 2, 1, N, Sk, 16, 16, is_causal=False, **bounds)
        check(case, torch.float16, device, tile=Tile(N, N, 4, 1))


@pytest.mark.parametrize("gap", range(-2, 3))
def test_any_number_of_blocks_of_a_prefix(gap, device):
    """One row tile: blocks that every row sees as first keys, those that some do, and `gap` blocks to kv_start."""
    N = 16
    for whole, some in itertools.product(range(3), range(3)):
        first = N * (whole + some)

        def prefix(i: torch.Tensor, Sk: int, whole: int = whole, some: int = some) -> torch.Tensor:
            return N * whole + i * N * some // (N - 1)

        def start(i: torch.Tensor, Sk: int, first: int = first) -> torch.Tensor:
            return first + N * gap + i

        def end(i: torch.Tensor, Sk: int) -> torch.Tensor:
            return Sk - 5 - i

        Sk = N * (whole + some + max(gap, 0) + 3)
        case = Case(1, 2, 1, N, Sk, 16, 16, is_causal=False, kv_start=start, kv_end=end, kv_prefix=prefix)
        check(case, torch.float16, device, tile=Tile(N, N, 4, 1))


@pytest.mark.corpus(77)
@pytest.mark.skipif(not KERNELS_RUN, reason="about the kernels: plain PyTorch reads all keys")
def test_blocks_between_the_prefix_and_kv_start_are_not_read(device):
    """Four completions of 32 tokens share 32 tokens. NaN in one of them reaches no other."""
    x = torch.randn(1, 1, 160, 16, device=device)
    i = torch.arange(160, device=device)
    kv_start = (i // 32 * 32).int()[None]
    kv_prefix = torch.where(i < 32, 0, 32).int()[None]
    spoiled = x.clone()
    spoiled[:, :, 64:96] = float("nan")
    q, k, v = (t.detach().requires_grad_() for t in (x, spoiled, spoiled))
    with tiles(Tile(32, 32, 4, 1)):
        out = lk.attention(q, k, v, kv_start=kv_start, kv_prefix=kv_prefix)
        (dq,) = torch.autograd.grad(out[:, :, 96:].sum() + out[:, :, :64].sum(), q)
    assert out[:, :, 64:96].isnan().all()
    for result in (out, dq):
        assert result[:, :, 96:].isfinite().all() and result[:, :, :64].isfinite().all()


@pytest.mark.parametrize("case, dtype", with_dtypes(DECODING), ids=str)
def test_few_queries_split_over_the_keys(case, dtype, device, monkeypatch):
    monkeypatch.setattr(decode, "chunk_of", lambda Sk, Hkv: CHUNK)
    with kernels_launched() as launches:
        check(case, dtype, device, tile=Tile(32, 16, 4, 1))
    ran = names(launches)
    assert not KERNELS_RUN or (ran[:2] == ["_decode_kernel", "_combine_kernel"] and "_forward_kernel" not in ran)


@pytest.mark.parametrize("family", ["peaky", "huge"])
def test_few_queries_with_any_number_of_keys(family, device):
    check(Case(1, 8, 2, 1, 600, 64, 64), torch.float16, device, family=family)


def test_calls_of_few_queries_and_many_keys_are_split():
    def takes(Hq, Hkv, Sq, Sk):
        q, k = torch.empty(1, Hq, Sq, 16), torch.empty(1, Hkv, Sk, 16)
        call = AttentionCall(q, k, k, *attention_options(Sq, Sk, 0.25))
        return dispatch.forward(call) is dispatch.DECODE

    assert takes(32, 8, 1, 257) and takes(32, 8, 8, 4096) and takes(64, 2, 1, 1024)
    assert takes(32, 8, 32, 4096) and takes(64, 2, 4, 4096)
    assert not takes(32, 8, 1, 256) and not takes(32, 8, 33, 4096) and not takes(64, 2, 5, 4096)
    assert not takes(0, 0, 1, 4096)
    lengths = (257, 4096, 4097, 8192, 16384, 16385, 32768, 131072)
    chunks = {Hkv: [decode.chunk_of(Sk, Hkv) for Sk in lengths] for Hkv in (0, 1, 4, 8, 40)}
    assert chunks[0] == chunks[1] == [256, 256, 256, 256, 256, 512, 512, 1024]
    assert chunks[4] == [256, 256, 256, 256, 512, 1024, 1024, 1024]
    assert chunks[8] == chunks[40] == [256, 256, 512, 512, 1024, 1024, 1024, 1024]


@pytest.mark.corpus(35)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["peaky", "tiny", "huge"])
def test_large_and_tiny_inputs(family, dtype, device):
    check(Case(1, 4, 2, 100, 130, 64, 64), dtype, device, family=family)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_worse_than_eager(dtype, device):
    check_never_worse_than_eager(dtype, device)


@pytest.mark.parametrize("Hq, Hkv", [(0, 0), (0, 2)])
def test_keys_that_no_head_reads_have_no_gradient(Hq, Hkv, device):
    q, k, v = (torch.randn(2, H, 7, 8, device=device).requires_grad_() for H in (Hq, Hkv, Hkv))
    out = lk.attention(q, k, v)
    assert not any(grad.any() for grad in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


@pytest.mark.parametrize("options", [
    {}, {"window_size": (2, 0)}, {"kv_start": 4}, {"is_causal": False, "kv_end": 0}, {"softcap": 5.0},
], ids=str)  # fmt: skip
def test_a_sink_of_minus_infinity_is_none(options, device):
    """Also in rows that see no key, where lse is -inf too."""
    bounds = {name: torch.full((1, 6), n, dtype=torch.int32, device=device)
              for name, n in options.items() if name in ("kv_start", "kv_end")}  # fmt: skip
    leaves = [torch.randn(1, H, 6, 16, device=device).requires_grad_() for H in (4, 2, 2)]
    sinks = torch.tensor([0.5, -torch.inf, 1.0, -torch.inf], device=device, requires_grad=True)
    out = lk.attention(*leaves, sinks=sinks, **{**options, **bounds})
    none = lk.attention(*leaves, **{**options, **bounds})
    torch.testing.assert_close(out[:, 1::2], none[:, 1::2])
    do = torch.randn_like(out)
    grads = torch.autograd.grad(out, (*leaves, sinks), do)
    assert all(grad.isfinite().all() for grad in grads) and not grads[3][1::2].any()
    expected = torch.autograd.grad(none[:, 1::2], leaves, do[:, 1::2])
    torch.testing.assert_close(grads[0][:, 1::2], expected[0][:, 1::2])


def test_a_softcap_of_zero_is_none(device):
    """As in flash-attn."""
    q, k, v = (torch.randn(1, H, 9, 16, device=device) for H in (4, 2, 2))
    cu, (cos, sin) = torch.tensor([0, 9], dtype=torch.int32, device=device), lk.rope_tables(torch.rand(8), 9)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    calls = {
        "attention": lambda m, cap: m.attention(q, k, v, softcap=cap),
        "attention_varlen": lambda m, cap: m.attention_varlen(*packed, cu, cu, 9, 9, softcap=cap),
        "rope_attention": lambda m, cap: m.rope_attention(q, k, v, cos.to(device), sin.to(device), softcap=cap),
    }
    for call in calls.values():
        for module in (lk, lk.reference):
            assert torch.equal(call(module, 0.0), call(module, None))


def _gradients_of_a_block(q, k, v, do, out, lse, scale, rounding, closing, by: Arithmetic = EXACT):
    """dq, dk and dv of a block of keys, where `out` and `lse` are those of all keys."""
    G = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    p = by.exp2((q @ k.mT * scale - lse[..., None]) * LOG2E)
    ds, p = rounding(p * (do @ v.mT - (out * do).sum(-1, keepdim=True))), rounding(p)
    dk, dv = (x.unflatten(1, (-1, G)).sum(2) for x in (ds.mT @ q * scale, p.mT @ do))
    return closing(ds @ k * scale), closing(dk), dv


@pytest.mark.parametrize("layout", ["dense", "packed", "rotated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_block_of_keys(layout, dtype, device):
    """out and lse may be those of longer rows, as in context parallelism: dq is then the share of this block."""
    Hq, Hkv, S, D = 4, 2, 33, 32
    scale, ops = D**-0.5, torch.ops.llama_kernels
    q, do = (torch.randn(1, Hq, S, D, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, Hkv, 2 * S, D, device=device).to(dtype) for _ in range(2))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact, exact_lse = lk.reference.attention(*wide, is_causal=False, return_lse=True)
    whole_dq, *_ = torch.autograd.grad(exact, wide, do.double())
    exact, exact_lse = exact.detach(), exact_lse.detach()
    out, lse = exact.to(dtype), exact_lse.float()
    cos, sin = (x.to(device) for x in lk.rope_tables(torch.rand(D // 2), S))

    def unrotated(x):
        return lk.reference.rope(x, None, cos, -sin)[0] if layout == "rotated" else x

    total = 0
    for block in (slice(0, S), slice(S, 2 * S)):
        k_, v_ = k[:, :, block], v[:, :, block]
        call, wanted = (scale, None, None, None), (True, True, True, False, None)
        if layout == "packed":
            cu = torch.tensor([0, S], dtype=torch.int32, device=device)
            do_, *tensors = (x[0].transpose(0, 1) for x in (do, q, k_, v_, out))
            bounds = (None, None, None, cu, cu.clone(), S, S)
            results = ops.attention_backward(do_, None, *tensors, lse[0], *bounds, *call, *wanted)
            results = [x.transpose(0, 1)[None] for x in results[:3]]
        elif layout == "rotated":
            rest = (None, None, None, cos, sin, None, False, *call, *wanted)
            results = ops.rope_attention_backward(do, None, q, k_, v_, out, lse, *rest)
        else:
            rest = (None, None, None, None, None, S, S, *call, *wanted)
            results = ops.attention_backward(do, None, q, k_, v_, out, lse, *rest)
        R = (*(x.double() for x in (q, k_, v_, do)), exact, exact_lse)
        R = _gradients_of_a_block(*R, scale, lambda x: x, unrotated)
        I = (*(x.float() for x in (q, k_, v_, do, out)), lse)
        I = drawn(_gradients_of_a_block, *I, scale, lambda x: x.to(dtype).float(), unrotated)
        for name, K, r, draws in zip(("dq", "dk", "dv"), results, R, I, strict=False):
            judge(f"{layout} {name}", K, r, [draw.to(dtype) for draw in draws])
        total = total + R[0]
    torch.testing.assert_close(total, unrotated(whole_dq))  # the shares sum to the whole gradient


@pytest.mark.parametrize("seed", range(6))
def test_keys_outside_of_all_ranges_may_be_nan(seed, device):
    """Ranges are random. Some are empty, and these count too."""
    generator = torch.Generator().manual_seed(seed)
    Sq, Sk = ((3, 8), (20, 90), (40, 50))[seed % 3]
    start = torch.randint(Sk // 3, Sk, (1, Sq), generator=generator, dtype=torch.int32).to(device)
    end = torch.randint(0, 2 * Sk // 3, (1, Sq), generator=generator, dtype=torch.int32).to(device)
    q, k, v = (torch.randn(1, H, S, 16, generator=generator).to(device) for H, S in ((2, Sq), (1, Sk), (1, Sk)))
    for x in (k, v):
        x[:, :, : start.min()] = x[:, :, end.max() :] = torch.nan
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = lk.attention(*tensors, is_causal=seed < 3, kv_start=start, kv_end=end)
    for x in (out, *torch.autograd.grad(out.sum(), tensors)):
        assert x.isfinite().all()


def test_no_keys_with_a_strided_last_dimension(device):
    """`contiguous` keeps the strides of a tensor without elements."""
    q, k = torch.randn(1, 4, 5, 8, device=device), torch.randn(1, 2, 0, 16, device=device)[..., ::2]
    assert not lk.attention(q, k, k).any()


@pytest.mark.skipif(not KERNELS_RUN, reason="CPU tensors without the interpreter: no kernel is launched")
@pytest.mark.parametrize(
    "dtype, D, frozen, apart",
    [(torch.bfloat16, 64, (), False), (torch.bfloat16, 64, ("k", "v"), False), (torch.bfloat16, 64, ("q",), True),
     (torch.float16, 512, (), False), (torch.float16, 576, (), True), (torch.float32, 64, (), True)],
)  # fmt: skip
def test_delta_is_computed_in_the_launch_of_dq_if_there_is_one(dtype, D, frozen, apart, device):
    """In float32 it is not, since the kernel would spill."""
    widths = {"q": D, "k": D, "v": min(D, 512)}
    tensors = {name: torch.randn(1, 2, 20, width, dtype=dtype, device=device) for name, width in widths.items()}
    for name, x in tensors.items():
        x.requires_grad_(name not in frozen)
    with kernels_launched() as launches:
        lk.attention(**tensors).sum().backward()
    assert ("_delta_kernel" in names(launches)) == apart
