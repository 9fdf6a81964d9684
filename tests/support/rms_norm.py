"""The check of an RMSNorm call, with and without the residual: outputs and every gradient against float64."""

from __future__ import annotations

from typing import Any

import torch

import llama_kernels as lk
from tests.support.guards import guarded, guarded_allocations, memory_order, unchanged
from tests.support.ideal import drawn, eager_rms_norm, ideal_rms_norm, ideal_tangent
from tests.support.judge import judge


def check(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, weight=True, weight_dtype=None, residual=False,
    residual_dtype=None, eps=1e-6, offset=0.0, size=1.0, layout=lambda x: x, eager=False, order=memory_order,
) -> None:  # fmt: skip
    N = shape[-1]
    x, r, dy, ds = (size * torch.randn(shape, device=device) for _ in range(4))
    x, dy = layout(x.to(dtype)), layout(dy.to(dtype))
    r, ds = ((layout(t.to(residual_dtype or dtype)) if residual else None) for t in (r, ds))
    # offset + weight is around 1, but not 1: a kernel without them is wrong.
    w = (1 - offset + 0.5 * torch.randn(N, device=device)).to(weight_dtype or dtype) if weight else None
    given = [guarded(t).requires_grad_() if t is not None else None for t in (x, r, w)]
    upstream = [guarded(t) for t in (dy, ds) if t is not None]
    with guarded_allocations(), unchanged(*given, *upstream):
        results = run(lk, *given, eps, offset, upstream)
    wide = [None if t is None else t.double().requires_grad_() for t in (x, r, w)]
    truth = run(lk.reference, *wide, eps, offset, [t.double() for t in upstream])
    ideal = drawn(ideal_rms_norm, x, r, w, eps, offset, dy, ds)
    theirs = [None] * len(ideal)
    if eager:
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        y = eager_rms_norm(*leaves, eps, offset)
        theirs = [y, *torch.autograd.grad(y, leaves, dy)]
    outputs = {"y": x} | ({"residual_out": r} if residual else {})
    gradients = {name: t for name, t in (("dx", x), ("dresidual", r), ("dweight", w)) if t is not None}
    for name, K, R, I, E in zip((*outputs, *gradients), results, truth, ideal, theirs, strict=True):
        judge(name, K, R, I, E)
    for K, t in zip(results[len(outputs) :], gradients.values(), strict=True):
        assert (K.dtype, order(K)) == (t.dtype, order(t))
    assert (results[0].dtype, order(results[0])) == (x.dtype, order(x))


def run(ops: Any, x, r, w, eps, offset, upstream) -> list[torch.Tensor]:
    """Outputs, then the gradients of the inputs that are there."""
    if r is None:
        outs = [ops.rms_norm(x, w, eps, offset=offset)]
    else:
        outs = list(ops.add_rms_norm(x, r, w, eps, offset=offset))
    return outs + list(torch.autograd.grad(outs, [t for t in (x, r, w) if t is not None], upstream))


def check_tangent(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, weight=True, residual_dtype=None,
    eps=1e-6, offset=0.0, size=1.0, layout=lambda x: x,
) -> None:  # fmt: skip
    """The tangent of y, and of residual_out where there is a residual, against float64."""
    N = shape[-1]
    x, r, dx, dr = (layout((size * torch.randn(shape, device=device)).to(dtype)) for _ in range(4))
    w, dw = ((torch.randn(N, device=device) - offset).to(dtype) if weight else None for _ in range(2))
    norms = (x, w), (dx, dw)
    if residual_dtype is not None:
        norms = (x, r.to(residual_dtype), w), (dx, dr.to(residual_dtype), dw)
    primals, tangents = ([t for t in each if t is not None] for each in norms)

    def run(ops: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if residual_dtype is None:
            return (ops.rms_norm(*tensors, eps=eps, offset=offset),)
        return ops.add_rms_norm(*tensors, eps=eps, offset=offset)

    given = [[guarded(t) for t in each] for each in (primals, tangents)]
    with guarded_allocations(), unchanged(*given[0], *given[1]):
        _, results = torch.func.jvp(lambda *t: run(lk, *t), *map(tuple, given))
    wide = (tuple(t.double() for t in each) for each in (primals, tangents))
    _, truth = torch.func.jvp(lambda *t: run(lk.reference, *t), *wide)
    s, t = x, dx
    if residual_dtype is not None:
        s, t = ((a.float() + b.float()).to(residual_dtype) for a, b in ((x, norms[0][1]), (dx, norms[1][1])))
        judge("residual_out", results[1], truth[1], t)
    (ideal,) = drawn(ideal_tangent, s, w, t, dw, eps, offset, dtype)
    judge("y", results[0], truth[0], ideal)
    assert results[0].dtype == dtype


def add_is_two_ops(device: torch.device) -> None:
    x, r = (torch.randn(70, 96, device=device).bfloat16() for _ in range(2))
    w = torch.randn(96, device=device).bfloat16()
    y, s = lk.add_rms_norm(x, r, w)
    assert torch.equal(s, x + r)
    assert torch.equal(y, lk.rms_norm(s, w))
