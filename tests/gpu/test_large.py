"""Offsets past 2^31 elements: a 32-bit product would wrap around and read, or write, somewhere else.

Only a few rows of the storage are touched, so it takes some kilobytes of memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import llama_kernels as lk
from tests.support.rope import tables

FAR = 2**31 + 2**12  # elements


@pytest.fixture(autouse=True)
def _untouched_memory() -> Iterator[None]:
    """conftest fills what is allocated; here that would be gigabytes."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def spread(device):
    """A function that lays a float16 tensor out with FAR elements between neighbours along one dimension."""

    def function(x: torch.Tensor, dim: int) -> torch.Tensor:
        assert x.shape[dim] == 2
        strides = list(torch.empty(x.movedim(dim, 0)[0].shape).stride())
        strides.insert(dim, FAR)
        try:
            buffer = torch.empty(FAR + x[..., :1].numel() * x.shape[-1], dtype=torch.float16, device=device)
        except RuntimeError as error:
            pytest.skip(f"no address space for it: {error}")
        return buffer.as_strided(x.shape, strides).copy_(x)

    return function


@pytest.mark.corpus(1)
def test_rms_norm_with_offsets_past_2_31(spread, device):
    x, dy = torch.randn(2, 64, device=device).half(), torch.randn(2, 64, device=device).half()
    results = []
    for rows, upstream in ((x, dy), (spread(x, 0), spread(dy, 0))):
        leaf = rows.detach().requires_grad_()
        y = lk.rms_norm(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.corpus(1, 2)
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "token"])
def test_rope_with_offsets_past_2_31(dim, spread, device):
    q = torch.randn(2, 2, 2, 16, device=device).half()
    expected, _ = lk.rope(q, None, *tables(2, 16, device))
    far = spread(q, dim)
    assert torch.equal(lk.rope(far, None, *tables(2, 16, device))[0], expected)
    lk.rope(far, None, *tables(2, 16, device), inplace=True)
    assert torch.equal(far, expected)


@pytest.mark.corpus(2, 3, 5)
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "token"])
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "do"])
def test_attention_with_offsets_past_2_31(which, dim, spread, device):
    tensors = [torch.randn(2, 2, 2, 16, device=device).half() for _ in range(4)]
    results = []
    for far in (False, True):
        if far:
            tensors[which] = spread(tensors[which], dim)
        q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
        out = lk.attention(q, k, v)
        results.append((out, *torch.autograd.grad(out, (q, k, v), tensors[3])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.corpus(8)
def test_packed_attention_with_offsets_past_2_31(spread, device):
    cu = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(2, 2, 16, device=device).half() for _ in range(3))
    expected = lk.attention_varlen(q, k, v, cu, cu, 1, 1)
    assert torch.equal(lk.attention_varlen(spread(q, 0), spread(k, 0), spread(v, 0), cu, cu, 1, 1), expected)
