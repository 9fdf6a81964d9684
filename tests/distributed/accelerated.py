"""Patched models under accelerate's ParallelismConfig: what the processes of test_accelerate.py run."""

from __future__ import annotations

from typing import Any

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState

from llama_kernels.integrations.transformers import patch
from tests.distributed.combinations import IDS, loss_and_gradients, shared_folder
from tests.distributed.comparison import errors, found
from tests.distributed.processes import device, here
from tests.integrations.families import stock


class _OnTheCpu(ParallelismConfig):
    """Without accelerate's check of the device, which refuses every ParallelismConfig on the CPU."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        pass


def refusal_on_the_cpu(size: str) -> dict[str, str]:
    """accelerate's error for a ParallelismConfig whose `size` is the number of processes; empty without one."""
    try:
        _accelerator(ParallelismConfig(**{size: dist.get_world_size()}))
    except ValueError as error:
        return {"version": accelerate.__version__, "error": str(error)}
    return {"version": accelerate.__version__, "error": ""}


def _accelerator(config: ParallelismConfig) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps that of the first Accelerator
    return Accelerator(cpu=device().type == "cpu", parallelism_config=config)


def _stock() -> Any:
    """A small Llama whose vocabulary two processes divide, as some releases of Transformers require."""
    model: Any = stock("llama")
    model.resize_token_embeddings(100, mean_resizing=False)
    return model


def tensor_parallel() -> dict[str, Any]:
    """A model loaded with its tp_plan, patched, and prepared together with an optimizer, which makes a step."""
    folder = shared_folder()
    if dist.get_rank() == 0:
        _stock().save_pretrained(folder)
    dist.barrier()
    model = patch(transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto"))
    kind = _OnTheCpu if device().type == "cpu" else ParallelismConfig
    accelerator = _accelerator(kind(tp_size=dist.get_world_size()))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = model(here(IDS), labels=here(IDS), use_cache=False).loss
    accelerator.backward(loss)
    alone = (loss_and_gradients(_stock().to(dtype)) for dtype in (torch.float32, torch.float64))
    found_errors = errors(found(model, loss), *alone)
    optimizer.step()
    with torch.no_grad():
        after = model(here(IDS), labels=here(IDS), use_cache=False).loss
    return found_errors | {"before": loss.item(), "after": after.item()}
