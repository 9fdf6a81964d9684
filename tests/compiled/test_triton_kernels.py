"""Small Triton kernels, compiled and run in the PTX simulator, against PyTorch; and what a spoiled one shows."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from .driver import running
from .global_memory import Fault
from .mutants import survey


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x + tl.load(y_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, columns, stride, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * stride + j, mask=j < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    y = e / tl.sum(e, 0)
    tl.store(out_ptr + tl.program_id(0) * stride + j, y.to(out_ptr.dtype.element_ty), mask=j < columns)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, am, ak, bk, bn, cm, cn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_ptr + m[:, None] * am + k[None, :] * ak, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + k[:, None] * bk + n[None, :] * bn, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    c = acc.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + m[:, None] * cm + n[None, :] * cn, c, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def chain_kernel(a_ptr, b_ptr, c_ptr, B: tl.constexpr):
    """(a @ b) @ b: the first product is the second's operand, in registers."""
    i, j = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    a, b = tl.load(a_ptr + i * B + j), tl.load(b_ptr + i * B + j)
    p = tl.dot(a, b).to(a.dtype)
    tl.store(c_ptr + i * B + j, tl.dot(p, b))


@triton.jit
def branch_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Programs that part: other trip counts, an early return, an integer division."""
    p = tl.program_id(0)
    if p == 2:
        return
    i = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.int32)
    for n in range(p + 1):
        acc += tl.load(x_ptr + i) // (n + 2) + tl.load(x_ptr + i) % (n + 3)
    tl.store(out_ptr + p * BLOCK + i, tl.cumsum(acc, 0))


@triton.jit
def atomic_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, BLOCK) % 7, 1.0)


TARGETS = pytest.mark.parametrize("target", ["sm_80", "sm_90"])


@TARGETS
def test_add(target):
    x, y = torch.randn(1000), torch.randn(1000)
    out = torch.full((1000,), 7.0)
    with running(target) as log:
        add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
    assert torch.equal(out, x + y) and not log.findings


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax(target, dtype):
    x = torch.randn(5, 777).to(dtype)
    out = torch.empty_like(x)
    with running(target) as log:
        softmax_kernel[(5,)](x, out, 777, 777, BLOCK=1024)
    truth, kind = torch.softmax(x.double(), -1), torch.finfo(dtype)
    # In float32: two exponentials and a division, 2^-22 each, and two rounded exponents below 16, 2^-20 each. Then one
    # rounding to the dtype, of which the smallest numbers have a fixed spacing.
    allowed = truth * (2**-18 + (kind.eps / 2 if dtype != torch.float32 else 0)) + kind.smallest_normal * kind.eps / 2
    assert ((out.double() - truth).abs() <= allowed).all()
    assert not log.findings


MATMULS = [
    (dtype, precision, layout, warps, stages, tile)
    for dtype, precision in (
        (torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"),
    )
    for layout in ("nn", "nt", "tn", "tt")
    for warps, stages, tile in ((4, 3, (64, 64, 32)), (8, 1, (128, 32, 64)), (4, 2, (64, 128, 16)))
    if dtype != torch.float32 or layout in ("nn", "nt")
    if precision != "ieee" or dtype != torch.float32 or stages == 3
]  # fmt: skip


@TARGETS
@pytest.mark.parametrize("case", MATMULS, ids=lambda c: "-".join(map(str, c)).replace("torch.", ""))
def test_matmul(target, case):
    dtype, precision, layout, warps, stages, (BM, BN, BK) = case
    M, N, K = 100, 144, 96
    a = torch.randn(M, K).to(dtype) if layout[0] == "n" else torch.randn(K, M).to(dtype).T
    b = torch.randn(K, N).to(dtype) if layout[1] == "n" else torch.randn(N, K).to(dtype).T
    c = torch.full((M, N), 7.0)
    with running(target) as log:
        matmul_kernel[(-(-M // BM), -(-N // BN))](
            a, b, c, M, N, K, *a.stride(), *b.stride(), *c.stride(), BM, BN, BK, precision,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    error = (c.double() - a.double() @ b.double()).abs().max().item()
    assert error < (5e-2 if precision == "tf32" else 1e-4), error
    assert not log.findings


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product_of_a_product(target, dtype):
    a, b = (torch.randint(-1, 2, (64, 64)).to(dtype) for _ in range(2))  # all products and sums are exact
    c = torch.empty(64, 64)
    with running(target) as log:
        chain_kernel[(1,)](a, b, c, 64)
    assert torch.equal(c, a.float() @ b.float() @ b.float())
    assert not log.findings


@TARGETS
def test_programs_part(target):
    x = torch.randint(-1000, 1000, (64,), dtype=torch.int32)
    out = torch.full((5, 64), 7, dtype=torch.int32)
    with running(target) as log:
        branch_kernel[(5,)](x, out, 64, num_warps=2)
    want = torch.stack([
        sum(torch.div(x, n + 2, rounding_mode="trunc") + torch.fmod(x, n + 3) for n in range(p + 1)).cumsum(0).int()
        for p in range(5)
    ])  # fmt: skip
    want[2] = 7
    assert torch.equal(out, want) and not log.findings


@TARGETS
def test_atomics(target):
    out = torch.zeros(7)
    with running(target):
        atomic_kernel[(3,)](out, BLOCK=128)
    assert torch.equal(out, 3 * torch.bincount(torch.arange(128) % 7).float())


def test_out_of_bounds_is_a_fault():
    x = torch.zeros(1001)[:1000]
    with running("sm_80"), pytest.raises(Fault, match=r"out of bounds.*test_triton_kernels.py:\d+"):
        add_kernel[(4,)](x, x, x, 1001, BLOCK=256)


def test_the_cache_that_a_gpu_uses_stays_as_it_is(tmp_path, monkeypatch):
    """What is compiled here has no machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with running("sm_80"):
        copied_nowhere_else[(1,)](torch.zeros(4), 4)
    assert [path.name for path in tmp_path.iterdir()] == ["without-ptxas"]
    assert knobs.cache.dir == str(tmp_path)


