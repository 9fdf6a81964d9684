"""Every element is read once and written once: counted in Triton's interpreter, address by address."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch

import llama_kernels as lk
from llama_kernels.core.language import INTERPRETED
from tests.support.rope import qk, split, tables, unlike_tables

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter loads and stores")


class Traffic:
    """Addresses that kernels loaded from and stored to, as often as they did."""

    def __init__(self) -> None:
        self.loads: list[np.ndarray] = []
        self.stores: list[np.ndarray] = []

    def loaded(self, x: torch.Tensor) -> torch.Tensor:
        """How often each element of `x` was read."""
        return _counts(self.loads, x)

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        return _counts(self.stores, x)


def _counts(addresses: list[np.ndarray], x: torch.Tensor) -> torch.Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    where = (np.concatenate(addresses).astype(np.int64) - x.data_ptr()) // x.element_size()
    counts = np.bincount(where[(where >= 0) & (where < extent)], minlength=extent)
    return torch.from_numpy(counts).as_strided(x.shape, x.stride())


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    from triton.runtime.interpreter import InterpreterBuilder

    traffic, load, store = Traffic(), InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, ptrs, mask, *rest):
        traffic.loads.append(ptrs.data[mask.data])
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        traffic.stores.append(ptrs.data[mask.data])
        return store(self, ptrs, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield traffic


def once(counts: torch.Tensor, times: int = 1) -> bool:
    return bool((counts == times).all())


def rows(M: int, N: int, count: int) -> list[torch.Tensor]:
    return [torch.randn(M, N).bfloat16() for _ in range(count)]


@pytest.mark.parametrize("N", [64, 128, 1000, 4096, 5120, 16384, 32768])
def test_rms_norm_forward_reads_and_writes_each_element_once(N):
    x, r = rows(3, N, 2)
    w = torch.randn(N).bfloat16()
    with counted() as traffic:
        y = lk.rms_norm(x, w)
    assert once(traffic.loaded(x)) and once(traffic.stored(y))
    with counted() as traffic:
        y, s = lk.add_rms_norm(x, r, w)
    assert all(once(traffic.loaded(t)) for t in (x, r)) and all(once(traffic.stored(t)) for t in (y, s))


@pytest.mark.parametrize("N", [64, 128, 1000, 4096, 5120, 16384])
def test_rms_norm_backward_reads_and_writes_each_element_once(N):
    """The weight once a program, of which there are two, up to 8,192; then once a row. dw comes from its own kernel."""
    x, r, dy, ds = rows(5, N, 4)
    w = torch.randn(N).bfloat16().requires_grad_()
    y, s = lk.add_rms_norm(x.requires_grad_(), r, w)
    with counted() as traffic:
        dx, dw = torch.autograd.grad((y, s), (x, w), (dy, ds))
    assert all(once(traffic.loaded(t)) for t in (s, dy, ds)) and all(once(traffic.stored(t)) for t in (dx, dw))
    assert int(traffic.loaded(w).max()) <= (5 if N > 8192 else 16)


def test_long_rows_are_read_twice_except_their_last_step():
    """The last step stays in registers, the others are read twice; a sum with the residual is read back as such."""
    x, r = rows(2, 32768 + 1000, 2)
    with counted() as traffic:
        y, s = lk.add_rms_norm(x, r)
    assert all(once(traffic.loaded(t)) for t in (x, r)) and all(once(traffic.stored(t)) for t in (y, s))
    assert once(traffic.loaded(s)[:, :32768]) and once(traffic.loaded(s)[:, 32768:], 0)
    dy = torch.randn_like(x)
    y = lk.rms_norm(x.requires_grad_())
    with counted() as traffic:
        (dx,) = torch.autograd.grad(y, x, dy)
    for t in (x, dy):
        assert once(traffic.loaded(t)[:, :32768], 2) and once(traffic.loaded(t)[:, 32768:])
    assert once(traffic.stored(dx))


HEADS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "rope": lambda q, k, w, *angles, **options: lk.rope(q, k, *angles, **options),
    "qk_norm_rope": lambda q, k, w, *angles, **options: lk.qk_norm_rope(q, k, w, w, *angles, **options),
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", [(64, 64), (80, 80), (128, 128), (128, 64)])
@pytest.mark.parametrize("make", [tables, unlike_tables])
@pytest.mark.parametrize("op", HEADS)
def test_rope_and_qk_norm_rope_read_and_write_each_element_once(op, make, D, R, interleaved):
    q, k = (x.requires_grad_() for x in qk(2, 6, 2, 13, D, torch.bfloat16, torch.device("cpu")))
    angles, w = make(13, R, torch.device("cpu")), torch.randn(D)
    with counted() as traffic:
        outs = HEADS[op](q, k, w, *angles, interleaved=interleaved)
    assert all(once(traffic.loaded(x)) for x in (q, k)) and all(once(traffic.stored(x)) for x in outs)
    assert all(once(traffic.loaded(table), 2) for table in angles)  # once for all heads of a token
    dys = [torch.randn_like(x) for x in outs]
    with counted() as traffic:
        grads = torch.autograd.grad(outs, (q, k), dys)
    assert all(once(traffic.loaded(x)) for x in dys) and all(once(traffic.stored(x)) for x in grads)
    assert all(once(traffic.loaded(x), op != "rope") for x in (q, k))


def test_rope_qkv_reads_and_writes_each_element_once():
    angles, qkv = tables(13, 64, torch.device("cpu")), torch.randn(2, 13, 10 * 64).bfloat16().requires_grad_()
    with counted() as traffic:
        q, k, v = lk.rope_qkv(qkv, 6, 2, *angles)
    for x, times in zip(split(qkv, 6, 2, 64), (1, 1, 0), strict=True):
        assert once(traffic.loaded(x), times)
    dys = [torch.randn_like(x) for x in (q, k, v)]
    with counted() as traffic:
        (dqkv,) = torch.autograd.grad((q, k, v), qkv, dys)
    assert all(once(traffic.loaded(x)) for x in dys) and once(traffic.stored(dqkv))


def test_rope_into_cache_writes_its_positions_once_and_nothing_else():
    q, k = qk(2, 6, 2, 1, 64, torch.bfloat16, torch.device("cpu"))
    v, caches = torch.randn_like(k), [torch.zeros(2, 2, 9, 64).bfloat16() for _ in range(2)]
    with counted() as traffic:
        out = lk.rope_into_cache(q, k, v, *caches, torch.tensor([4]), *tables(9, 64, torch.device("cpu")))
    assert all(once(traffic.loaded(x)) for x in (q, k, v)) and once(traffic.stored(out))
    for cache in caches:
        written = traffic.stored(cache)
        assert once(written[:, :, 4]) and written.sum() == written[:, :, 4].sum() and not traffic.loaded(cache).any()
