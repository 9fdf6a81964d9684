"""Cases of attention, their inputs, and the check of a call: out, lse and every gradient against float64."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core import launch_cache
from llama_kernels.ops.attention import tables
from llama_kernels.ops.attention.hopper import switch
from llama_kernels.ops.attention.tables import Tile
from tests.support.guards import guarded, guarded_allocations, memory_order, relaid, unchanged
from tests.support.hardware import Arithmetic
from tests.support.ideal import attention_mask, drawn, eager_attention, ideal_attention
from tests.support.judge import judge

# Factors of q and k, and of v. With a factor of 3, some rows have all their mass on one key. A larger factor is too
# much for float32, which holds a logit of a million to one digit after the point.
FAMILIES = {"randn": (1, 1), "peaky": (3, 1), "tiny": (1e-3, 1e-3), "huge": (1, 1e3)}


BOUNDS = ("kv_start", "kv_end", "kv_prefix")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. With `packed`, the lengths of each sequence in q and in k, B is 1 and Sq and Sk are their sums."""

    B: int
    Hq: int
    Hkv: int
    Sq: int
    Sk: int
    D: int
    DV: int
    is_causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    kv_start: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    kv_end: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    kv_prefix: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __str__(self) -> str:
        size = "-".join(map(str, (self.B, self.Hq, self.Hkv, self.Sq, self.Sk, self.D, self.DV)))
        on = ["full" if not self.is_causal else "", f"window{self.window_size}" if max(self.window_size) >= 0 else ""]
        on.append("" if self.scale is None else f"scale{self.scale}")
        on += [name for name in ("softcap", "sinks", *BOUNDS, "packed") if getattr(self, name)]
        return "-".join([size, *filter(None, on)])


def anywhere(i: torch.Tensor, Sk: int) -> torch.Tensor:
    """Bounds in no order. Some rows see no key."""
    return (i * 7919) % (Sk + 9)


def padded_left(i: torch.Tensor, Sk: int) -> torch.Tensor:
    return torch.full_like(i, Sk // 3)


def so_far(i: torch.Tensor, Sk: int) -> torch.Tensor:
    """Causal in a cache that is not full."""
    return Sk // 2 - 20 + i


def documents(i: torch.Tensor, Sk: int) -> torch.Tensor:
    """Documents of 45 tokens in one row."""
    return i // 45 * 45


def shared(i: torch.Tensor, Sk: int) -> torch.Tensor:
    """For kv_prefix: a prompt that the last two thirds of the rows share."""
    return torch.where(i * 3 >= i.shape[0], Sk // 3 + 1, 0)


def packed(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], Hq: int, Hkv: int, D: int, DV: int, **on: Any):
    return Case(1, Hq, Hkv, sum(lengths_q), sum(lengths_k), D, DV, packed=(lengths_q, lengths_k), **on)


# The keys of a chunk where decoding is split over few keys.
CHUNK = 32
# Tiles with which few tokens make many blocks, masked and unmasked.
SMALL_TILES = (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1, split=True))


@dataclasses.dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    kv_start: torch.Tensor | None
    kv_end: torch.Tensor | None
    kv_prefix: torch.Tensor | None
    do: torch.Tensor
    dlse: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.q, self.k, self.v, self.sinks) if x is not None]


