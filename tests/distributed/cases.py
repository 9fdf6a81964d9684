"""Calls of cp_attention, the same calls on one device, and attention of blocks in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import llama_kernels as lk
from llama_kernels import distributed
from llama_kernels.distributed import blocks
from llama_kernels.distributed.blocks import Grads, Mask, Scores
from llama_kernels.ops.attention.call import Results
from llama_kernels.ops.attention.checks import checked_call
from llama_kernels.reference.attention import visible
from tests.distributed.processes import here, mesh_of

B, TOKENS = 2, 48
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


class Case(NamedTuple):
    """A call of cp_attention. documents: where those of each of the two sequences begin."""

    method: str | tuple[str, str] = "ring"
    kind: Any = "zigzag"
    documents: tuple[tuple[int, ...], ...] | None = None
    Hq: int = 4
    Hkv: int = 2
    D: int = 16
    Dv: int = 16
    is_causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    softcap: float | None = None
    sinks: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"is_causal": self.is_causal, "window_size": self.window_size, "softcap": self.softcap}


class Inputs(NamedTuple):
    """Of the whole sequence."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    dlse: torch.Tensor
    sinks: torch.Tensor | None
    doc_start: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v, do = (x.to(dtype) for x in self[:4])
        return Inputs(q, k, v, do, self.dlse.to(wide), None if self.sinks is None else self.sinks.to(wide), self[-1])


def doc_starts(documents: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """The first position of each token's document, for each sequence, whose documents begin at 0 and at these."""
    doc_start = torch.zeros(B, TOKENS, dtype=torch.int32)
    for row, starts in zip(doc_start, documents, strict=True):
        for start in starts:
            row[start:] = start
    return doc_start


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(5)
    normal = lambda *shape: here(torch.randn(*shape, generator=generator))  # noqa: E731
    heads = ((case.Hq, case.D), (case.Hkv, case.D), (case.Hkv, case.Dv), (case.Hq, case.Dv))
    tensors = [normal(B, TOKENS, H, D).to(torch.bfloat16).transpose(1, 2) for H, D in heads]
    doc_start = None
    if case.documents is not None:
        doc_start = here(doc_starts(case.documents))
    sinks = normal(case.Hq) if case.sinks else None
    return Inputs(*tensors, normal(B, case.Hq, TOKENS), sinks, doc_start).to(dtype)


def on_one_device(case: Case, x: Inputs, attention: Any) -> list[torch.Tensor]:
    """out, lse and the gradients, by lk.attention or its reference."""
    leaves = [t.detach().requires_grad_() for t in (*x[:3], x.sinks) if t is not None]
    options = dict(case.options)
    if x.doc_start is not None:
        options |= {"kv_start": x.doc_start, "kv_end": blocks.document_ends(x.doc_start).int()}
    q, k, v, *sinks = leaves
    results = attention(q, k, v, sinks=sinks[0] if sinks else None, return_lse=True, **options)
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, (x.do, x.dlse))]


def mesh_for(case: Case) -> DeviceMesh:
    return mesh_of() if isinstance(case.method, str) else mesh_of(2, dist.get_world_size() // 2)


def on_all_ranks(case: Case, x: Inputs) -> list[torch.Tensor]:
    """The same by cp_attention, put together again."""
    mesh = mesh_for(case)
    kind = case.kind if isinstance(case.kind, str) else case.kind[: mesh.size()]
    layout = distributed.Layout(TOKENS, mesh.size(), kind)
    local = [t.requires_grad_() for t in distributed.shard(mesh, x[:3], (2, 2, 2), layout=layout)]
    do, dlse = distributed.shard(mesh, (x.do, x.dlse), (2, 2), layout=layout)
    doc_start = None if x.doc_start is None else distributed.shard(mesh, (x.doc_start,), (1,), layout=layout)[0]
    sinks = None if x.sinks is None else x.sinks.detach().requires_grad_()
    results = distributed.cp_attention(
        *local, mesh=mesh, layout=layout, method=case.method, doc_start=doc_start, sinks=sinks, return_lse=True,
        **case.options,
    )  # fmt: skip
    leaves = [*local, *([] if sinks is None else [sinks])]
    dq, dk, dv, *dsinks = torch.autograd.grad(results, leaves, (do, dlse))
    for share in dsinks:
        dist.all_reduce(share)
    return [*distributed.unshard(mesh, (*results, dq, dk, dv), (2,) * 5, layout=layout), *dsinks]


# --- blocks in float64 -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, cp_attention takes float64, which the kernels do not: blocks are computed by plain PyTorch."""

    def checked(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        sinks = options.pop("sinks")
        call = checked_call(
            op, q.float(), k.float(), v.float(), sinks=None if sinks is None else sinks.float(), **options
        )  # fmt: skip
        return call._replace(q=q, k=k, v=v, sinks=sinks)

    with (
        mock.patch.object(distributed.attention, "checked_call", checked),
        mock.patch.object(blocks, "forward", _forward),
        mock.patch.object(blocks, "backward", _backward),
    ):
        yield


def _forward(q, k, v, sinks, mask: Mask, scores: Scores):
    left, right = (-1 if side is None else side for side in mask[2:])
    return lk.reference.attention(
        q, k, v, is_causal=False, window_size=(left, right), scale=scores.scale, softcap=scores.softcap, sinks=sinks,
        kv_start=mask.kv_start, kv_end=mask.kv_end, return_lse=True,
    )  # fmt: skip


def _backward(results: Results, q, k, v, sinks, mask: Mask, scores: Scores):
    groups = (k.shape[1], -1)
    out, lse, do, dlse = results
    q, out, do = (x.unflatten(1, groups) for x in (q, out, do))
    left, right = (-1 if side is None else side for side in mask[2:])
    see = visible(q.shape[3], k.shape[2], False, (left, right), mask.kv_start, mask.kv_end, q.device)
    s = torch.einsum("bhgid,bhjd->bhgij", q, k) * scores.scale
    slope = torch.ones_like(s)
    if scores.softcap:
        s = scores.softcap * torch.tanh(s / scores.softcap)
        slope = 1 - (s / scores.softcap) ** 2
    p = torch.exp(s - lse.unflatten(1, groups)[..., None]).masked_fill(~see, 0)
    delta = (do * out).sum(-1) - (0 if dlse is None else dlse.unflatten(1, groups))
    ds = p * (torch.einsum("bhgid,bhjd->bhgij", do, v) - delta[..., None]) * slope * scores.scale
    dq = torch.einsum("bhgij,bhjd->bhgid", ds, k).flatten(1, 2)
    dk, dv = torch.einsum("bhgij,bhgid->bhjd", ds, q), torch.einsum("bhgij,bhgid->bhjd", p, do)
    dsinks = None
    if sinks is not None:
        dsinks = -(torch.exp(sinks[:, None] - lse) * delta.flatten(1, 2)).sum((0, 2))
    return Grads(dq, dk, dv, dsinks)
