"""Derivatives that ops do not have: forward mode and double backward of attention, and any derivative of the tables of
RoPE or of `rope_into_cache`. They raise; they are never 0 or None."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import llama_kernels as lk
from tests.support.derivatives import assert_same, differentiable, forward_mode, loss_function, not_interpreted
from tests.support.ops import CALLS
from tests.support.rope import tables

# Ops whose backward is that of attention.
REFUSING = [op for op in CALLS if "attention" in op]


@not_interpreted
@pytest.mark.corpus(82)
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("op", REFUSING)
def test_forward_mode_is_refused(op, grad_mode, device):
    """Whichever tensor has the tangent, whether or not the others require grad."""
    call, tensors = differentiable(op, device)
    for i, x in enumerate(tensors):
        others = [t.detach().requires_grad_(i % 2 == 0) for t in tensors]

        def of_one(x, i=i, others=others):
            return call(lk, *others[:i], x, *others[i + 1 :])

        for way, differentiate in forward_mode(of_one, x, x).items():
            with torch.set_grad_enabled(grad_mode), pytest.raises(RuntimeError) as error:
                differentiate()
            assert str(error.value).startswith(f"llama_kernels.{call.op}: forward-mode"), (way, i, str(error.value))
            assert f"llama_kernels.reference.{call.op}" in str(error.value)


@pytest.mark.parametrize("op", CALLS)
def test_ops_run_beside_dual_numbers_where_no_tensor_has_a_tangent(op, device):
    call, tensors = differentiable(op, device)
    leaves = [t.detach().requires_grad_() for t in tensors]
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(1), torch.ones(1))
        loss = loss_function(call, lk)(*leaves)
    assert_same(torch.autograd.grad(loss, leaves), torch.autograd.grad(loss_function(call, lk)(*leaves), leaves))


def test_rope_into_cache_has_no_derivative(device):
    q, caches = torch.randn(1, 2, 3, 16, device=device), torch.zeros(2, 1, 2, 8, 16, device=device)
    slots, angles = torch.arange(3, device=device), tables(8, 16, device)
    for i in range(3):
        tensors = [q, q, q]

        def write(x, i=i, tensors=tensors):
            return lk.rope_into_cache(*tensors[:i], x, *tensors[i + 1 :], *caches, slots, *angles)

        for way, differentiate in forward_mode(write, q, q).items():
            if way == "linearize":
                continue  # it also calls the function without a tangent
            with pytest.raises((RuntimeError, ValueError), match=r"llama_kernels.rope_into_cache: "):
                differentiate()
        with pytest.raises(ValueError, match=r"inside of a torch.func transform"):
            torch.func.grad(lambda x, write=write: write(x).sum())(q)
    assert not caches.any()


@pytest.mark.parametrize("op", ["rope", "rope_qkv", "qk_norm_rope"])
def test_forward_mode_of_the_tables_is_refused(op, device):
    """A table with a tangent; an angle is a constant."""
    call, _ = differentiable(op, device)
    for name in ("cos", "sin"):
        table = call.arguments[name]

        def of_table(x, name=name):
            return dataclasses.replace(call, arguments={**call.arguments, name: x})(lk, *call.tensors)

        for way, differentiate in forward_mode(of_table, table, table).items():
            with pytest.raises(RuntimeError, match=rf"llama_kernels.{op}: forward-mode differentiation of cos and sin"):
                differentiate()
                raise AssertionError(way)


@not_interpreted
@pytest.mark.corpus(56)
@pytest.mark.parametrize("op", REFUSING)
def test_double_backward_is_refused(op, device):
    call, tensors = differentiable(op, device)
    refused = rf"llama_kernels.{call.op}: double backward"
    for i in range(len(tensors)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        (grad,) = torch.autograd.grad(loss_function(call, lk)(*leaves), leaves[i], create_graph=True)
        for leaf in leaves:
            with pytest.raises(RuntimeError, match=refused):
                torch.autograd.grad(grad.sum(), leaf, retain_graph=True)

        def of_one(x, i=i):
            return loss_function(call, lk)(*tensors[:i], x, *tensors[i + 1 :])

        with pytest.raises(RuntimeError, match=refused):
            torch.func.grad(lambda x, of_one=of_one: torch.func.grad(of_one)(x).sum())(tensors[i])
        with pytest.raises(RuntimeError, match=rf"llama_kernels.{call.op}: forward-mode"):
            torch.func.hessian(of_one)(tensors[i])


@pytest.mark.corpus(56)
@pytest.mark.parametrize("op", REFUSING)
def test_double_backward_is_refused_where_the_upstream_gradient_is_constant(op, device):
    """There once_differentiable raises nothing, and the second derivative is missing. One tensor requires grad."""
    call, tensors = differentiable(op, device)
    leaves = [tensors[0].detach().requires_grad_(), *tensors[1:]]
    (grad,) = torch.autograd.grad(tree_leaves(call(lk, *leaves))[0].sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"llama_kernels.{op}: double backward"):
        torch.autograd.grad(grad.sum(), leaves[0])
