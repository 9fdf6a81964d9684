"""accelerate's ParallelismConfig around patched models, on 2 processes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")

from tests.distributed import accelerated
from tests.distributed.comparison import check
from tests.distributed.processes import run
from tests.support.environment import INTERPRETED

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(INTERPRETED, reason="about what is sent to whom; the kernels have other tests"),
]
SIZES = ("tp_size", "sp_size", "cp_size")


@functools.cache
def results() -> dict[str, Any]:
    refused = {size: (accelerated.refusal_on_the_cpu, (size,)) for size in SIZES}
    on_gpus = torch.cuda.device_count() >= 2
    return run({"TP": (accelerated.tensor_parallel, ()), **({} if on_gpus else refused)}, 2)


def test_tp_size_gives_the_results_of_one_process():
    found = results()["TP"]
    check(found)
    assert found["after"] < found["before"], "the optimizer did not change the model"


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="about processes on the CPU")
@pytest.mark.parametrize("size", SIZES)
def test_accelerate_refuses_every_size_on_the_cpu(size):
    """If it no longer does: docs/distributed.md says so, and `_OnTheCpu` of accelerated.py is not needed."""
    assert results()[size]["error"].startswith("ParallelismConfig is only compatible"), results()[size]


def test_accelerate_refuses_patched_attention_for_sp_size():
    """docs/distributed.md says what to call instead."""
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    with pytest.raises(ValueError, match="Invalid sp_attn_implementation: llama_kernels"):
        DeepSpeedSequenceParallelConfig(sp_attn_implementation="llama_kernels")
