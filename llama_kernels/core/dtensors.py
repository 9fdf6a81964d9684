"""Calls of the ops on DTensors. The sharding rules are registered when the first one comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama_kernels.core.checks import message
from llama_kernels.core.sharding import has_rules, register_dtensor_rules


def is_dtensor(x: Any) -> bool:
    """Without the import of torch.distributed.tensor, which takes as long as that of this package."""
    return type(x).__name__ == "DTensor"


def register_rules_for(args: Sequence[Any]) -> None:
    """Register the sharding rules if a DTensor is among `args`. torch.compile calls it while it traces."""
    for x in args:
        if is_dtensor(x):
            _register_rules_while_tracing()


def _register_rules() -> None:
    register_dtensor_rules()


_register_rules_while_tracing: Callable[[], None] = torch.compiler.assume_constant_result(_register_rules)


def repeat_on_dtensors(op: torch._ops.OpOverload, public: str, args: Sequence[Any], error: RuntimeError) -> Any:
    """What op(*args) gives once the sharding rules are registered, where `error` came from a call without them.

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
