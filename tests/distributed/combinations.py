"""A patched Hugging Face Llama in every kind of parallelism: what the processes of test_combinations.py run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import ScheduleGPipe, SplitPoint
from torch.distributed.pipelining import pipeline as exported
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from examples.parallel import STYLES
from llama_kernels.distributed import Layout, context_parallel
from llama_kernels.integrations.transformers import modules, patch
from tests.distributed.comparison import Found, errors, found, summed
from tests.distributed.processes import device, here, mesh_of
from tests.integrations.families import stock

ROWS, TOKENS = 4, 32
IDS = torch.randint(3, 90, (ROWS, TOKENS), generator=torch.Generator().manual_seed(2))
Change = Callable[[Any], nn.Module]


def loss_and_gradients(model: nn.Module) -> Found:
    """Of the whole batch."""
    loss = model(here(IDS), labels=here(IDS), use_cache=False).loss
    loss.backward()
    return found(model, loss)


def alone(dtype: torch.dtype) -> Found:
    return loss_and_gradients(stock("llama").to(dtype))


def errors_of(results: Found) -> dict[str, Any]:
    return errors(results, alone(torch.float32), alone(torch.float64))


def shared_folder() -> str:
    """A new folder, the same for all processes."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    return folder[0]


def changed(change: Change, patched: str = "first") -> Any:
    """The model after `patch` and `change`, in one order or the other."""
    model = stock("llama")
    return change(patch(model)) if patched == "first" else patch(change(model))


# --- data parallel ---------------------------------------------------------------------------------------------------


def with_rows_of_its_own(model: nn.Module) -> dict[str, Any]:
    """Each process has as many rows of the batch, so the whole loss is the mean of theirs."""
    ranks = dist.get_world_size()
    ids = here(IDS).chunk(ranks)[dist.get_rank()]
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return errors_of(found(model, summed(loss, mesh_of()) / ranks))


def ddp() -> dict[str, Any]:
    return with_rows_of_its_own(changed(DistributedDataParallel))


def sharded(model: Any, mesh: DeviceMesh, norms_apart: bool = False) -> nn.Module:
    for module in model.modules():
        if norms_apart and type(module).__name__.endswith("RMSNorm"):
            fully_shard(module, mesh=mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(norms_apart: bool, patched: str) -> dict[str, Any]:
    mesh = mesh_of()
    return with_rows_of_its_own(changed(lambda model: sharded(model, mesh, norms_apart), patched))


def hsdp() -> dict[str, Any]:
    mesh = mesh_of(2, 2, names=("replicated", "sharded"))
    return with_rows_of_its_own(changed(lambda model: sharded(model, mesh)))


# --- tensor and context parallel -------------------------------------------------------------------------------------


def tensor_parallel(model: Any, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {name: STYLES[style]() for name, style in model.tp_plan.items()})


def tp(patched: str) -> dict[str, Any]:
    mesh = mesh_of()
    return errors_of(loss_and_gradients(changed(lambda model: tensor_parallel(model, mesh), patched)))


def tensor_and_sequence_parallel(model: Any, mesh: DeviceMesh) -> nn.Module:
    """A Llama of Transformers by torchtitan's plan: norms get DTensors with a part of the tokens."""
    by_tokens = {"output_layouts": Shard(1), "use_local_output": False}
    parallelize_module(model, mesh, {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **by_tokens),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    })  # fmt: skip
    for layer in model.model.layers:
        to_attention = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        )
        parallelize_module(layer, mesh, {
            "input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel(),
            "self_attn": to_attention,
            "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
            **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
            "self_attn.o_proj": RowwiseParallel(**by_tokens), "mlp.down_proj": RowwiseParallel(**by_tokens),
        })  # fmt: skip
    return model


