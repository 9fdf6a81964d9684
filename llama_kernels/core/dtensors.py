"""Calls of the ops on DTensors. The sharding rules are registered when the first one comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama_kernels.core.checks import message
from llama_kernels.core.sharding import has_rules, register_dtensor_rules


def is_dtensor(x: Any) -> bool:
    """Whether `x` is a DTensor, by the name of its class.

    To import torch.distributed.tensor would take as long as to import this package.
    """
    return type(x).__name__ == "DTensor"


def register_rules_for(args: Sequence[Any]) -> None:
    """Register the sharding rules if a DTensor is among `args`. torch.compile calls it while it traces."""
    for x in args:
        if is_dtensor(x):
            _register_rules_while_tracing()


def _register_rules() -> None:
    register_dtensor_rules()


_register_rules_while_tracing: Callable[[], None] = torch.compiler.assume_constant_result(_register_rules)


# The gradients of results, among the parameters of the ops.
_GRADIENTS = frozenset(("dy", "ds", "do", "dlse", "dq", "dk", "dv", "dq_out", "dk_out"))


def distribute_gradients(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` of an op in a graph. If one of them is a DTensor, all gradients of results among them are made DTensors.

    In a graph of torch.compile the gradient of a result that is not used is a plain tensor of zeros, though the result
    is a DTensor: https://github.com/pytorch/pytorch/issues/173123, with torch 2.13. set_materialize_grads(False) has no
    effect there. The zeros have the whole shape of the result, so each process has them whole.
    """
    mesh = next((x.device_mesh for x in args if is_dtensor(x)), None)
    if mesh is None:
        return args
    from torch.distributed.tensor import DTensor, Replicate

    given = dict(zip((parameter.name for parameter in op._schema.arguments), args, strict=False))
    gradients = {"q", "k"} if given.get("inverse") else _GRADIENTS  # the op rope is its own backward
    whole = [Replicate()] * mesh.ndim
    for name, x in given.items():
        if name in gradients and isinstance(x, torch.Tensor) and not is_dtensor(x):
            given[name] = DTensor.from_local(x, mesh, whole, run_check=False)
    return tuple(given.values())


def repeat_on_dtensors(op: torch._ops.OpOverload, public: str, args: Sequence[Any], error: RuntimeError) -> Any:
    """Register the sharding rules and call `op` again, after a call without them raised `error`. Returns op(*args).

    Raises:
        TypeError: only some of the tensors are DTensors, or the op has no rules.
    """
    tensors = [(p.name, x) for p, x in zip(op._schema.arguments, args, strict=False) if isinstance(x, torch.Tensor)]
    distributed = next(name for name, x in tensors if is_dtensor(x))
    if not has_rules(op):
        why = "It writes into its arguments" if op._schema.is_mutable else "It has no sharding rules"
        fix = f"{why}, so call it on {distributed}.to_local()."
        raise TypeError(message(public, distributed, "a DTensor", "a torch.Tensor", fix)) from error
    for name, x in tensors:
        if not is_dtensor(x) and x.numel() != 1:  # DTensor replicates a single number
            fix = f"distribute_tensor({name}, {distributed}.device_mesh) makes it one that each process has whole."
            wanted = f"a DTensor, as {distributed} is"
            raise TypeError(message(public, name, "a torch.Tensor", wanted, fix)) from error
    if register_dtensor_rules.cache_info().currsize:  # the call had the rules
        raise error
    register_dtensor_rules()
    return op(*args)
