"""Cases of decoding with single keys masked, and the check of a call."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from llama_kernels.ops.attention.masked_decode import decode_attention
from tests.support.guards import guarded, guarded_allocations, memory_order, unchanged
from tests.support.ideal import attention_mask, drawn, ideal_attention
from tests.support.judge import judge


@dataclasses.dataclass(frozen=True)
class Case:
    B: int
    Hq: int
    Hkv: int
    Sq: int
    Sk: int
    D: int
    DV: int
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    bounds: bool = False

    def __str__(self) -> str:
        options = [name for name in ("scale", "softcap", "sinks", "bounds") if getattr(self, name)]
        return "-".join([f"{self.B}x{self.Hq}/{self.Hkv}x{self.Sq}x{self.Sk}x{self.D}/{self.DV}", *options])


# One key, about one chunk of 256 keys, and several; from one row to the largest number.
CASES = (
    Case(2, 4, 2, 1, 1, 32, 32),
    Case(3, 2, 2, 1, 17, 64, 64, sinks=True),
    Case(2, 8, 1, 4, 255, 32, 32, softcap=3.0),
    Case(2, 8, 2, 2, 256, 64, 32, bounds=True),
    Case(3, 6, 2, 3, 300, 24, 40, sinks=True, bounds=True),
    Case(2, 4, 1, 1, 1000, 64, 64, softcap=5.0, sinks=True),
    Case(2, 2, 1, 4, 600, 32, 16, scale=-0.3, bounds=True),
)


@dataclasses.dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor
    options: dict[str, Any]


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Keys and values are views of longer caches, which are NaN past their end. The mask is a view of one that is True
    there. It hides keys at random, the second chunk of the first sequence, and all of the last sequence."""
    q = torch.randn(case.B, case.Sq, case.Hq, case.D, device=device).to(dtype).transpose(1, 2)
    caches = (torch.full((case.B, case.Hkv, case.Sk + 70, D), math.nan, device=device) for D in (case.D, case.DV))
    k, v = (cache.to(dtype)[:, :, : case.Sk] for cache in caches)
    k.copy_(torch.randn(k.shape, device=device))
    v.copy_(torch.randn(v.shape, device=device))
    key_mask = torch.ones(case.B, case.Sk + 70, dtype=torch.bool, device=device)[:, : case.Sk]
    key_mask.copy_(torch.rand(key_mask.shape, device=device) < 0.6)
    key_mask[0, 256:512] = False
    key_mask[0, 0] = True
    key_mask[-1] = False
    options: dict[str, Any] = {"scale": case.scale, "softcap": case.softcap}
    if case.sinks:
        options["sinks"] = torch.randn(case.Hq, device=device)
    if case.bounds:
        rows = torch.randint(0, case.Sk, (2, case.B, case.Sq), dtype=torch.int32, device=device)
        options["kv_start"], options["kv_end"] = rows[0] // 2, rows[1] + 1  # some rows see nothing
    return Inputs(q, k, v, key_mask, options)


def seen(x: Inputs) -> torch.Tensor:
    """Which query sees which key, (B, 1, Sq, Sk)."""
    bounds = (x.options.get("kv_start"), x.options.get("kv_end"))
    see = attention_mask(x.q.shape[2], x.k.shape[2], False, (-1, -1), *bounds, x.q.device)
    return see & x.key_mask[:, None, None]


def in_float64(x: Inputs) -> torch.Tensor:
    """The whole score matrix, masked, with a column for the sinks."""
    G = x.q.shape[1] // x.k.shape[1]
    q, k, v = x.q.double(), x.k.double().repeat_interleave(G, 1), x.v.double().repeat_interleave(G, 1)
    s = q @ k.mT * (q.shape[-1] ** -0.5 if x.options["scale"] is None else x.options["scale"])
    if softcap := x.options["softcap"]:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~seen(x), -math.inf)
    sinks = x.options.get("sinks")
    sinks = s.new_full((s.shape[1],), -math.inf) if sinks is None else sinks.double()
    s = torch.cat((s, sinks[:, None, None].expand(*s.shape[:-1], 1)), -1)
    return torch.softmax(s, -1).nan_to_num(0.0)[..., :-1] @ v


def check(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    x = make(case, dtype, device)
    q = guarded(x.q)
    given = (x.key_mask, *(value for value in x.options.values() if isinstance(value, torch.Tensor)))
    with guarded_allocations(), unchanged(q, *given):
        out = decode_attention(q, x.k, x.v, x.key_mask, **x.options)
    scale = case.D**-0.5 if case.scale is None else case.scale
    do, dlse = torch.zeros_like(out), torch.zeros(out.shape[:3], device=device)
    sinks = x.options.get("sinks")
    ideal, *_ = drawn(ideal_attention, x.q, x.k, x.v, seen(x), scale, case.softcap, sinks, do, dlse)
    judge("out", out, in_float64(x), ideal)
    assert not out[~seen(x).any(-1).expand(out.shape[:3])].any() and not out[-1].any()
    like = torch.empty(case.B, case.Sq, case.Hq, case.DV).transpose(1, 2)
    assert out.dtype == dtype and memory_order(out) == memory_order(like)
