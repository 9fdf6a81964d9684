"""Sharding rules of the registered ops for DTensor, through register_sharding, which PyTorch calls experimental.

A rule says, for one dimension of a mesh, which placements of the results follow from placements of the arguments. Each
parameter has a role by its name, the same in all ops: q, k and v are "heads", for example. A way to shard a call gives
each role a placement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# The role of each tensor parameter, of any op.
_ROLES = {
    **dict.fromkeys(("x", "residual", "dy", "ds", "rstd"), "rows"),
    **dict.fromkeys(("weight", "q_weight", "k_weight"), "weight"),
    **dict.fromkeys(("q", "k", "v", "dq", "dk", "dv", "dq_out", "dk_out", "do", "out"), "heads"),
    **dict.fromkeys(("lse", "dlse"), "lse"),
    **dict.fromkeys(("kv_start", "kv_end", "kv_prefix"), "bound"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "whole"),
    "sinks": "sinks", "cos": "table", "sin": "table", "position_ids": "positions",
    "axes": "whole",
}  # fmt: skip

# The roles of each op's results. "gradient of ...": a sum over what is sharded. A result that is empty is "whole".
_RESULTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "rms_norm_forward": lambda a: ["rows", "rows" if a["residual"] is not None else "whole", "rows"],
    "rms_norm_backward": lambda a: [
        "rows" if a["need_dx"] else "whole", "gradient of weight" if a["need_dw"] else "whole"],
    "rope": lambda a: ["heads", "heads" if a["k"] is not None else "whole"],
    "qk_norm_rope": lambda a: ["heads", "heads" if a["k"] is not None else "whole"],
    "qk_norm_rope_backward": lambda a: [
        "heads", "heads" if a["k"] is not None else "whole",
        *("gradient of weight" if a["need_dw"] and a[w] is not None else "whole" for w in ("q_weight", "k_weight"))],
    "rope_qkv_backward": lambda a: ["projection"],
    "attention_forward": lambda a: ["heads", "lse"],
    "attention_backward": lambda a: _attention_grads(a),
    "rope_attention_backward": lambda a: _attention_grads(a),
}  # fmt: skip


def _attention_grads(arguments: dict[str, Any]) -> list[str]:
    needed = [arguments[f"need_{name}"] for name in ("dq", "dk", "dv")]
    sinks = "gradient of sinks" if arguments["need_dsinks"] else "whole"
    return [*("heads" if need else "whole" for need in needed), sinks]


def has_rules(op: torch._ops.OpOverload) -> bool:
    """Whether `op` has sharding rules. Ops that write into their arguments, those of forward mode and decode_attention
    have none."""
    return op._schema.name.split("::")[1] in _RESULTS


@functools.cache
def register_dtensor_rules() -> None:
    """Teach DTensor how the ops of this package are sharded. The first op that gets a DTensor calls it.

    Norms are computed on any sharding but that of the last dimension; the weight's gradient is Partial. RoPE and
    qk_norm_rope are computed on shards of the batch, of the heads, or of the tokens where positions or tables are
    sharded with them; rope_qkv likewise, but not on shards of the heads. Attention is computed on shards of the batch,
    or of the heads where the mesh divides the number of key heads. Other shardings are gathered first. All tensors of a
    call are DTensors, or a TypeError names the one that is not. The ops that write into their arguments, those of
    forward mode and decode_attention have no rules, and raise a TypeError.

    Raises:
        RuntimeError: this torch has no torch.distributed.tensor.experimental.register_sharding.
    """
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError as error:
        missing = "torch.distributed.tensor.experimental.register_sharding"
        raise RuntimeError(f"llama_kernels.distributed.register_dtensor_rules: this torch has no {missing}.") from error
    for name in _RESULTS:
        register_sharding(getattr(torch.ops.llama_kernels, name).default)(functools.partial(_rules, name))


def why_norms_gather(x: Any, weight: Any) -> str | None:
    """Why `rms_norm` does not compute on the shards of x and weight, two DTensors. None: it does, and gathers nothing.

    weight: may be None.
    """
    from torch.distributed.tensor import Shard

    if weight is not None and weight.device_mesh != x.device_mesh:
        return "the weight and the input are on different meshes"
    if weight is not None and not all(placement.is_replicate() for placement in weight.placements):
        return f"the weight is {weight.placements}, not whole on each process"
    for placement in x.placements:
        of_rows = type(placement) is Shard and placement.dim % x.ndim != x.ndim - 1
        if not (of_rows or placement.is_replicate()):
            return f"the input is {x.placements}, not whole rows"
    return None


def _rules(name: str, *args: Any) -> list[tuple[list[Any], list[Any]]]:
    """(placements of the results, placements of the arguments) for each way to shard a call of the op `name`."""
    parameters = getattr(torch.ops.llama_kernels, name).default._schema.arguments
    defaults = [parameter.default_value for parameter in parameters]
    given = dict(zip((p.name for p in parameters), (*args, *defaults[len(args) :]), strict=True))
    results = _RESULTS[name](given)
    rules = []
    for way in _ways(name, given):
        inputs = [way[_ROLES[parameter.name]] if hasattr(x, "shape") else None
                  for parameter, x in zip(parameters, args, strict=False)]  # fmt: skip
        rules.append(([way[role] for role in results], inputs))
    return rules


def _ways(name: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """The placement of each role, for each way to shard a call."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    roles = {*_ROLES.values(), "gradient of weight", "gradient of sinks", "projection"}
    whole: dict[str, Any] = dict.fromkeys(roles, Replicate())
    sums: dict[str, Any] = {"gradient of weight": Partial()}
    if "x" in given:
        return [whole, *({**whole, **sums, "rows": Shard(dim)} for dim in range(len(given["x"].shape) - 1))]

    argument: Callable[[str], Any] = given.get
    q = given["dq" if name == "rope_qkv_backward" else "q"]
    k, cos, positions = (argument(parameter) for parameter in ("k", "cos", "position_ids"))
    packed, attention = len(q.shape) == 3, "attention" in name
    ways = [whole]
    # A query head stays with the key head that it reads. The last dimension of a projection has heads of q, k and v.
    if name != "rope_qkv_backward" and (not attention or _divides(q.mesh, k.shape[1])):
        lse = Shard(0 if packed else 1)
        of_sinks = {"sinks": Shard(0), "gradient of sinks": Shard(0)}
        ways.append({**whole, **sums, **of_sinks, "heads": Shard(1), "lse": lse})
    if not packed:
        B = q.shape[0]
        by_batch: dict[str, Any] = dict.fromkeys(("heads", "lse", "bound", "projection"), Shard(0))
        if cos is not None and len(cos.shape) == 3 and cos.shape[0] == B > 1:
            by_batch["table"] = Shard(0)
        if positions is not None and len(positions.shape) >= 2 and positions.shape[-2] == B > 1:
            by_batch["positions"] = Shard(len(positions.shape) - 2)
        ways.append({**whole, **sums, "gradient of sinks": Partial(), **by_batch})
    if not attention:
        token = 0 if packed else 2
        by_token = {**whole, **sums, "heads": Shard(token), "projection": Shard(0 if packed else 1)}
        # Tables or positions are cut with the tokens: else each rank would count its tokens from 0.
        if positions is not None:
            ways.append({**by_token, "positions": Shard(len(positions.shape) - 1)})
        elif len(cos.shape) == 3 or cos.shape[0] == q.shape[token]:
            ways.append({**by_token, "table": Shard(len(cos.shape) - 2)})
    return ways


def _divides(mesh: Any, heads: int) -> bool:
    """Whether any dimensions of the mesh divide `heads` into equal parts.

    Parts that are more than `heads` do not count: DTensor does not shard a dimension into more parts than its size.
    """
    parts = {1}
    for size in mesh.shape:
        parts |= {n * size for n in parts}
    return all(heads % n == 0 for n in parts if n <= heads)
