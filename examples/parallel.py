"""A model in many processes: DDP, FSDP2, context parallel, tensor parallel, and several of these at once.

The processes form a mesh of dp x cp x tp. Those that differ in tp only share the weights of each layer and compute on
the same tokens. Those that differ in cp only have other tokens of the same rows. Those that differ in dp have other
rows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from examples.packing import Rows
from llama_kernels.distributed import Layout, context_parallel

# How PyTorch does what Transformers plans for a module.
STYLES = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from examples.common import positive

    group = parser.add_argument_group("under torchrun", "processes that --cp and --tp leave have rows of their own")
    group.add_argument("--parallel", choices=("ddp", "fsdp2"), help="replicate or shard the weights (default: ddp)")
    group.add_argument("--cp", type=positive, default=1, help="processes that share the tokens of a row")
    group.add_argument("--tp", type=positive, default=1, help="processes that share each layer; needs fsdp2")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if the arguments do not fit the number of processes or one another."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args.parallel = args.parallel or ("fsdp2" if args.tp > 1 else "ddp")
    if processes % (args.cp * args.tp):
        parser.error(f"--cp {args.cp} times --tp {args.tp} does not divide the {processes} processes of torchrun")
    if args.batch % (dp := processes // (args.cp * args.tp)):
        parser.error(f"--batch {args.batch} does not divide among {dp} processes that have rows of their own")
    if args.cp > 1 and args.max_length % (2 * args.cp):
        parser.error(f"--max-length {args.max_length} does not divide into 2 x {args.cp} chunks for --cp {args.cp}")
    if args.cp > 1 and (args.stock or args.compare):
        parser.error("--cp is of patched models: leave out --stock and --compare")
    if args.tp > 1 and args.parallel == "ddp":
        parser.error("--tp makes weights DTensors, which DDP does not take: --parallel fsdp2")


class World:
    """The processes that torchrun started, and the place of this one among them. Without torchrun there is one.

    dp: the number of processes with rows of their own. sharing: the number that divide the work of a batch, dp x cp.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.sharing = self.size // args.tp
        self.dp = self.sharing // args.cp
        if "RANK" not in os.environ:
            return
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        names = ("dp", "cp", "tp")
        self.mesh = init_device_mesh(args.device, (self.dp, args.cp, args.tp), mesh_dim_names=names)
        # The same processes, as weights are sharded over them.
        self.weights = init_device_mesh(args.device, (self.sharing, args.tp), mesh_dim_names=("dp_cp", "tp"))

    def share(self, rows: Rows) -> Rows:
        """The rows of a batch for this process. Processes that share rows have them whole."""
        if self.dp == 1:
            return rows
        return {name: x.chunk(self.dp)[self.mesh.get_local_rank("dp")] for name, x in rows.items()}

    def sum(self, x: torch.Tensor) -> float:
        """The sum over the processes that have rows of their own."""
        if self.dp > 1:
            dist.all_reduce(x, group=self.mesh.get_group("dp"))
        return x.item()

    def distribute(self, model: Any) -> torch.nn.Module:
        """Tensor parallel as the model's own plan says. Then DDP, which keeps a replica in each process, or FSDP2,
        which shards the weights of each layer over the processes."""
        if not dist.is_initialized():
            return model
        if self.args.tp > 1:
            if unknown := sorted({*model.tp_plan.values()} - STYLES.keys()):
                raise SystemExit(f"--tp: the plan of {type(model).__name__} has {unknown}, which this example lacks")
            plan = {name: STYLES[style]() for name, style in model.tp_plan.items()}
            parallelize_module(model, self.weights["tp"], plan)
        if self.args.parallel == "ddp":
            return DistributedDataParallel(model)
        policy = MixedPrecisionPolicy()
        if self.args.dtype == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*model.base_model.layers, model):
            fully_shard(module, mesh=self.weights["dp_cp"], mp_policy=policy)
        return model

    def divided_tokens(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """With --cp, the context in which each process computes some tokens of every row."""
        if self.args.cp == 1:
            return contextlib.nullcontext()
        return context_parallel(model, self.mesh["cp"], layout=Layout(self.args.max_length, self.args.cp))


def clip_gradients(model: torch.nn.Module, largest: float) -> None:
    """As torch.nn.utils.clip_grad_norm_, which does not take DTensors of several meshes."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(p.grad) for p in parameters]
    total = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, total, foreach=False)
