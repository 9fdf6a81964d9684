"""Plain PyTorch as a model's code writes it: op by op, and through torch.compile."""

from __future__ import annotations

import torch

from bench.providers.provider import Provider, Unsupported
from bench.works.attention import PLAIN_LIMIT, Attention, AttentionVarlen, plain_attention
from bench.works.norms import plain_norm
from bench.works.presets import MEMORY_BOUND
from bench.works.rotations import MRope, QKNormRope, Rope, RopeIntoCache, RopeQKV, plain_rope
from bench.works.tangents import Tangents, tangents_by
from bench.works.work import Function, Work


def then_copied(work: RopeIntoCache, device: str, rotate: Function) -> Function:
    """Rotate q and k by `rotate`, which also gets the cache position, then copy k and v into caches of this work."""
    slot, caches = torch.tensor([work.position], device=device), work.caches(device)
    cached = [x[:, :, work.position, None] for x in caches]

    def f(q, k, v):
        with torch.no_grad():
            q, k = rotate(q, k, slot)
            for cache, x in zip(caches, (k, v), strict=True):
                cache.index_copy_(2, slot, x)
        return q, *cached

    return f


class Eager(Provider):
    """Plain PyTorch, op by op."""

    name = "eager"
    cpu = True

    def any_op(self, work: Work, device: str) -> Function:
        return tangents_by(self.function(work.of, device)) if isinstance(work, Tangents) else work.plain

    def rope(self, work: Rope, device: str) -> Function:
        cos, sin = work.wide_tables(device, work.dtype)
        return lambda q, k: plain_rope(q, k, cos, sin)

    def mrope(self, work: MRope, device: str) -> Function:
        """With a table that is merged before, as Transformers 5 does once a forward for all layers."""
        cos, sin = work.merged_tables(device, work.dtype)
        return lambda q, k: plain_rope(q, k, cos, sin)

    def qk_norm_rope(self, work: QKNormRope, device: str) -> Function:
        rotate = self.rope(work, device)
        return lambda q, k, q_weight, k_weight: rotate(plain_norm(q, q_weight), plain_norm(k, k_weight))

    def rope_qkv(self, work: RopeQKV, device: str) -> Function:
        rotate = self.rope(work, device)

        def f(qkv):
            q, k, v = work.split(qkv)
            return *rotate(q, k), v

        return f

    def rope_into_cache(self, work: RopeIntoCache, device: str) -> Function:
        cos, sin = (x[:, work.position, None] for x in work.wide_tables(device, work.dtype))
        return then_copied(work, device, lambda q, k, slot: plain_rope(q, k, cos, sin))

    def attention(self, work: Attention, device: str) -> Function:
        scores = work.B * work.Hq * work.S**2
        if scores > PLAIN_LIMIT:
            raise Unsupported(f"would write {scores * work.dtype.itemsize / 2**30:.0f} GiB of scores")
        return work.plain

    rope_attention = attention

    def attention_varlen(self, work: AttentionVarlen, device: str) -> Function:
        if work.Hq * max(work.lengths) ** 2 > PLAIN_LIMIT:
            raise Unsupported("would write the scores of whole documents")
        return lambda *qkv: torch.cat(
            [plain_attention(*parts) for parts in zip(*(x.split(work.lengths, 2) for x in qkv), strict=True)], 2
        )


class Compiled(Provider):
    """torch.compile of `eager`. It has no attention, since `flex_attention` is what torch.compile makes of that."""

    name = "torch.compile"

    def has(self, op: str) -> bool:
        return op in MEMORY_BOUND

    def any_op(self, work: Work, device: str) -> Function:
        return torch.compile(Eager().function(work, device), fullgraph=True, dynamic=False)
