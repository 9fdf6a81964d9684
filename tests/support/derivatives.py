"""Calls of every op to differentiate, and how their results are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import llama_kernels as lk
from llama_kernels.core.language import INTERPRETED
from tests.support.judge import UNIT, relative_error
from tests.support.ops import Call, Make, Shape, calls

# For tests of what PyTorch does around the kernels. The interpreter needs minutes for them and computes nothing else.
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="no kernel decides it; the run of the reference path has it")


def differentiable(op: str, device: torch.device) -> tuple[Call, tuple[torch.Tensor, ...]]:
    """A call of `op` with options, and its tensors that have a gradient."""
    torch.manual_seed(0)
    call = dict(calls(Shape(S=5, D=16, N=16), Make(device), options=True))[op]
    return call, call.tensors


def loss_of(results: Any) -> torch.Tensor:
    """A number whose gradient with respect to each result depends on that result."""
    return sum(y.sin().sum() for y in tree_leaves(results))


def loss_function(call: Call, module: Any) -> Any:
    """The loss of `call` by `module`, lk or lk.reference, as a function of the call's tensors."""
    return lambda *tensors: loss_of(call(module, *tensors))


def assert_same(results: Any, expected: Any) -> None:
    """The same numbers, but for a few float32 roundings: of the whole, and of the largest element."""
    for a, b in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) <= 8 * UNIT[torch.float32]
        assert (a - b).abs().max() <= 64 * UNIT[torch.float32] * b.abs().max()


def forward_mode(call: Any, x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    """Every way to ask for the tangents of the results of `call` at x, where x has the tangent t."""

    def dual():
        with forward_ad.dual_level():
            results = tree_leaves(call(forward_ad.make_dual(x, t)))
            return [zeros_for_none(forward_ad.unpack_dual(y).tangent, y) for y in results]

    def of_vmap():
        return [y[0] for y in tree_leaves(torch.func.jvp(torch.func.vmap(call), (x[None],), (t[None],))[1])]

    def in_vmap():
        tangents = torch.func.vmap(lambda x, t: torch.func.jvp(call, (x,), (t,))[1])(x[None], t[None])
        return [y[0] for y in tree_leaves(tangents)]

    def jacfwd():
        return [torch.tensordot(J, t, t.ndim) for J in tree_leaves(torch.func.jacfwd(call)(x))]

    return {
        "jvp": lambda: torch.func.jvp(call, (x,), (t,))[1],
        "jvp of vmap": of_vmap,
        "vmap of jvp": in_vmap,
        "jacfwd": jacfwd,
        "linearize": lambda: torch.func.linearize(call, x)[1](t),
        "dual number": dual,
    }


def zeros_for_none(tangent: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(y) if tangent is None else tangent


def stacked(results: list[Any]) -> list[torch.Tensor]:
    """The results of several calls, each stacked."""
    return [torch.stack(each) for each in zip(*map(tree_leaves, results), strict=True)]


def layer_inputs(device: torch.device) -> dict[str, torch.Tensor]:
    """What `layer` takes. q, k and v are in the memory order of a projection."""
    sizes = {"x": (2, 12, 96), "residual": (2, 12, 96), "weight": (96,)}
    heads = {"q": 4, "k": 2, "v": 2}
    inputs = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    return inputs | {name: torch.randn(2, 12, H, 32, device=device).transpose(1, 2) for name, H in heads.items()}


def layer(t: dict[str, torch.Tensor], cos, sin, **options: Any) -> torch.Tensor:
    """A number to which every op contributes."""
    y, s = lk.add_rms_norm(t["x"], t["residual"], t["weight"])
    z = lk.rms_norm(y + s, t["weight"], offset=1.0)
    q, k = lk.rope(t["q"], t["k"], cos, sin)
    q, k = lk.qk_norm_rope(q, k, t["weight"][:32], t["weight"][32:64], cos, sin)
    q_, k_, v = lk.rope_qkv(t["x"].repeat(1, 1, 3)[..., : 8 * 32], 4, 2, cos, sin)
    o, lse = lk.attention(q + q_, k + k_, t["v"] + v, return_lse=True, **options)
    o = o + lk.rope_attention(t["q"], t["k"], t["v"], cos, sin)
    return z.square().mean() + o.square().mean() + lse.mean()


def with_grads(function, t: dict[str, torch.Tensor], *args: Any) -> list[torch.Tensor]:
    """The value of `function` of tensors `t`, and its gradients with respect to them."""
    leaves = {name: x.detach().requires_grad_() for name, x in t.items()}
    loss = function(leaves, *args)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]
