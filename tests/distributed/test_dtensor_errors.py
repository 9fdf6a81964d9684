"""DTensors where an op does not take them: an error names the argument. On one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

import llama_kernels as lk

pytestmark = pytest.mark.once
B, S, H, D = 2, 8, 4, 16


@pytest.fixture(autouse=True)
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def distributed(x: torch.Tensor) -> DTensor:
    return distribute_tensor(x, DeviceMesh("cpu", [0]))


def heads() -> torch.Tensor:
    return torch.randn(B, H, S, D)


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    return lk.rope_tables(lk.rope_frequencies(D)[0], S)


CALLS = {
    "rms_norm: weight is a torch.Tensor; wanted a DTensor, as x is":
        lambda: lk.rms_norm(distributed(heads()), torch.ones(D)),
    "rms_norm: x is a torch.Tensor; wanted a DTensor, as weight is":
        lambda: lk.rms_norm(heads(), distributed(torch.ones(D))),
    "rms_norm: weight is a torch.Tensor; wanted":
        lambda: lk.nn.RMSNorm(D)(distributed(heads())),
    "rms_norm: residual is a torch.Tensor":
        lambda: lk.add_rms_norm(distributed(heads()), heads()),
    r"rope: cos is .* distribute_tensor\(cos, q.device_mesh\)":
        lambda: lk.rope(distributed(heads()), None, *tables()),
    "attention: k is a torch.Tensor":
        lambda: lk.attention(distributed(heads()), heads(), heads()),
    "attention: sinks is a torch.Tensor":
        lambda: lk.attention(*[distributed(heads())] * 3, sinks=torch.ones(H)),
    r"rope: q is a DTensor; wanted a torch.Tensor. It writes into its arguments, so call it on q.to_local\(\)":
        lambda: lk.rope(distributed(heads()), None, *map(distributed, tables()), inplace=True),
    "rope_into_cache: q is a DTensor; wanted a torch.Tensor":
        lambda: lk.rope_into_cache(*map(distributed, (*(heads() for _ in range(5)), torch.arange(S), *tables()))),
    r"cp_attention: k is a DTensor; wanted a torch.Tensor, .* Pass k.to_local\(\)":
        lambda: lk.distributed.cp_attention(
            heads(), distributed(heads()), heads(), mesh=DeviceMesh("cpu", [0]), layout=lk.distributed.Layout(S, 1)),
}  # fmt: skip


@pytest.mark.parametrize("text", CALLS)
def test_the_argument_is_named(text):
    with pytest.raises(TypeError, match=text):
        CALLS[text]()


def test_a_single_number_needs_no_mesh():
    """DTensor takes it for one that each process has."""
    y = lk.rms_norm(distributed(torch.randn(4, 1)), torch.ones(1))
    assert isinstance(y, DTensor)
