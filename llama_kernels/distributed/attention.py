"""Attention over a sequence whose tokens are divided among processes: the public function and its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch.distributed.device_mesh import DeviceMesh

from llama_kernels.core.autograd import refuse_double_backward
from llama_kernels.core.checks import check_flag, check_tensors, message, shape_of, values_to_check
from llama_kernels.core.dtensors import is_dtensor
from llama_kernels.distributed import blocks
from llama_kernels.distributed.all_gather import Gathered
from llama_kernels.distributed.blocks import Mask, Scores
from llama_kernels.distributed.layout import Layout, Parts, rank_in
from llama_kernels.distributed.ring import Ring
from llama_kernels.distributed.transport import all_gather
from llama_kernels.distributed.ulysses import Exchange, Local
from llama_kernels.ops.attention.call import AttentionCall, Results, Window
from llama_kernels.ops.attention.checks import checked_call

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "cp_attention"
_METHODS = ("ring", "all_gather", "ulysses")


class _Options(TypedDict, total=False):
    doc_start: torch.Tensor | None
    method: str | tuple[str, str]
    is_causal: bool
    window_size: tuple[int, int]
    scale: float | None
    softcap: float | None
    sinks: torch.Tensor | None


@overload
def cp_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mesh: DeviceMesh, layout: Layout,
    return_lse: Literal[False] = False, **options: Unpack[_Options],
) -> torch.Tensor: ...  # fmt: skip


@overload
def cp_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mesh: DeviceMesh, layout: Layout,
    return_lse: Literal[True], **options: Unpack[_Options],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


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
        method: "ring": blocks of keys travel from process to process, and each holds two beside its own. "all_gather":
            every process gets all keys. "ulysses": every process gets all tokens of Hq / W heads; W must divide Hq, and
            one of W and Hkv the other. A pair of "ulysses" and "ring", one for each dimension of the mesh: heads are
            exchanged along one dimension, and keys travel along the other.
        is_causal, window_size, scale, softcap: as in `attention`, in global positions.
        sinks: (Hq,), as in `attention`. Its gradient is that of this process's rows or heads: sum it over the mesh, as
            those of all parameters.
        return_lse: also return lse.

    Returns:
        out, (B, Hq, S / W, Dv) in q's dtype; with return_lse also lse, (B, Hq, S / W) float32. Both are differentiable.

    Raises:
        TypeError, ValueError: as `attention`; also if mesh, layout, doc_start or method do not fit. It is raised
            before any communication. Inside `llama_kernels.checked`, ValueError also if the values of doc_start cannot
            be those of this process's tokens; the other processes may then wait for it.
    """
    check_flag(_OP, "return_lse", return_lse)
    rank = rank_in(_OP, mesh, layout)
    methods = _check_method(method, mesh)
    _refuse_dtensors(q=q, k=k, v=v, doc_start=doc_start, sinks=sinks)
    call = checked_call(
        _OP, q, k, v, is_causal=is_causal, scale=scale, window_size=window_size, softcap=softcap, sinks=sinks,
        kv_start=None, kv_end=None, deterministic=None,
    )  # fmt: skip
    _check_tokens(call, layout, doc_start)
    if doc_start is not None and (starts := values_to_check(doc_start)) is not None:
        _check_starts(starts, layout.positions(rank, starts.device))
    if "ulysses" in methods:
        _check_heads(call, mesh.shape[methods.index("ulysses")])

    exchange, over_keys = _plan(methods, call, doc_start, layout, mesh, rank)
    out, lse = _ContextParallel.apply(call.q, call.k, call.v, call.sinks, exchange, over_keys)
    return (out, lse) if return_lse else out


# --- the methods -----------------------------------------------------------------------------------------------------


