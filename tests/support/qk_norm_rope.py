"""Weights of qk_norm_rope, and the check of a call against float64."""

from __future__ import annotations

import torch

import llama_kernels as lk
from tests.support.guards import guarded, guarded_allocations, memory_order, unchanged
from tests.support.ideal import drawn, eager_rms_norm, eager_rope, ideal_norm_rope, ideal_tangent
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


def check_tangents(q, k, q_weight, k_weight, cos, sin, position_ids=None, **options) -> None:
    """The tangents of the results, where every tensor but the tables has a tangent, against float64."""
    inputs = [x for x in (q, k, q_weight, k_weight) if x is not None]
    tangents = [torch.randn_like(x) for x in inputs]

    def run(ops, cos, sin):
        def call(*tensors):
            each = iter(tensors)
            given = (None if x is None else next(each) for x in (q, k, q_weight, k_weight))
            outs = ops.qk_norm_rope(*given, cos, sin, position_ids, **options)
            return tuple(x for x in outs if x is not None)

        return call

    given = [tuple(map(guarded, each)) for each in (inputs, tangents)]
    with guarded_allocations(), unchanged(*given[0], *given[1], cos, sin):
        _, results = torch.func.jvp(run(lk, cos, sin), *given)
    wide = (tuple(x.double() for x in each) for each in (inputs, tangents))
    _, truth = torch.func.jvp(run(lk.reference, cos.double(), sin.double()), *wide)
    each = iter(tangents)
    of = [None if x is None else next(each) for x in (q, k, q_weight, k_weight)]
    for x, w, t, dw, K, R in zip((q, k), (q_weight, k_weight), of[:2], of[2:], results, truth, strict=False):
        eps, offset, interleaved = (
            options.get(*pair) for pair in (("eps", 1e-6), ("offset", 0.0), ("interleaved", False))
        )
        (normed,) = drawn(ideal_tangent, x, w, t, dw, eps, offset, torch.float32)
        c, s = rows(x, cos, position_ids).float(), rows(x, sin, position_ids).float()
        judge("tangent", K, R, [eager_rope(draw, c, s, interleaved).to(x.dtype) for draw in normed])
        assert (K.dtype, memory_order(K)) == (x.dtype, memory_order(x))
