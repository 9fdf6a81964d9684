"""Norms of a patched model on DTensors, on 2 processes: which are ours, and that all give the results of stock."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

pytest.importorskip("transformers", minversion="5.0")

from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_kernels.integrations.transformers import modules, patch
from tests.distributed import patched_norms
from tests.distributed.processes import run
from tests.support.environment import INTERPRETED
from tests.support.judge import UNIT

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(INTERPRETED, reason="about placements, not about what runs on a shard"),
]
CASES = [(name, placement) for name in patched_norms.NORMS for placement in patched_norms.PLACEMENTS]


@functools.cache
def results() -> dict[str, Any]:
    return run({f"{case}": (patched_norms.compared_with_stock, case) for case in CASES}, 2)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_results_and_gradients_are_those_of_stock(case):
    found = results()[f"{case}"]
    assert not isinstance(found, str), found
    assert found["error"] < 4 * UNIT[torch.float32]  # two orders of the same sums


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_the_op_computes_rows_that_are_whole_and_a_log_line_says_why_others_are_stock(case):
    found, (*_, ours) = results()[f"{case}"], patched_norms.PLACEMENTS[case[1]]
    assert found["ours"] == ours
    assert len(found["log"]) == (not ours)
    if not ours:
        assert found["log"][0].startswith("llama_kernels: stock code computes RMSNorm of DTensors, because the ")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_of_dtensors_run_stock_code_in_float64(dtype):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        norm, mesh = LlamaRMSNorm(16).to(dtype), DeviceMesh("cpu", [0])
        x = torch.randn(2, 5, 16, dtype=dtype)
        expected = norm(x)
        patch(torch.nn.Sequential(norm))
        norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Replicate()]))
        with mock.patch.object(modules, "rms_norm", wraps=modules.rms_norm) as rms_norm:
            torch.testing.assert_close(norm(distribute_tensor(x, mesh, [Shard(0)])).full_tensor(), expected)
        assert rms_norm.call_count == (dtype == torch.float32)
    finally:
        dist.destroy_process_group()
