"""Attention of CPU tensors: PyTorch's flash kernel where it computes the same, otherwise the formulas written out.

test_attention.py has the parity of both.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import llama_kernels as lk
from llama_kernels.ops.attention import cpu_flash
from tests.support.environment import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="about what CPU tensors run without the interpreter"),
]


def qkv(D: int = 16, Dv: int = 16) -> list[torch.Tensor]:
    return [torch.randn(1, heads, 20, width).requires_grad_() for heads, width in ((4, D), (2, D), (2, Dv))]


@pytest.mark.parametrize("options", [{}, {"window_size": (5, 0)}, {"is_causal": False}], ids=str)
def test_the_flash_kernel_runs_forward_and_backward(options):
    with (
        mock.patch.object(cpu_flash, "flash_forward", wraps=cpu_flash.flash_forward) as forward,
        mock.patch.object(cpu_flash, "flash_backward", wraps=cpu_flash.flash_backward) as backward,
    ):
        lk.attention(*qkv(), **options).sum().backward()
    assert forward.call_count == backward.call_count == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(dtype):
    """Of a program that builds its model after torch.set_default_dtype(torch.bfloat16)."""
    options = {"window_size": (5, 0), "kv_end": torch.full((1, 20), 15, dtype=torch.int32)}
    torch.manual_seed(0)
    leaves = qkv()
    expected = lk.attention(*leaves, **options)
    grads = torch.autograd.grad(expected.sum(), leaves)
    torch.set_default_dtype(dtype)
    try:
        out = lk.attention(*leaves, **options)
        assert torch.equal(out, expected)
        assert all(map(torch.equal, torch.autograd.grad(out.sum(), leaves), grads))
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_flash_kernel_runs_for_each_sequence_of_a_packed_batch():
    q, k, v = (x.detach()[0].transpose(0, 1) for x in qkv())
    bounds = torch.tensor([0, 5, 20], dtype=torch.int32)
    with mock.patch.object(cpu_flash, "flash_forward", wraps=cpu_flash.flash_forward) as forward:
        lk.attention_varlen(q, k, v, bounds, bounds, 15, 15)
    assert forward.call_count == 2


@pytest.mark.parametrize(
    "widths, options",
    [((16, 16), {"softcap": 5.0}), ((16, 16), {"scale": -0.5}), ((16, 16), {"scale": 0.0}), ((16, 24), {})],
    ids=str,
)
def test_the_formulas_are_written_out_where_the_flash_kernel_computes_something_else(widths, options):
    with mock.patch.object(cpu_flash, "flash_forward", side_effect=AssertionError):
        assert lk.attention(*qkv(*widths), **options).isfinite().all()


def test_the_formulas_are_written_out_for_a_gradient_of_lse():
    q, k, v = qkv()
    with mock.patch.object(cpu_flash, "flash_backward", side_effect=AssertionError):
        _, lse = lk.attention(q, k, v, return_lse=True)
        lse.sum().backward()
    assert q.grad is not None and q.grad.any()
