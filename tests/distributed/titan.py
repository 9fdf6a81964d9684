"""A Llama as torchtitan builds and parallelizes it, with our modules: what the processes of test_combinations.py run.

In a tensor-parallel model norms get DTensors that are sharded by tokens; RoPE and attention get plain tensors with the
heads of this process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import llama_kernels as lk
from llama_kernels.distributed import Layout, cp_attention, shard
from tests.distributed.comparison import Found, errors, found, summed
from tests.distributed.processes import device, here, mesh_of

B, TOKENS, VOCAB, WIDTH, HQ, HKV, D, LAYERS = 4, 32, 96, 64, 8, 4, 8, 2
COS, SIN = lk.rope_tables(lk.rope_frequencies(D)[0], TOKENS)
IDS = torch.randint(0, VOCAB, (B, TOKENS), generator=torch.Generator().manual_seed(0))
LABELS = IDS.roll(-1, 1)


# --- the model -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, rope: Callable[..., Any], attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(WIDTH, H * D, bias=False) for H in (HQ, HKV, HKV))
        self.wo = nn.Linear(HQ * D, WIDTH, bias=False)
        self.rope, self.attend = rope, attend

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, D)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = self.rope(q, k, cos, sin)
        return self.wo(self.attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, attention: Attention, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, FeedForward()
        self.attention_norm, self.ffn_norm = norm(), norm()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a = self.attention(self.attention_norm(x), cos, sin)
        if isinstance(self.ffn_norm, lk.nn.RMSNorm):
            y, x = self.ffn_norm(a, residual=x)
        else:
            x = x + a
            y = self.ffn_norm(x)
        return x + self.feed_forward(y)


class Llama(nn.Module):
    """With our operations, or the same in plain PyTorch. A stage of a pipeline lacks some of the modules."""

    def __init__(self, ours: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        rope, attend = (lk.rope, lk.attention) if ours else (lk.reference.rope, sdpa)
        norm = functools.partial(lk.nn.RMSNorm if ours else nn.RMSNorm, WIDTH, eps=1e-6)
        self.tok_embeddings: nn.Module | None = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleDict({f"{i}": Block(Attention(rope, attend), norm) for i in range(LAYERS)})
        self.norm: nn.Module | None = norm()
        self.output: nn.Module | None = nn.Linear(WIDTH, VOCAB, bias=False)
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.15)
        self.tables = (here(COS), here(SIN))
        self.to(device())

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None
    ) -> torch.Tensor:
        cos, sin = self.tables if cos is None else (cos, sin)
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        return x if self.norm is None or self.output is None else self.output(self.norm(x))


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def alone(dtype: torch.dtype) -> Found:
    """Of the model in plain PyTorch, in one process."""
    model = Llama(ours=False).to(dtype)
    loss = loss_of(model(here(IDS), here(COS).to(dtype), here(SIN).to(dtype)), here(LABELS))
    loss.backward()
    return found(model, loss)


def errors_of(results: Found) -> dict[str, Any]:
    return errors(results, alone(torch.float32), alone(torch.float64))


# --- parallel --------------------------------------------------------------------------------------------------------


def tensor_parallel(model: Llama, mesh: DeviceMesh) -> Llama:
    """Tensor and sequence parallel, by torchtitan's plan for Llama."""
    embedded = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False)
    output = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    parallelize_module(model, mesh, {"tok_embeddings": embedded, "norm": SequenceParallel(), "output": output})
    for layer in model.layers.values():
        to_attention = PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        )
        to_feed_forward = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        by_rows = {"output_layouts": Shard(1), "use_local_output": False}
        parallelize_module(layer, mesh, {
            "attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel(),
            "attention": to_attention, "feed_forward": to_feed_forward,
            **{f"attention.{w}": ColwiseParallel() for w in ("wq", "wk", "wv")},
            **{f"feed_forward.{w}": ColwiseParallel() for w in ("w1", "w3")},
            "attention.wo": RowwiseParallel(**by_rows), "feed_forward.w2": RowwiseParallel(**by_rows),
        })  # fmt: skip
    return model


def sharded(model: Llama, mesh: DeviceMesh) -> Llama:
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def tp_sp(compiled: bool) -> dict[str, Any]:
    model = tensor_parallel(Llama(), mesh_of())
    if compiled:
        for layer in model.layers.values():
            layer.compile(backend="aot_eager", fullgraph=True)
    loss = loss_of(model(here(IDS)), here(LABELS))
    loss.backward()
    return errors_of(found(model, loss))


def fsdp2_tp_sp() -> dict[str, Any]:
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    model = sharded(tensor_parallel(Llama(), mesh["tp"]), mesh["dp"])
    rows = [here(x).chunk(2)[mesh.get_local_rank("dp")] for x in (IDS, LABELS)]
    loss = loss_of(model(rows[0]), rows[1])
    loss.backward()
    return errors_of(found(model, summed(loss, mesh["dp"]) / 2))


def cp_tp_sp(method: str) -> dict[str, Any]:
    """FSDP2 averages gradients over the context-parallel processes."""
    mesh = mesh_of(2, 2, names=("cp", "tp"))
    layout = Layout(TOKENS, 2)
    model = tensor_parallel(Llama(), mesh["tp"])
    for layer in model.layers.values():
        layer.attention.attend = functools.partial(cp_attention, mesh=mesh["cp"], layout=layout, method=method)
    sharded(model, mesh["cp"])
    ids, labels, cos, sin = shard(mesh["cp"], [here(x) for x in (IDS, LABELS, COS, SIN)], (1, 1, 0, 0), layout=layout)
    loss = loss_of(model(ids, cos, sin), labels)
    loss.backward()
    return errors_of(found(model, summed(loss, mesh["cp"]) / 2))


def pipeline(schedule: str) -> dict[str, Any]:
    """A stage for each process, of a layer each: made by hand, as torchtitan does."""
    rank, ranks, microbatches = dist.get_rank(), dist.get_world_size(), 4
    model = Llama()
    if rank > 0:
        model.tok_embeddings = None
    if rank + 1 < ranks:
        model.norm = model.output = None
    model.layers = nn.ModuleDict({f"{rank}": model.layers[f"{rank}"]})
    stage = PipelineStage(model, rank, ranks, device())
    of = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[schedule]
    losses: list[torch.Tensor] = []
    step = of(stage, n_microbatches=microbatches, loss_fn=loss_of).step
    step(*([here(IDS)] if rank == 0 else []), target=here(LABELS) if rank + 1 == ranks else None, losses=losses)
    loss = torch.stack([x.detach() for x in losses]).mean() if losses else torch.zeros((), device=device())
    everywhere: list[Any] = [None] * ranks
    dist.all_gather_object(everywhere, found(model, loss))
    return errors_of(Found(sum(x.loss for x in everywhere), {n: g for x in everywhere for n, g in x.gradients.items()}))
