"""What surrounds a call in training: autocast, checkpointing, and gradients of some inputs alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import llama_kernels as lk
from tests.support.derivatives import differentiable, layer, layer_inputs, loss_function, with_grads
from tests.support.environment import DEVICE
from tests.support.judge import UNIT, relative_error
from tests.support.ops import Make, Shape, calls
from tests.support.rope import tables

ops = torch.ops.llama_kernels

# --- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.corpus(60)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention_follows_autocast(softcap, device):
    """rope gives q and k in float32, and a Linear gives v in bfloat16. Products inside of attention stay float32."""
    q, k, v = (torch.randn(1, H, 12, 32, device=device).requires_grad_() for H in (4, 2, 2))
    do = torch.randn(1, 4, 12, 32, device=device).bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = lk.attention(q, k, v.bfloat16(), softcap=softcap)
        grads = torch.autograd.grad(out, (q, k, v), do)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.float32] * 3
    expected = lk.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), softcap=softcap)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected, (q, k, v), do)))


@pytest.mark.corpus(60)
def test_rotated_attention_follows_autocast(device):
    q, k, v = (torch.randn(1, H, 12, 32, device=device).requires_grad_() for H in (4, 2, 2))
    angles = tables(12, 32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = lk.rope_attention(q, k, v.bfloat16(), *angles)
    assert torch.equal(out, lk.rope_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), *angles))
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), (q, k, v))] == [torch.float32] * 3


@pytest.mark.corpus(60)
def test_norm_and_rope_keep_their_dtype_under_autocast(device):
    x, q = torch.randn(4, 96, device=device), torch.randn(1, 2, 12, 32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert lk.rms_norm(x, torch.ones(96, device=device)).dtype == torch.float32
        assert lk.rope(q, None, *tables(12, 32, device))[0].dtype == torch.float32
        assert lk.rms_norm(x.bfloat16(), torch.ones(96, device=device)).dtype == torch.bfloat16


# --- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.corpus(58)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant, device):
    t, (cos, sin) = layer_inputs(device), tables(12, 32, device)

    def checkpointed(leaves, cos, sin):
        names = list(leaves)
        return checkpoint(
            lambda *xs: layer(dict(zip(names, xs, strict=True)), cos, sin),
            *leaves.values(),
            use_reentrant=use_reentrant,
        )

    for name, x in t.items():
        t[name] = x.detach()
    results = []
    for function in (checkpointed, layer):
        leaves = {name: x.clone().requires_grad_() for name, x in t.items()}
        function(leaves, cos, sin).backward()
        results.append([x.grad for x in leaves.values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_selective_checkpointing_keeps_attention(device):
    """The policy names the registered op. What it saves runs once."""
    t, (cos, sin) = layer_inputs(device), tables(12, 32, device)
    ran = []

    def policy(context, op, *args, **kwargs):
        ran.append((op, context.is_recompute))
        saved = op == ops.attention_forward.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    leaves = {name: x.detach().requires_grad_() for name, x in t.items()}
    loss = checkpoint(
        layer, leaves, cos, sin, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert (ops.attention_forward.default, False) in ran
    for a, b in zip(grads, with_grads(layer, t, cos, sin)[1:], strict=True):
        assert torch.equal(a, b)


# --- gradients of some inputs ----------------------------------------------------------------------------------------


def proper_subsets() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The ops, each with some of the tensors that have a gradient."""
    for op, call in calls(Shape(), Make(), options=True):
        for n in range(1, len(call.differentiable)):
            yield from ((op, names) for names in itertools.combinations(call.differentiable, n))


def gradients(op: str, names: tuple[str, ...], device: torch.device) -> dict[str, torch.Tensor]:
    """Of a call in which the tensors `names` require grad, and no others."""
    call, tensors = differentiable(op, device)
    given = zip(call.differentiable, tensors, strict=True)
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in given}
    asked = [leaves[name] for name in names]
    return dict(zip(names, torch.autograd.grad(loss_function(call, lk)(*leaves.values()), asked), strict=True))