def tp_sp(patched: str) -> dict[str, Any]:
    """Also how many norms there are, and how many of them the op computes."""
    mesh = mesh_of()
    model = changed(lambda model: tensor_and_sequence_parallel(model, mesh), patched)
    with mock.patch.object(modules, "rms_norm", wraps=modules.rms_norm) as rms_norm:
        results = loss_and_gradients(model)
    return errors_of(results) | {"norms": len(norms_of(model)), "ours": rms_norm.call_count}


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def tp_sp_compiled() -> dict[str, Any]:
    """As `tp_sp`, of the first layer, which is compiled as one graph."""
    op, ours = torch.ops.llama_kernels.rms_norm_forward.default, 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal ours
        graphs = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        ours += sum(node.target is op for graph in graphs for node in graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    mesh = mesh_of()
    model = changed(lambda model: tensor_and_sequence_parallel(model, mesh))
    layer = model.model.layers[0]
    layer.compile(backend=backend, fullgraph=True)
    results = loss_and_gradients(model)
    return errors_of(results) | {"norms": len(norms_of(layer)), "ours": ours}


def with_tokens_of_its_own(model: nn.Module, mesh: DeviceMesh, method: Any) -> dict[str, Any]:
    """DDP and FSDP2 take the mean of what is wanted as a sum."""
    inner = getattr(model, "module", model)
    with context_parallel(inner, mesh, layout=Layout(TOKENS, mesh.size()), method=method):
        loss = model(here(IDS), labels=here(IDS)).loss
        loss.backward()
    return errors_of(found(model, loss, mesh.size()))


def cp_ddp(method: str) -> dict[str, Any]:
    mesh = mesh_of()
    return with_tokens_of_its_own(changed(DistributedDataParallel), mesh, method)


def cp_fsdp2(method: str) -> dict[str, Any]:
    mesh = mesh_of()
    return with_tokens_of_its_own(changed(lambda model: sharded(model, mesh)), mesh, method)


def ulysses_and_ring_fsdp2() -> dict[str, Any]:
    """Weights are sharded over all processes of the mesh of two dimensions."""
    model = changed(lambda model: sharded(model, mesh_of()))
    return with_tokens_of_its_own(model, mesh_of(2, 2), ("ulysses", "ring"))


def cp_tp(method: str) -> dict[str, Any]:
    mesh = mesh_of(2, 2, names=("cp", "tp"))
    model = changed(lambda model: sharded(tensor_parallel(model, mesh["tp"]), mesh["cp"]))
    return with_tokens_of_its_own(model, mesh["cp"], method)


def fsdp2_tp_by_transformers() -> dict[str, Any]:
    """Transformers shards the model as it loads it. Processes of the first half have the first half of the rows."""
    folder = shared_folder()
    if dist.get_rank() == 0:
        stock("llama").save_pretrained(folder)
    dist.barrier()
    config = transformers.distributed.DistributedConfig(fsdp_size=2, tp_size=2)
    model = patch(transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config))
    ids = here(IDS).chunk(2)[dist.get_rank() // 2]
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return errors_of(found(model, summed(loss, mesh_of()) / dist.get_world_size()))


# --- pipelines, checkpoints ------------------------------------------------------------------------------------------


def exported_pipeline() -> dict[str, Any]:
    """Two stages of an exported graph. Each microbatch is a row."""
    rank, ids = dist.get_rank(), here(IDS)
    row = ids[:1]
    arguments = {"attention_mask": torch.ones_like(row), "use_cache": False}
    pipe = exported(patch(stock("llama")), (row,), arguments, split_spec={"model.layers.1": SplitPoint.BEGINNING})
    stage = pipe.build_stage(rank, device())

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    losses: list[torch.Tensor] = []
    schedule = ScheduleGPipe(stage, n_microbatches=ROWS, loss_fn=loss_of)
    inputs = [ids, torch.ones_like(ids)] if rank == 0 else []
    schedule.step(*inputs, target=ids if rank == 1 else None, losses=losses)
    loss = torch.stack([x.detach() for x in losses]).mean() if losses else torch.zeros((), device=device())
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, found(stage.submod, loss))
    first, second = everywhere
    return errors_of(Found(first.loss + second.loss, first.gradients | second.gradients))


def weights_that_differ_after(saved: str, loaded: str) -> list[str]:
    """The names of weights that are not, bit for bit, those that a model in another layout saved."""
    mesh = mesh_of(2, 2, names=("dp", "tp"))
    layouts: dict[str, Change] = {
        "whole": lambda model: model,
        "FSDP2": lambda model: sharded(model, mesh_of()),
        "TP": lambda model: tensor_parallel(model, mesh["tp"]),
        "FSDP2 x TP": lambda model: sharded(tensor_parallel(model, mesh["tp"]), mesh["dp"]),
    }
    folder = shared_folder()
    before, after = (layouts[layout](patch(stock("llama"))) for layout in (saved, loaded))
    dcp.save(get_model_state_dict(before), checkpoint_id=folder)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.zero_()
    state = get_model_state_dict(after)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(after, state)
    expected = dict(stock("llama").named_parameters())
    values = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in after.named_parameters()}
    return [name for name in expected.keys() | values.keys() if not torch.equal(values[name], expected[name])]
