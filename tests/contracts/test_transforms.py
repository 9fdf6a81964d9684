"""torch.func: grad, vmap and Jacobians of every op."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import llama_kernels as lk
from tests.support.derivatives import assert_same, differentiable, loss_function, not_interpreted, stacked
from tests.support.ops import CALLS
from tests.support.rope import tables


@pytest.mark.parametrize("op", CALLS)
def test_torch_func_gradients_equal_those_of_the_reference(op, device):
    call, tensors = differentiable(op, device)
    everything = tuple(range(len(tensors)))
    expected, loss = torch.func.grad(loss_function(call, lk.reference), everything)(*tensors), loss_function(call, lk)
    assert_same(torch.func.grad(loss, everything)(*tensors), expected)
    assert_same(torch.func.grad_and_value(loss, everything)(*tensors)[0], expected)
    assert_same(torch.func.vjp(loss, *tensors)[1](torch.ones((), device=device)), expected)


# An interpreted vmap of these two takes seconds.
SLOW = ("attention_varlen", "rope_attention")
VMAPPED = [pytest.param(op, marks=not_interpreted) if op in SLOW else op for op in CALLS]


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=not_interpreted)], ids=["outermost", "innermost"])
@pytest.mark.parametrize("op", VMAPPED)
def test_vmap_equals_a_loop(op, last, device):
    """vmap of the op, gradients for each example, and gradients through a vmap. Where the batch is the innermost
    dimension, the last dimension of an example is not contiguous."""
    call, tensors = differentiable(op, device)
    if last and op == "rope, in place":
        pytest.skip("in place takes no copy of what is not contiguous")
    everything, dim = tuple(range(len(tensors))), -1 if last else 0
    examples = [[t * scale for t in tensors] for scale in (1.0, -0.5, 1.5)]
    batch = [torch.stack(each, dim) for each in zip(*examples, strict=True)]
    outputs = stacked([call(lk.reference, *example) for example in examples])
    gradient = torch.func.grad(loss_function(call, lk.reference), everything)
    gradients = stacked([gradient(*example) for example in examples])

    assert_same(torch.func.vmap(lambda *t: call(lk, *t), dim)(*batch), outputs)
    assert_same(torch.func.vmap(torch.func.grad(loss_function(call, lk), everything), dim)(*batch), gradients)
    through = torch.func.grad(lambda *t: torch.func.vmap(loss_function(call, lk), dim)(*t).sum(), everything)(*batch)
    assert_same([g.movedim(dim, 0) for g in through], gradients)


@not_interpreted
@pytest.mark.parametrize("op", [op for op in CALLS if op != "rope, in place"])
def test_gradients_of_tensors_shared_by_a_vmap_are_sums_over_the_batch(op, device):
    call, (first, *others) = differentiable(op, device)
    batch, everything = torch.stack((first, 2 * first)), tuple(range(1 + len(others)))
    dims = (0, *[None] * len(others))
    outputs = torch.func.vmap(lambda *t: call(lk, *t), dims)(batch, *others)
    assert_same(outputs, stacked([call(lk.reference, x, *others) for x in batch]))
    per_example = [torch.func.grad(loss_function(call, lk.reference), everything)(x, *others) for x in batch]
    losses = torch.func.vmap(loss_function(call, lk), dims)
    through = torch.func.grad(lambda *t: losses(*t).sum(), everything)(batch, *others)
    ours, *shared = zip(*per_example, strict=True)
    assert_same(through, (torch.stack(ours), *map(sum, shared)))


@pytest.mark.parametrize("op", ["rms_norm", "rope, q alone", pytest.param("attention", marks=not_interpreted)])
def test_jacobians_equal_those_of_the_reference(op, device):
    call, tensors = differentiable(op, device)
    everything = tuple(range(len(tensors)))

    def summed(module):
        return lambda *t: tree_leaves(call(module, *t))[0].sum(-1)

    expected = torch.func.jacrev(summed(lk.reference), everything)(*tensors)
    assert_same(torch.func.jacrev(summed(lk), everything)(*tensors), expected)
    assert_same(torch.autograd.functional.jacobian(summed(lk), tensors, vectorize=True), expected)


def test_gradients_for_each_example_of_a_module(device):
    norm = lk.nn.RMSNorm(16, device=device)
    parameters, x = dict(norm.named_parameters()), torch.randn(3, 16, device=device)

    def loss(parameters, x):
        return torch.func.functional_call(norm, parameters, (x,)).sin().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["weight"]
    for dw, row in zip(per_sample, x, strict=True):
        norm.zero_grad()
        norm(row).sin().sum().backward()
        torch.testing.assert_close(dw, norm.weight.grad)


def test_vmap_of_no_example_is_refused(device):
    with pytest.raises(ValueError, match="vmap over a dimension of size 0"):
        torch.func.vmap(lambda x: lk.rms_norm(x))(torch.empty(0, 16, device=device))


def test_transforms_run_inside_a_compiled_function(device):
    torch._dynamo.reset()
    x, w = torch.randn(3, 16, device=device), torch.rand(16, device=device)

    def gradient(module):
        return lambda x: torch.func.grad(lambda x: module.rms_norm(x, w).sin().sum())(x)

    def tangent(module):
        return lambda x: torch.func.jvp(lambda x: module.rms_norm(x, w), (x,), (x.cos(),))[1]

    torch.testing.assert_close(torch.compile(gradient(lk), backend="aot_eager")(x), gradient(lk.reference)(x))
    torch.testing.assert_close(torch.compile(tangent(lk), backend="aot_eager")(x), tangent(lk.reference)(x))
    with pytest.raises(RuntimeError, match=r"llama_kernels.attention: forward-mode"):
        q = x[None, None]
        torch.compile(lambda q: torch.func.jvp(lambda q: lk.attention(q, q, q), (q,), (q,)), backend="aot_eager")(q)


@pytest.mark.parametrize("transform", ["grad", "grad of vmap"])
def test_gradients_of_the_tables_are_refused(transform, device):
    q, (cos, sin) = torch.randn(1, 2, 5, 16, device=device), tables(5, 16, device)
    functions = {
        "rope": lambda c: lk.rope(q, None, c, sin)[0].sum(),
        "qk_norm_rope": lambda c: lk.qk_norm_rope(q, None, None, None, c, sin)[0].sum(),
        "rope_attention": lambda c: lk.rope_attention(q, q, q, c, sin).sum(),
        "rope_qkv": lambda c: lk.rope_qkv(q.flatten(1).view(1, 1, -1)[..., :48], 1, 1, c[:1], sin[:1])[0].sum(),
    }
    for op, function in functions.items():
        with pytest.raises(ValueError, match=f"llama_kernels.{op}: cos is a tensor that requires grad"):
            if transform == "grad":
                torch.func.grad(function)(cos)
            else:
                mapped = torch.func.vmap(function)
                torch.func.grad(lambda c, mapped=mapped: mapped(c).sum())(torch.stack((cos, cos)))
