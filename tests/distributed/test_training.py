"""Training on several processes gives the losses of the stock model in one."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from tests.distributed import hf_trainer, training
from tests.distributed.processes import run
from tests.support.environment import INTERPRETED

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(INTERPRETED, reason="about what is sent to whom; the kernels have other tests"),
]
METHODS = ("ring", "ulysses")
DATA_PARALLEL = [("DDP", "model"), ("DDP", "model_init"), ("FSDP2", "model"), ("FSDP2", "model_init")]


@functools.cache
def trained() -> dict[str, Any]:
    """By job, the loss and norm of gradients of each step of the Trainer."""
    context_parallel = {method: (hf_trainer.context_parallel, (method,)) for method in METHODS}
    data_parallel = {" from ".join(job): (hf_trainer.data_parallel, job) for job in DATA_PARALLEL}
    return run({**context_parallel, **data_parallel}, 2)


@functools.cache
def alone(dtype: torch.dtype) -> torch.Tensor:
    """The same of the stock model in one process."""
    steps = torch.tensor(hf_trainer.alone(dtype), dtype=torch.float64)
    assert len(steps) == hf_trainer.STEPS
    return steps


def check_as_alone(job: str) -> None:
    """Against float64, losses and norms are off by at most as much as in one process in float32, by the factor for sums
    in another order."""
    found, truth = trained()[job], alone(torch.float64)
    assert isinstance(found, list), found
    off, stock_off = (
        ((steps - truth) / truth).norm(dim=0) for steps in (torch.tensor(found).double(), alone(torch.float32))
    )
    assert (off <= 2 * stock_off + 2 * torch.finfo(torch.float32).eps).all(), (off, stock_off)


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_of_hugging_face_in_context_parallel(method):
    check_as_alone(method)


@pytest.mark.parametrize("kind, given", DATA_PARALLEL)
def test_the_callback_patches_a_model_that_the_trainer_distributes(kind, given):
    """A model from model_init is patched when training begins, which is after `fully_shard`."""
    check_as_alone(f"{kind} from {given}")


def test_cp_2_times_tp_2_has_the_loss_curve_of_stock(tmp_path):
    data = tmp_path / "data.jsonl"
    texts = [{"text": f"def f{i}(x):\n    return x + {i * i}\n"} for i in range(40)]
    data.write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    options = ["--data", str(data), "--batch", "2", "--max-length", "64", "--steps", "50", "--validate-every", "50"]
    alone = training.losses(str(tmp_path / "alone"), *options, "--stock")
    parallel = (training.losses, (str(tmp_path / "parallel"), *options, "--cp", "2", "--tp", "2"))
    together = run({"parallel": parallel}, 4)["parallel"]
    assert isinstance(together, list), together
    assert len(alone) == len(together) == 50
    assert alone[-1] < 0.6 * alone[0], "the model did not learn"
    apart = [abs(a - b) for a, b in zip(alone, together, strict=True)]
    assert max(apart) <= 1e-5, apart