class _ContextParallel(torch.autograd.Function):
    """q, k, v and sinks -> (out, lse) of this rank's tokens.

    exchange: gives this rank all tokens of some heads, and takes results back; None where heads are not exchanged.
    over_keys: attention of the queries that this rank then has to the keys of all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None,
        exchange: Exchange | None, over_keys: Ring | Gathered | Local,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        ctx.heads, ctx.key_heads = q.shape[1], k.shape[1]
        if exchange is not None:
            q, k, v = (exchange.to_heads(x) for x in (q, k, v))
            sinks = None if sinks is None else sinks.chunk(exchange.group.size())[exchange.group.rank()]
        out, lse = over_keys.forward(q, k, v, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.exchange, ctx.over_keys = exchange, over_keys
        ctx.set_materialize_grads(False)
        if exchange is not None:
            return exchange.to_tokens(out), exchange.to_tokens(lse.unsqueeze(-1)).squeeze(-1)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        exchange, given = ctx.exchange, (do, dlse, q, k, v, sinks)
        if exchange is not None:
            do = None if do is None else exchange.to_heads(do)
            dlse = None if dlse is None else exchange.to_heads(dlse.unsqueeze(-1)).squeeze(-1)
        do = torch.zeros_like(out) if do is None else do.contiguous()
        results = Results(out, lse, do, None if dlse is None else dlse.contiguous())
        grads = ctx.over_keys.backward(results, q, k, v, sinks)
        dsinks = grads.sinks
        if exchange is None:
            dq, dk, dv = (grad.to(q.dtype) for grad in grads[:3])
        else:
            heads = (ctx.heads, ctx.key_heads, ctx.key_heads)
            dq, dk, dv = (exchange.sum_to_tokens(g, H, q.dtype) for g, H in zip(grads[:3], heads, strict=True))
            if dsinks is not None:  # those of the other ranks' heads are 0 here
                own = dsinks.new_zeros(exchange.group.size(), len(dsinks))
                own[exchange.group.rank()] = dsinks
                dsinks = own.flatten()
        return *refuse_double_backward(_OP, (dq, dk, dv, dsinks), given), None, None


def _plan(
    methods: tuple[str, ...], call: AttentionCall, doc_start: torch.Tensor | None, layout: Layout, mesh: DeviceMesh,
    rank: int,
) -> tuple[Exchange | None, Ring | Gathered | Local]:  # fmt: skip
    """The `exchange` and `over_keys` of _ContextParallel."""
    window, scores, device = Window(call.left, call.right), Scores(call.scale, call.softcap), call.q.device
    exchange, group = None, mesh.get_group(0)
    parts: Parts = layout  # it keeps its positions on the device from call to call
    if "ulysses" in methods:
        exchange, parts, rank = _exchange(methods.index("ulysses"), layout, mesh)
        group = mesh.get_group(1 - methods.index("ulysses")) if len(methods) == 2 else group
        if doc_start is not None:
            doc_start = exchange.parts.in_order(all_gather(doc_start, exchange.group).wait(), 1)
        elif methods == ("ulysses",):
            return exchange, Local(Mask(None, None, *window), scores)

    tokens, positions = layout.tokens, parts.positions(rank, device)
    doc_end: torch.Tensor | int = tokens
    if doc_start is None:
        doc_start = torch.zeros(call.q.shape[0], len(positions), dtype=torch.int64, device=device)
    elif call.right != 0:  # rows look ahead
        everywhere = doc_start if len(parts.lists) == 1 else parts.in_order(all_gather(doc_start, group).wait(), 1)
        doc_end = blocks.document_ends(everywhere)[:, positions]
    seen = blocks.visible(positions, doc_start, doc_end, window)
    if methods == ("ulysses",):
        return exchange, Local(blocks.mask_of_part(seen, parts, 0), scores)
    return exchange, (Gathered if methods == ("all_gather",) else Ring)(seen, parts, group, scores)


def _exchange(dim: int, layout: Layout, mesh: DeviceMesh) -> tuple[Exchange, Parts, int]:
    """The exchange along dimension `dim` of the mesh, the parts of the sequence after it, and the one this rank has."""
    ranks = torch.arange(layout.ranks).view(*mesh.shape).movedim(dim, -1).reshape(-1, mesh.shape[dim])
    exchanged = [Parts([layout.lists[rank] for rank in row]) for row in ranks.tolist()]
    place = 0 if mesh.ndim == 1 else mesh.get_local_rank(1 - dim)
    return Exchange(exchanged[place], mesh.get_group(dim)), Parts([parts.merged() for parts in exchanged]), place


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_method(method: str | tuple[str, str], mesh: DeviceMesh) -> tuple[str, ...]:
    methods: tuple[Any, ...] = tuple(method) if isinstance(method, (tuple, list)) else (method,)
    pair = methods in (("ulysses", "ring"), ("ring", "ulysses"))
    if not pair and (len(methods) != 1 or methods[0] not in _METHODS):
        wanted = '"ring", "all_gather", "ulysses", or a pair of "ulysses" and "ring"'
        raise ValueError(message(_OP, "method", repr(method), wanted))
    if mesh.ndim != len(methods):
        wanted = f"{len(methods)}, one for each method of {method!r}"
        raise ValueError(message(_OP, "mesh", f"of {mesh.ndim} dimensions", wanted))
    return methods


def _refuse_dtensors(**tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if is_dtensor(x):
            raise TypeError(
                message(_OP, name, "a DTensor", "a torch.Tensor, what this process has", f"Pass {name}.to_local().")
            )


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


def _check_starts(starts: torch.Tensor, positions: torch.Tensor) -> None:
    """Inside `checked`: raise unless `starts` can be those of the documents of the tokens at `positions`."""
    fix = "With Hugging Face, pass position minus position_ids, both of this process's tokens."
    if ((starts < 0) | (starts > positions)).any():
        wanted = "the global position of the first token of its document"
        raise ValueError(message(_OP, "doc_start", "outside of 0 to its token's position", wanted, fix))
    same, later = starts.diff() == 0, starts[..., 1:] > positions[:-1]
    if not (same | later).all():
        got = "inside an earlier document, at a token that does not belong to it"
        raise ValueError(message(_OP, "doc_start", got, "documents one after another", fix))


def _check_heads(call: AttentionCall, ranks: int) -> None:
    Hq, Hkv = call.q.shape[1], call.k.shape[1]
    if Hq % ranks or (Hkv % ranks and ranks % Hkv):
        wanted = f"numbers of heads that {ranks} ranks divide, or Hkv that divides {ranks}"
        raise ValueError(message(_OP, "q", f"a tensor of {Hq} heads, and k of {Hkv}", wanted, 'Use method="ring".'))