@triton.jit
def copied_nowhere_else(x_ptr, n):
    tl.store(x_ptr, n)


def test_tensors_are_on_the_cpu():
    x = torch.empty(1000, device="meta")
    with running("sm_80"), pytest.raises(ValueError, match="x_ptr is on meta; wanted CPU tensors"):
        add_kernel[(4,)](x, x, x, 1000, BLOCK=256)


SPOILED = {
    "sm_80": {"barrier dropped", "cp.async.wait_group dropped", "cp.async.wait_group waits for one less"},
    "sm_90": {"barrier dropped", "cp.async.wait_group dropped", "wgmma.wait_group dropped"},
}


@TARGETS
def test_a_spoiled_matmul_is_seen(target):
    """Every wait that is spoiled, unless another wait follows before a use; barriers, but for some not needed."""
    a, b, c = torch.randn(64, 160).half(), torch.randn(160, 64).half(), torch.empty(64, 64)
    with running(target) as log:
        log.launches = []
        matmul_kernel[(1, 1)](
            a, b, c, 64, 64, 160, *a.stride(), *b.stride(), *c.stride(), 64, 64, 32, "ieee", num_stages=3
        )
    found = survey(log.launches[0], SPOILED[target])
    assert {result.kind for result in found if result.seen != "no"} == SPOILED[target]
    unseen = [result for result in found if result.seen == "no"]
    needless = "another wait comes before each use of what it waits for"  # computed from the code
    assert all(result.kind == "barrier dropped" or result.said == needless for result in unseen), unseen
    assert len(unseen) < sum(result.kind == "barrier dropped" for result in found), found


def test_a_spoiled_chain_of_products_is_seen():
    a, b = (torch.randn(64, 64).half() for _ in range(2))
    with running("sm_90") as log:
        log.launches = []
        chain_kernel[(1,)](a, b, torch.empty(64, 64), 64)
    found = survey(log.launches[0], {"fence.proxy.async dropped", "wgmma.wait_group dropped"})
    assert {result.kind for result in found} == {"fence.proxy.async dropped", "wgmma.wait_group dropped"}
    seen = {kind: [r.seen for r in found if r.kind == kind] for kind in {r.kind for r in found}}
    assert all(any(each != "no" for each in outcomes) for outcomes in seen.values()), found