@functools.cache
def all_gradients(op: str, device: torch.device) -> dict[str, torch.Tensor]:
    call, _ = differentiable(op, device)
    return gradients(op, call.differentiable, device)


@pytest.mark.corpus(57)
@pytest.mark.parametrize("op, wanted", list(proper_subsets()), ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_some_gradients_equal_those_of_a_call_for_all(op, wanted, device):
    """Bit for bit in the interpreter. Compiled, the two calls are two kernels, whose products and sums ptxas may fuse
    differently."""
    everything = all_gradients(op, device)
    for name, grad in gradients(op, wanted, device).items():
        if DEVICE == "cuda":
            assert relative_error(grad, everything[name]) <= 2 * UNIT[grad.dtype], name
        else:
            assert torch.equal(grad, everything[name]), name


@pytest.mark.corpus(57)
def test_gradients_that_are_not_asked_for_are_not_computed(device):
    computed = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func == ops.attention_backward.default:
                computed.append([x.numel() > 0 for x in result])
            return result

    q, k, v = (torch.randn(1, 2, 12, 32, device=device) for _ in range(3))
    with Spy():
        lk.attention(q, k, v.requires_grad_()).sum().backward()
    assert computed == [[False, False, True, False]]


def test_no_graph_is_built_where_no_gradient_is_needed(device):
    q = torch.randn(1, 2, 12, 32, device=device).requires_grad_()
    with torch.no_grad():
        assert lk.attention(q, q, q).grad_fn is None
    assert lk.attention(*(q.detach(),) * 3).grad_fn is None


@pytest.mark.corpus(59)
def test_a_second_backward_over_one_graph_repeats_the_gradients(device):
    q, k, v = (torch.randn(1, 2, 12, 32, device=device).requires_grad_() for _ in range(3))
    out = lk.attention(q, k, v)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.corpus(86)
@pytest.mark.parametrize("registered", [False, True], ids=["public", "registered"])
@pytest.mark.parametrize("op", ["rope", "rope_into_cache"])
def test_a_tensor_that_is_written_has_another_version(op, registered, device):
    """Autograd raises by it where a saved tensor has changed, and would else give the gradient at other numbers."""
    q, k, v, *caches = (torch.randn(1, 2, 4, 32, device=device) for _ in range(5))
    angles, positions = tables(4, 32, device), torch.arange(4, device=device)
    written = [q, k] if op == "rope" else caches
    x = torch.randn(1, 2, 4, 32, device=device).requires_grad_()
    out = lk.attention(x, *written)
    versions = [t._version for t in written]
    if op == "rope":
        ops.rope_(q, k, *angles, None, False) if registered else lk.rope(q, k, *angles, inplace=True)
    elif registered:
        ops.rope_into_cache(q, k, v, *caches, positions, *angles, None, False)
    else:
        lk.rope_into_cache(q, k, v, *caches, positions, *angles)
    assert all(t._version > version for t, version in zip(written, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_ops_run_on_the_meta_device():
    """Every op gives shapes, dtypes and gradients there, where models are built before they have memory."""
    q, k, v = (torch.empty(2, 5, H, 16, device="meta").transpose(1, 2).requires_grad_() for H in (4, 2, 2))
    cos, sin = (torch.empty(5, 8, device="meta") for _ in range(2))
    q_, k_ = lk.rope(*lk.qk_norm_rope(q, k, None, None, cos, sin), cos, sin)
    o, lse = lk.attention(q_, k_, v, return_lse=True)
    y = lk.rms_norm(o + lk.rope_attention(q, k, v, cos, sin))
    assert [x.shape for x in lk.rope_qkv(torch.empty(2, 5, 128, device="meta"), 4, 2, cos, sin)] == [
        x.shape for x in (q, k, v)
    ]
    assert (y.shape, lse.shape, y.device.type) == (q.shape, (2, 4, 5), "meta")
    grads = torch.autograd.grad(y, (q, k, v), torch.empty_like(y))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
