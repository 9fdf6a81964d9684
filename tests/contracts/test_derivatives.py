"""Forward mode and second derivatives of RoPE, of the norms and of their fusion, against those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import llama_kernels as lk
from tests.support.derivatives import assert_same, forward_mode, loss_function, loss_of, not_interpreted
from tests.support.judge import UNIT, relative_error
from tests.support.ops import CALLS, Call, Make, Shape, calls
from tests.support.rope import tables

# Attention has neither: tests/contracts/test_missing_derivatives.py.
DERIVED = [op for op in CALLS if "attention" not in op]
ALONE = [op for op in DERIVED if op != "rope, in place"]  # of one tensor of two: in place needs both in a vmap


def small(op: str, device: torch.device) -> tuple[Call, tuple[torch.Tensor, ...]]:
    """A call of `op` with options and few elements, and its tensors that have a gradient."""
    torch.manual_seed(0)
    call = dict(calls(Shape(B=1, Hq=2, Hkv=1, S=2, D=4, N=3), Make(device), options=True))[op]
    return call, call.tensors


def each_tensor(op: str, device: torch.device) -> list[tuple[torch.Tensor, Callable[[Any], Any]]]:
    """Each tensor of a call of `op`, and the call as a function of it: of a module, lk or lk.reference."""
    call, tensors = small(op, device)

    def of(i: int) -> Callable[[Any], Any]:
        return lambda module: lambda x: call(module, *tensors[:i], x, *tensors[i + 1 :])

    return [(x, of(i)) for i, x in enumerate(tensors)]


@pytest.mark.parametrize("op", DERIVED)
def test_the_tangents_of_all_tensors_equal_those_of_the_reference(op, device):
    call, tensors = small(op, device)
    tangents = tuple(map(torch.randn_like, tensors))
    results, ours = torch.func.jvp(lambda *t: call(lk, *t), tensors, tangents)
    expected, theirs = torch.func.jvp(lambda *t: call(lk.reference, *t), tensors, tangents)
    assert_same(results, expected)
    assert_same(ours, theirs)


@not_interpreted
@pytest.mark.corpus(82)
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("op", ALONE)
def test_every_kind_of_forward_mode_equals_that_of_the_reference(op, grad_mode, device):
    for x, function in each_tensor(op, device):
        t = torch.randn_like(x)
        with torch.set_grad_enabled(grad_mode):
            expected = torch.func.jvp(function(lk.reference), (x,), (t,))[1]
            for way, tangents in forward_mode(function(lk), x, t).items():
                assert_same(tangents(), expected), way


def hessian_vector_products(loss: Callable[[Any], Any], x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
    """Every way to ask for the product of the Hessian of `loss` at x with t."""

    def twice_backward():
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad((grad * t).sum(), leaf)[0]

    def dual_numbers(create_graph: bool):
        leaf, forward_ad = x.detach().requires_grad_(), torch.autograd.forward_ad
        with forward_ad.dual_level():
            (grad,) = torch.autograd.grad(loss(forward_ad.make_dual(leaf, t)), leaf, create_graph=create_graph)
            return forward_ad.unpack_dual(grad).tangent

    def of(hessian: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(hessian, t, t.ndim)

    return {
        "double backward": twice_backward,
        "dual numbers in the backward": lambda: dual_numbers(create_graph=True),
        "dual numbers in a backward without gradients": lambda: dual_numbers(create_graph=False),
        "grad of grad": lambda: torch.func.grad(lambda x: (torch.func.grad(loss)(x) * t).sum())(x),
        "jvp of grad": lambda: torch.func.jvp(torch.func.grad(loss), (x,), (t,))[1],
        "grad of jvp": lambda: torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (t,))[1])(x),
        "hessian": lambda: of(torch.func.hessian(loss)(x)),
        "jacrev of jacrev": lambda: of(torch.func.jacrev(torch.func.jacrev(loss))(x)),
        "jacrev of jacfwd": lambda: of(torch.func.jacrev(torch.func.jacfwd(loss))(x)),
        "vmap of grad of grad": lambda: torch.func.vmap(
            torch.func.grad(lambda x: (torch.func.grad(loss)(x) * t).sum())
        )(x[None])[0],
    }


@not_interpreted
@pytest.mark.corpus(56)
@pytest.mark.parametrize("op", ALONE)
def test_second_derivatives_equal_those_of_the_reference(op, device):
    for x, function in each_tensor(op, device):
        t = torch.randn_like(x)
        ours, theirs = (lambda x, f=function(module): loss_of(f(x)) for module in (lk, lk.reference))
        expected = hessian_vector_products(theirs, x, t)["double backward"]()
        for way, product in hessian_vector_products(ours, x, t).items():
            assert_same(product(), expected), way


@pytest.mark.corpus(56)
@pytest.mark.parametrize("op", DERIVED)
def test_double_and_triple_backward_equal_those_of_the_reference(op, device):
    """With respect to all tensors at once, and to the upstream gradients. As exact as the reference in float32: norms
    of four elements may be small, and their derivatives then lose digits."""
    call, tensors = small(op, device)
    weights = [[torch.randn_like(x) for x in tensors] for _ in range(2)]

    def derivatives(module: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        outs = tree_leaves(call(module, *leaves))
        torch.manual_seed(1)
        dys = [torch.randn(y.shape, device=device).to(dtype).requires_grad_() for y in outs]
        first = torch.autograd.grad(outs, leaves, dys, create_graph=True)
        loss = sum((g.sin() * w).sum() for g, w in zip(first, weights[0], strict=True))
        wanted = [*leaves, *dys]
        second = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        loss = sum((g.sin() * w).sum() for g, w in zip(second, weights[1], strict=False))
        third = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return [*first, *second, *third]

    truth = derivatives(lk.reference, torch.float64)
    for ours, plain, exact in zip(derivatives(lk), derivatives(lk.reference), truth, strict=True):
        assert ours.shape == exact.shape
        assert relative_error(ours, exact) <= 4 * relative_error(plain, exact) + 8 * UNIT[torch.float32]


@pytest.mark.corpus(56)
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "qk_norm_rope"])
def test_double_backward_where_the_upstream_gradient_is_constant(op, device):
    """There once_differentiable raises nothing, and the second derivative is missing. One tensor requires grad."""
    call, tensors = small(op, device)

    def second(module: Any) -> torch.Tensor:
        leaf = tensors[0].detach().requires_grad_()
        (grad,) = torch.autograd.grad(tree_leaves(call(module, leaf, *tensors[1:]))[0].sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    assert_same(second(lk), second(lk.reference))


def test_a_gradient_penalty(device):
    """The norm of a gradient in the loss, as WGAN-GP and gradient regularisation have it, through a small layer."""
    x, w = torch.randn(2, 5, 16, device=device), torch.rand(16, device=device)
    (cos, sin), head = tables(5, 8, device), torch.randn(8, device=device)

    def penalty(module: Any) -> tuple[torch.Tensor, ...]:
        leaf, weight = x.detach().requires_grad_(), w.detach().requires_grad_()
        heads = module.rms_norm(leaf, weight).unflatten(-1, (2, 8)).transpose(1, 2)
        q, _ = module.rope(heads, None, cos, sin)
        q, _ = module.qk_norm_rope(q, None, head, None, cos, sin)
        (grad,) = torch.autograd.grad(q.sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.norm(), (leaf, weight))

    assert_same(penalty(lk), penalty(lk.reference))


def test_gradients_of_a_plain_training_step_have_no_graph(device):
    call, tensors = small("rms_norm", device)
    leaves = [x.detach().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(loss_function(call, lk)(*leaves), leaves)
    assert all(g.grad_fn is None for g in grads)
