"""Losses and gradients of models in many processes, held to those of the stock model in one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class Found(NamedTuple):
    """A loss, and the gradients of parameters by name, whole on each process."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def found(model: torch.nn.Module, loss: torch.Tensor, factor: float = 1) -> Found:
    """factor: by which each gradient is multiplied, where processes have the mean of what is wanted as a sum."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is not None:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            gradients[name.removeprefix("module.").replace("_orig_mod.", "")] = whole * factor
    return Found(loss.detach(), gradients)


def summed(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum over a mesh of one dimension."""
    total = x.detach().clone()
    dist.all_reduce(total, group=mesh.get_group())
    return total


def errors(results: Found, stock: Found, truth: Found) -> dict[str, Any]:
    """Relative errors of the loss and of all gradients together, against the stock model in float64: of `results`, and
    of the stock model in float32."""

    def error(x: Found) -> tuple[float, float]:
        assert x.gradients.keys() == truth.gradients.keys(), x.gradients.keys() ^ truth.gradients.keys()
        off, size = (
            torch.stack([gradient.double().norm() for gradient in gradients]).norm()
            for gradients in ([x.gradients[n] - g for n, g in truth.gradients.items()], [*truth.gradients.values()])
        )
        return abs(x.loss.double() / truth.loss - 1).item(), (off / size).item()

    return {"found": error(results), "stock": error(stock)}


def check(result: dict[str, Any] | str) -> None:
    """Raise AssertionError unless the errors are those of the stock model in float32, by the factor for sums in another
    order of tests/integrations."""
    assert not isinstance(result, str), result
    (loss, gradients), (stock_loss, stock_gradients) = result["found"], result["stock"]
    ulp = torch.finfo(torch.float32).eps
    assert loss <= 2 * stock_loss + 2 * ulp, result
    assert gradients <= 2 * stock_gradients + 2 * ulp, result