def make(case: Case, dtype: torch.dtype, device: torch.device, family: str = "randn") -> Inputs:
    """q, k and do in the memory order of a (B, S, H, D) projection, v in its own."""
    size_qk, size_v = FAMILIES[family]

    def tokens_first(S: int, H: int, D: int) -> torch.Tensor:
        x = torch.randn(case.B, S, H, D, device=device).transpose(1, 2)
        return x[0].transpose(0, 1) if case.packed else x

    heads = ((case.Sq, case.Hq), (case.Sk, case.Hkv))
    q, k = ((size_qk * tokens_first(S, H, case.D)).to(dtype) for S, H in heads)
    do, v = (tokens_first(S, H, case.DV) for S, H in heads)
    do, v = do.to(dtype), (size_v * v).to(dtype)
    v = v if case.packed else v.contiguous()
    sinks = torch.randn(case.Hq, device=device) if case.sinks else None

    def bound(of_rows: Callable[[torch.Tensor, int], torch.Tensor] | None) -> torch.Tensor | None:
        if of_rows is None:
            return None
        lengths = case.packed or ((case.Sq,), (case.Sk,))
        rows = torch.cat([of_rows(torch.arange(Sq, device=device), Sk) for Sq, Sk in zip(*lengths, strict=True)]).int()
        return rows if case.packed else rows.repeat(case.B, 1)

    bounds = (bound(getattr(case, name)) for name in BOUNDS)
    lse_shape = (case.Hq, case.Sq) if case.packed else (case.B, case.Hq, case.Sq)
    inputs = Inputs(q, k, v, sinks, *bounds, do, torch.randn(lse_shape, device=device))
    for x in inputs.tensors:
        x.requires_grad_()
    return inputs


def cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def run(ops: Any, case: Case, x: Inputs, gradients: bool = True) -> list[torch.Tensor]:
    """out, lse and the gradients of `ops`' attention, lk or lk.reference."""
    options = {name: getattr(case, name) for name in ("is_causal", "window_size", "softcap", "scale")}
    options.update(sinks=x.sinks, return_lse=True, **{name: getattr(x, name) for name in BOUNDS})
    if case.packed:
        cu = [cu_seqlens(lengths, x.q.device) for lengths in case.packed]
        cu[1] = cu[0] if case.packed[0] == case.packed[1] else cu[1]  # one tensor, as in self-attention
        out, lse = ops.attention_varlen(x.q, x.k, x.v, *cu, *map(max, case.packed), **options)
    else:
        out, lse = ops.attention(x.q, x.k, x.v, **options)
    return [out, lse, *(torch.autograd.grad((out, lse), x.tensors, (x.do, x.dlse)) if gradients else ())]


def in_float64(x: Inputs) -> Inputs:
    def wide(t: torch.Tensor | None) -> torch.Tensor | None:
        return t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(t.requires_grad)

    return Inputs(*(wide(getattr(x, f.name)) for f in dataclasses.fields(x)))


def by_sequence(function: Callable[..., tuple], case: Case, x: Inputs) -> list[torch.Tensor]:
    """The results of a dense `function` of (q, k, v, see, scale, softcap, sinks, do, dlse), by packed sequence."""
    scale = case.D**-0.5 if case.scale is None else case.scale
    with torch.no_grad():
        if not case.packed:
            rule = (case.is_causal, case.window_size, x.kv_start, x.kv_end, x.q.device, x.kv_prefix)
            see = attention_mask(case.Sq, case.Sk, *rule)
            results = function(x.q, x.k, x.v, see, scale, case.softcap, x.sinks, x.do, x.dlse)
            return [r for r in results if r is not None]
        out, lse = torch.zeros_like(x.do), torch.zeros_like(x.dlse)
        grads = [torch.zeros_like(t) for t in x.tensors]
        ends = [list(itertools.accumulate(lengths, initial=0)) for lengths in case.packed]
        for (a, b), (c, d) in zip(*map(itertools.pairwise, ends), strict=True):
            dense = [
                t[s].transpose(0, 1)[None] for t, s in ((x.q, slice(a, b)), (x.k, slice(c, d)), (x.v, slice(c, d)))
            ]
            start, end, prefix = (None if (rows := getattr(x, name)) is None else rows[None, a:b] for name in BOUNDS)
            see = attention_mask(b - a, d - c, case.is_causal, case.window_size, start, end, x.q.device, prefix)
            o, l, dq, dk, dv, dsinks = function(
                *dense, see, scale, case.softcap, x.sinks, x.do[a:b].transpose(0, 1)[None], x.dlse[None, :, a:b]
            )
            lse[:, a:b] = l[0]
            for whole, part, s in ((out, o, slice(a, b)), (grads[0], dq, slice(a, b)),
                                   (grads[1], dk, slice(c, d)), (grads[2], dv, slice(c, d))):  # fmt: skip
                whole[s] = part[0].transpose(0, 1)
            if dsinks is not None:
                grads[3] += dsinks
        return [out, lse, *grads]


