"""Attention over a sequence whose tokens are divided among processes: the public function and its checks."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from llama_kernels.core.checks import check_tensors, message, shape_of
from llama_kernels.distributed import blocks
from llama_kernels.distributed.all_gather import AllGather
from llama_kernels.distributed.blocks import Reach, Scores
from llama_kernels.distributed.layout import Layout, Parts, rank_in
from llama_kernels.distributed.ring import Ring
from llama_kernels.distributed.transport import all_gather
from llama_kernels.distributed.ulysses import to_heads, to_tokens
from llama_kernels.ops.attention.call import AttentionCall
from llama_kernels.ops.attention.checks import checked_call
from llama_kernels.ops.attention.op import attend

_OP = "cp_attention"
_METHODS = ("ring", "all_gather", "ulysses")


def cp_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mesh: DeviceMesh,
    layout: Layout,
    doc_start: torch.Tensor | None = None,
    method: str | tuple[str, str] = "ring",
    is_causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Context-parallel attention: each process has some tokens of every sequence, and gets attention to all of them.

    Exact, and deterministic: partial results and gradients are float32 and are added in a fixed order. Every process
    of the mesh calls it, with the same arguments but for its own tokens.

    Args:
        q: (B, Hq, S / W, D), this process's tokens in the order of layout.positions, W the processes of the mesh.
            bfloat16, float16 or float32.
        k, v: (B, Hkv, S / W, D) and (B, Hkv, S / W, Dv), likewise.
        mesh: of one dimension; of two where `method` is a pair.
        layout: which tokens each rank holds. Ranks are places in the mesh, row by row.
        doc_start: (B, S / W) int32, the global position of the first token of each token's document, where several are
            packed into one sequence: with Hugging Face, position minus position_ids. None: one document.
        method: "ring": blocks of keys travel around; memory for three blocks of keys. "all_gather": every process
            gets all keys. "ulysses": every process gets all tokens of Hq / W heads; W divides Hq, and one of W and Hkv
            divides the other. A pair of "ulysses" and "ring", one for each dimension of the mesh: heads are exchanged
            along one dimension, keys travel along the other.
        is_causal, window_size, scale, softcap: as in `attention`, in global positions.
        sinks: (Hq,), as in `attention`. Its gradient is that of this process's rows or heads: sum it over the mesh, as
            those of all parameters.
        return_lse: also return lse.

    Returns:
        out, (B, Hq, S / W, Dv) in q's dtype; with return_lse also lse, (B, Hq, S / W) float32. Both are differentiable.

    Raises:
        TypeError, ValueError: as `attention`; also if mesh, layout, doc_start or method do not fit. It is raised
            before any communication.
    """
    rank = rank_in(_OP, mesh, layout)
    methods = _check_method(method, mesh)
    call = checked_call(
        _OP, q, k, v, is_causal=is_causal, scale=scale, window_size=window_size, softcap=softcap, sinks=sinks,
        kv_start=None, kv_end=None, deterministic=None,
    )  # fmt: skip
    _check_tokens(call, layout, doc_start)
    if "ulysses" in methods:
        _check_heads(call, mesh.shape[methods.index("ulysses")])

    parts, group = Parts(layout.lists), mesh.get_group(0)
    if methods == ("ulysses",):
        out, lse = _ulysses(call, doc_start, parts, group)
    elif len(methods) == 1:
        out, lse = _over_keys(methods[0], call, doc_start, parts, group, rank)
    else:
        out, lse = _ulysses_and_ring(call, doc_start, layout, mesh, methods.index("ulysses"))
    return (out, lse) if return_lse else out


# --- the methods -----------------------------------------------------------------------------------------------------


def _over_keys(method, call: AttentionCall, doc_start, parts: Parts, group, rank: int):
    """Ring and all_gather: this rank's queries see the keys of all ranks."""
    doc_start, doc_end = _documents(call, doc_start, parts, group, rank)
    seen = blocks.visible(parts.positions(rank, call.q.device), doc_start, doc_end, Reach(call.left, call.right))
    function = Ring if method == "ring" else AllGather
    return function.apply(call.q, call.k, call.v, call.sinks, seen, parts, group, Scores(call.scale, call.softcap))


def _documents(call: AttentionCall, doc_start, parts: Parts, group, rank: int):
    """Where the document of each of this rank's tokens starts and ends. The ends matter where rows look ahead."""
    tokens = sum(map(len, parts.lists))
    if doc_start is None:
        return torch.zeros(call.q.shape[0], call.q.shape[2], dtype=torch.int64, device=call.q.device), tokens
    if call.right == 0:
        return doc_start, tokens
    everywhere = parts.in_order(all_gather(doc_start, group).wait(), 1)
    return doc_start, blocks.document_ends(everywhere)[:, parts.positions(rank, call.q.device)]


