"""Weights of qk_norm_rope, and the check of a call against float64."""

from __future__ import annotations

import torch

import llama_kernels as lk
from tests.support.guards import guarded, guarded_allocations, memory_order, unchanged
from tests.support.ideal import drawn, eager_rms_norm, eager_rope, ideal_norm_rope
from tests.support.judge import judge
from tests.support.rope import rows


def weights(D: int, dtype: torch.dtype, device: torch.device, offset: float = 0.0) -> list[torch.Tensor]:
    """Around 1 - offset, so that offset + weight is around 1, but not 1: a kernel without them is wrong."""
    return [(1 - offset + 0.5 * torch.randn(D, device=device)).to(dtype) for _ in range(2)]


def check(
    q, k, q_weight, k_weight, cos, sin, position_ids=None, *, eps=1e-6, offset=0.0, interleaved=False, eager=False,
    order=memory_order,
) -> None:  # fmt: skip
    given = [None if x is None else guarded(x).requires_grad_() for x in (q, k, q_weight, k_weight)]
    angles = [guarded(cos), guarded(sin), None if position_ids is None else guarded(position_ids)]
    options = {"eps": eps, "offset": offset, "interleaved": interleaved}
    upstream = [None if x is None else torch.randn_like(x) for x in (q, k)]
    dys = [guarded(dy) for dy in upstream if dy is not None]
    leaves = [x for x in given if x is not None]
    with guarded_allocations(), unchanged(*given, *angles, *dys):
        outs = lk.qk_norm_rope(*given, *angles, **options)
        kept = [x for x in outs if x is not None]
        grads = iter(torch.autograd.grad(kept, leaves, dys))
    grads = [None if x is None else next(grads) for x in given]
    wide = [None if x is None else x.double().requires_grad_() for x in (q, k, q_weight, k_weight)]
    truth = lk.reference.qk_norm_rope(*wide, cos.double(), sin.double(), position_ids, **options)
    wide_leaves, doubles = [x for x in wide if x is not None], [dy.double() for dy in upstream if dy is not None]
    wide_grads = iter(torch.autograd.grad([x for x in truth if x is not None], wide_leaves, doubles))
    wide_grads = [None if x is None else next(wide_grads) for x in wide]
    for i, (name, x, w) in enumerate((("q", q, q_weight), ("k", k, k_weight))):
        if x is None:
            assert outs[i] is None
            continue
        c, s = rows(x, cos, position_ids), rows(x, sin, position_ids)
        y, dx, *dw = drawn(ideal_norm_rope, x, w, c, s, interleaved, eps, offset, upstream[i])
        theirs = eager_rope(eager_rms_norm(x, w, eps, offset), c, s, interleaved) if eager else None
        judge(name, outs[i], truth[i], y, theirs)
        judge(f"d{name}", grads[i], wide_grads[i], dx)
        for K in (outs[i], grads[i]):
            assert (K.dtype, order(K)) == (x.dtype, order(x))
        if w is not None:
            judge(f"d{name}_weight", grads[2 + i], wide_grads[2 + i], *dw)
            assert grads[2 + i].dtype == w.dtype