def ideals(case: Case, x: Inputs) -> list[list[torch.Tensor]]:
    """The draws of each result's ideal."""

    def of(_: torch.Tensor, by: Arithmetic) -> list[torch.Tensor]:
        return by_sequence(functools.partial(ideal_attention, by=by), case, x)

    return drawn(of, x.q)


@torch.enable_grad()
def eager(q, k, v, see, scale, softcap, sinks, do, dlse):
    """out and the gradients of plain PyTorch, through autograd. It has no lse, nor a gradient of one."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v, sinks) if t is not None]
    out = eager_attention(*inputs[:3], see, scale, softcap, inputs[3] if sinks is not None else None)
    grads = torch.autograd.grad(out, inputs, do)
    return out.detach(), torch.zeros_like(dlse), *grads, *[None] * (sinks is None)


def visibility(q, k, v, see, scale, softcap, sinks, do, dlse):
    """1 where a query sees any key and where a key is seen, in the shapes of out, lse and the gradients."""
    rows = see.any(-1, keepdim=True).to(q.dtype)  # (1 or B, 1, Sq, 1)
    keys = see.any(-2).unsqueeze(-1).to(q.dtype)
    grads = rows.expand_as(q), keys.expand_as(k), keys.expand_as(v), None if sinks is None else torch.ones_like(sinks)
    return rows.expand_as(do), rows.squeeze(-1).expand_as(dlse), *grads


def score_bound(case: Case, x: Inputs) -> float:
    """An upper bound of the scores. lse is computed from them, and may cancel to less."""
    if not x.q.numel() or not x.k.numel():
        return 0.0
    scale = case.D**-0.5 if case.scale is None else abs(case.scale)
    largest = scale * (x.q.detach().double().norm(dim=-1).max() * x.k.detach().double().norm(dim=-1).max()).item()
    largest = largest if case.softcap is None else min(largest, case.softcap)
    return max(largest, x.sinks.detach().abs().max().item()) if case.sinks else largest


def sink_terms(x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> float:
    """The sum of the sizes of a sink's gradient's terms, p (do . out - dlse) of every row, in the largest head."""
    p = torch.exp(x.sinks.detach().double()[:, None] - lse.detach())  # (B, Hq, Sq) or (Hq, Tq)
    products = (x.do.double() * out.detach()).abs().sum(-1)
    products = products.transpose(0, 1) if x.q.ndim == 3 else products
    of_rows = (p * (products + x.dlse.double().abs())).nan_to_num(0.0)
    return (
        of_rows.sum([d for d in range(of_rows.ndim) if d != of_rows.ndim - 2]).max().item() if of_rows.numel() else 0.0
    )


@contextlib.contextmanager
def tiles(tile: Tile | Mapping[str, Tile] | None) -> Iterator[None]:
    """Inside, every pass takes `tile`, or its own of a mapping from passes to tiles."""

    def taken(family: str, pass_: str, *_: Any) -> Tile:
        return tile if isinstance(tile, Tile) else tile[pass_]

    with pytest.MonkeyPatch.context() as patch:
        if tile is not None:
            launch_cache.clear()
            patch.setattr(switch, "may_run", lambda pass_: False)  # the Hopper kernels have tiles of their own
            patch.setattr(tables, "tile", taken)
        yield
    launch_cache.clear()


NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def judge_results(case: Case, x: Inputs, results, truth, ideals: list[list[torch.Tensor]]) -> None:
    """Judge out, lse and the gradients, as many as there are, and check their dtypes and memory orders."""
    terms = {"lse": score_bound(case, x)} | ({"dsinks": sink_terms(x, *truth[:2])} if case.sinks else {})
    for name, K, R, I in zip(NAMES, results, truth, ideals, strict=False):
        judge(name, K, R, I, terms=terms.get(name, 0.0))
    assert (results[0].dtype, results[1].dtype) == (x.q.dtype, torch.float32)
    for name, K, t in zip(NAMES[2:], results[2:], x.tensors, strict=False):
        assert (K.dtype, memory_order(K)) == (t.dtype, memory_order(t)), name


def never_loaded(case: Case, x: Inputs) -> torch.Tensor:
    """Which keys the kernels do not load, in a shape that k and v broadcast with: they may be NaN.

    These are the keys before the least and from the largest bound of a sequence's rows, and before the window of its
    first row, but for the longest prefix.
    """

    def of_sequence(Sq: int, Sk: int, start, end, prefix) -> torch.Tensor:  # (B or 1, Sk)
        j = torch.arange(Sk, device=x.k.device)[None]
        unread = torch.zeros_like(j, dtype=torch.bool)
        if Sq == 0:
            return unread
        if case.window_size[0] >= 0:
            unread = unread | (j < Sk - Sq - case.window_size[0])
        if start is not None:
            unread = unread | (j < start.amin(-1, keepdim=True))
        if end is not None:
            unread = unread | (j >= end.amax(-1, keepdim=True))
        return unread if prefix is None else unread & (j >= prefix.amax(-1, keepdim=True))

    bounds = [getattr(x, name) for name in BOUNDS]
    if not case.packed:
        return of_sequence(case.Sq, case.Sk, *bounds)[:, None, :, None]
    rows = zip(
        *([None] * len(case.packed[0]) if b is None else b[None].split(case.packed[0], 1) for b in bounds), strict=True
    )
    parts = (of_sequence(Sq, Sk, *own)[0] for Sq, Sk, own in zip(*case.packed, rows, strict=True))
    return torch.cat(list(parts))[:, None, None]


def check(
    case: Case, dtype: torch.dtype, device: torch.device, family: str = "randn",
    tile: Tile | Mapping[str, Tile] | None = None, layout: int | None = None, gradients: bool = True,
) -> None:  # fmt: skip
    x = make(case, dtype, device, family)
    if layout is not None:
        x.q, x.k, x.v, x.do = (relaid(t, layout + i) for i, t in enumerate((x.q, x.k, x.v, x.do)))
    safe = Inputs(*(None if t is None else guarded(t) for t in vars(x).values()))
    with torch.no_grad():
        for t in (safe.k, safe.v):
            t.masked_fill_(never_loaded(case, x), torch.nan)
    with guarded_allocations(), tiles(tile), unchanged(*vars(safe).values()):
        results = run(lk, case, safe, gradients)
    assert len(results) == (2 + len(x.tensors) if gradients else 2)
    judge_results(case, x, results, run(lk.reference, case, in_float64(x), gradients), ideals(case, x))
    for name, K, seen in zip(NAMES, results, by_sequence(visibility, case, x), strict=False):
        if name == "lse":
            K = K.exp() * (not case.sinks)  # where no key is seen: -inf, or the sink
        assert not K[~seen.bool()].any(), f"{name}: not 0 for a query that sees no key or a key that no query sees"


def check_never_worse_than_eager(dtype, device):
    case = Case(1, 4, 2, 128, 128, 64, 64)
    x = make(case, dtype, device)
    x.dlse.zero_()
    results, truth, ideal, theirs = (
        run(lk, case, x), run(lk.reference, case, in_float64(x)),
        ideals(case, x), by_sequence(eager, case, x),
    )  # fmt: skip
    for i, name in ((0, "out"), (2, "dq"), (3, "dk"), (4, "dv")):
        judge(name, results[i], truth[i], ideal[i], theirs[i])