def _ulysses(call: AttentionCall, doc_start, parts: Parts, group):
    heads = _exchanged(call, parts, group)
    if doc_start is not None:
        everywhere = parts.in_order(all_gather(doc_start, group).wait(), 1)
        reach = Reach(call.left, call.right)
        seen = blocks.visible(parts.merged().to(call.q.device), everywhere, blocks.document_ends(everywhere), reach)
        heads = heads._replace(kv_start=seen.first.int(), kv_end=seen.end.int(), left=None, right=None)
    out, lse = attend(_OP, heads, True)
    return to_tokens(parts, group, out), to_tokens(parts, group, lse.unsqueeze(-1)).squeeze(-1)


def _ulysses_and_ring(call: AttentionCall, doc_start, layout: Layout, mesh: DeviceMesh, ulysses: int):
    """Heads are exchanged along dimension `ulysses` of the mesh, keys travel along the other."""
    ranks = torch.arange(layout.ranks).view(*mesh.shape).movedim(ulysses, 0)  # [of ulysses, of the ring]
    here = mesh.get_coordinate()
    exchanged = [Parts([layout.lists[rank] for rank in column]) for column in ranks.T.tolist()]
    parts, heads_group, ring_group = exchanged[here[1 - ulysses]], mesh.get_group(ulysses), mesh.get_group(1 - ulysses)
    heads = _exchanged(call, parts, heads_group)
    if doc_start is not None:
        doc_start = parts.in_order(all_gather(doc_start, heads_group).wait(), 1)
    ring = Parts([each.merged() for each in exchanged])
    out, lse = _over_keys("ring", heads, doc_start, ring, ring_group, here[1 - ulysses])
    return to_tokens(parts, heads_group, out), to_tokens(parts, heads_group, lse.unsqueeze(-1)).squeeze(-1)


def _exchanged(call: AttentionCall, parts: Parts, group) -> AttentionCall:
    """The call of all tokens of this rank's heads."""
    q, k, v = to_heads(parts, group, call.q, call.k, call.v)
    sinks = None if call.sinks is None else call.sinks.chunk(group.size())[group.rank()]
    return call._replace(q=q, k=k, v=v, sinks=sinks, longest_q=q.shape[2], longest_k=k.shape[2])


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_method(method: str | tuple[str, str], mesh: DeviceMesh) -> tuple[str, ...]:
    methods = (method,) if isinstance(method, str) else tuple(method)
    pair = len(methods) == 2 and set(methods) == {"ulysses", "ring"}
    if not pair and (len(methods) != 1 or methods[0] not in _METHODS):
        wanted = '"ring", "all_gather", "ulysses", or a pair of "ulysses" and "ring"'
        raise ValueError(message(_OP, "method", repr(method), wanted))
    if mesh.ndim != len(methods):
        wanted = f"{len(methods)}, one for each method of {method!r}"
        raise ValueError(message(_OP, "mesh", f"of {mesh.ndim} dimensions", wanted))
    return methods


def _check_tokens(call: AttentionCall, layout: Layout, doc_start: torch.Tensor | None) -> None:
    for name, x in (("q", call.q), ("k", call.k)):
        if x.shape[2] != layout.local_tokens:
            wanted = f"{layout.local_tokens} tokens, those of one rank of {layout}"
            raise ValueError(message(_OP, name, shape_of(x), wanted))
    if doc_start is None:
        return
    check_tensors(_OP, (torch.int32,), doc_start=doc_start)
    rows = (call.q.shape[0], call.q.shape[2])
    if doc_start.shape != rows or doc_start.device != call.q.device:
        got = f"{shape_of(doc_start)} on {doc_start.device}"
        raise ValueError(message(_OP, "doc_start", got, f"{rows} on {call.q.device}"))


def _check_heads(call: AttentionCall, ranks: int) -> None:
    Hq, Hkv = call.q.shape[1], call.k.shape[1]
    if Hq % ranks or (Hkv % ranks and ranks % Hkv):
        wanted = f"numbers of heads that {ranks} ranks divide, or Hkv that divides {ranks}"
        raise ValueError(message(_OP, "q, k", f"of {Hq} and {Hkv} heads", wanted, 'Use method="ring".'))
