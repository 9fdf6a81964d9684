"""Bounds from below on times: bytes and FLOPs of a provider's ops, counted, over the best rates of a GPU.

Each op that PyTorch dispatches is taken as one kernel that reads its inputs once, writes its outputs once and is bound
by the slower of memory and tensor cores. No launch costs, no gaps, nothing kept in the L2 from one op to the next. So
the milliseconds are a bound from below. The ratio of two bounds shows what fusing saves. Tensors are on the meta
device: nothing is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.gpus import COPY_SHARE, GPUS, MATMUL_SHARE
from bench.measuring import machine, records, timing
from bench.measuring.records import Record
from bench.measuring.step import Step, put_rate
from bench.providers.provider import OURS, Provider, Unsupported
from bench.providers.pytorch import Sdpa
from bench.works.attention import pairs
from bench.works.work import Function, Work

ASSUMPTIONS = (
    f"a copy reaches {COPY_SHARE:.0%} of the datasheet's bandwidth, a large product {MATMUL_SHARE:.0%} of its rate",
    "each op reads its inputs once, writes its outputs once, and is bound by the slower of memory and tensor cores",
    "no launch costs, no gaps, nothing stays in the L2 between ops: a bound from below, not a forecast",
    "our attention's backward computes the scores twice, 7 products for 5; FlashAttention's once",
    "rows too long for one pass (over 32,768 forward, 16,384 backward) are counted once; ours reads them again",
)


# --- counting --------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    name: str
    bytes: int
    flops: int


# Of a causal call without a window: what models make. `_with_mask` puts in a work's own number.
def _attention_flops(q: torch.Tensor, k: torch.Tensor, products: int) -> int:
    B, Hq, Sq, D = q.shape if q.ndim == 4 else (1, q.shape[1], q.shape[0], q.shape[2])
    Sk = k.shape[-2] if k.ndim == 4 else k.shape[0]
    return 2 * products * B * Hq * D * (pairs(Sq) if Sq == Sk else Sq * Sk)


_FLOPS: dict[str, Callable[..., int]] = {
    "llama_kernels.attention_forward": lambda q, k, *_: _attention_flops(q, k, 2),
    "llama_kernels.attention_backward": lambda do, dlse, q, k, *_: _attention_flops(q, k, 7),
    "llama_kernels.rope_attention_backward": lambda do, dlse, q, k, *_: _attention_flops(q, k, 7),
    "aten._scaled_dot_product_flash_attention": lambda q, k, *_: _attention_flops(q, k, 2),
    "aten._scaled_dot_product_flash_attention_backward": lambda do, q, k, *_: _attention_flops(q, k, 5),
}


# What writes into a tensor touches what it writes, not all of it.
_BYTES: dict[str, Callable[..., int]] = {
    "llama_kernels.rope_into_cache": lambda q, k, v, *_: 2 * sum(map(_size, (q, k, v))),
    "aten.index_copy_": lambda into, dim, index, source: 2 * _size(source),
}


class Tally(TorchDispatchMode):
    """The ops that run inside, without those that only look at tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__str__()
        if func.is_view or name in _FREE:
            return out
        read, written = _tensors((args, kwargs)), _tensors(out)
        if name in _FILLS:
            read = []
        flops = _FLOPS[name](*args) if name in _FLOPS else self._flops(func.overloadpacket, args, kwargs, out)
        touched = _BYTES[name](*args) if name in _BYTES else sum(map(_size, read)) + sum(map(_size, written))
        self.ops.append(Op(name, touched, flops))
        return out

    @staticmethod
    def _flops(packet, args, kwargs, out) -> int:
        return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0

    def milliseconds(self, ceilings: dict[str, float], dtype: str) -> float:
        return sum(max(op.bytes / ceilings["copy"] / 1e6, op.flops / ceilings[dtype] / 1e9) for op in self.ops)


_FREE = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided",
         "aten.detach", "aten._unsafe_view", "aten.lift_fresh", "aten.is_same_size",
         "aten._has_same_storage_numel"}  # fmt: skip
_FILLS = {"aten.zero_", "aten.fill_", "aten.zeros_like", "aten.ones_like", "aten.new_zeros"}


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Each once."""
    return list({id(x): x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}.values())


def _size(x: torch.Tensor) -> int:
    """Bytes that a kernel has to touch: what is broadcast by a stride of 0 is there once."""
    distinct = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct * x.element_size()


def count(run: Callable[[], object]) -> Tally:
    with Tally() as tally:
        run()
    return tally


# --- estimates -------------------------------------------------------------------------------------------------------


class _FlashSdpa(Sdpa):
    """SDPA's flash backend, named outright: on the meta device nothing would choose it."""

    def _attend(self, is_causal: bool) -> Function:
        return lambda q, k, v: flash_attention(q, k, v, is_causal=is_causal)


def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention, for counting."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def counting_flash() -> Iterator[None]:
    """Models that call SDPA are counted as calling its flash backend."""
    with mock.patch.object(F, "scaled_dot_product_attention", flash_attention):
        yield


FLASH = _FlashSdpa("sdpa-flash", None)


def estimates(works: Iterable[Work], providers: Iterable[Provider], about: dict[str, Any]) -> list[Record]:
    """A record for each work, direction, provider and GPU: the bound is `ms`."""
    providers, out = list(providers), []
    for work in works:
        call = work.draw("meta")
        for provider in providers:
            if not provider.has(work.op):
                continue
            try:
                f = provider.function(work, "meta")
            except Unsupported as e:
                tallies, saved, reason = {}, None, str(e)
            else:
                tallies, saved, reason = _tallies(work, f, call), None, None
                if "backward" in work.directions:
                    saved = timing.saved_for_backward(Step(f, call, True).forward)
            for gpu, model in GPUS.items():
                for direction in work.directions:
                    r = Record(op=work.op, direction=direction, shape=work.shape, sizes=work.sizes,
                               dtype=str(work.dtype)[6:], provider=provider.name, estimate=True, saved=saved,
                               reason=reason, **machine.repeated({**about, "gpu": gpu, "driver": "none"}))  # fmt: skip
                    if reason is None:
                        r.ms, r.method = tallies[direction].milliseconds(model.ceilings, r.dtype), "model"
                        put_rate(r, work, model.ceilings)
                    out.append(r)
    return records.with_ratios(out)


def _tallies(work: Work, f: Function, call: Any) -> dict[str, Tally]:
    backward = "backward" in work.directions
    step = Step(f, call, backward)
    tallies = {"forward": count(step.forward_once)}
    if backward:
        tallies["backward"] = count(step.backward)
        tallies["both"] = Tally()
        tallies["both"].ops = tallies["forward"].ops + tallies["backward"].ops
    if work.op.startswith(("attention", "rope_attention", "decode")):
        for direction, tally in tallies.items():
            tally.ops = [_with_mask(op, work, direction) for op in tally.ops]
    return tallies


def _with_mask(op: Op, work: Work, direction: str) -> Op:
    """A fused attention op does the work's own pairs: fewer than the shape says, with a window or documents."""
    if op.name not in _FLOPS:
        return op
    backward = "backward" in op.name
    flops = work.flops("backward" if backward else "forward")
    return op._replace(flops=flops * 7 // 5 if backward and op.name.startswith(OURS) else flops)
