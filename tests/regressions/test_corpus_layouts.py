"""Bugs that users of other kernels met, each as a test: strides, aliasing, and what autograd saves.

A docstring says what went wrong there. The mark `corpus` has the numbers of the entries of docs/reliability.md that a
test answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.library import opcheck

import llama_kernels as lk
from bench.attention_options import attention_options
from tests.support.attention import Case, check, packed
from tests.support.guards import relaid
from tests.support.judge import equal_results
from tests.support.ops import CALLS, Make, Shape, calls
from tests.support.rope import qk
from tests.support.rope import tables as rope_tables

corpus = pytest.mark.corpus


def an_op(
    op: str, device: torch.device, dtype: torch.dtype = torch.float32, B: int = 2, S: int = 20
) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """The op as a function from tensors that have a gradient to its first output, and such tensors."""
    call = dict(calls(Shape(B=B, S=S, D=16, N=32), Make(device, dtype)))[op]

    def first(*tensors: torch.Tensor) -> torch.Tensor:
        results = call(lk, *tensors)
        return results[0] if isinstance(results, tuple) else results

    return first, [x.detach().requires_grad_() for x in call.tensors]


def every(test: Callable[..., None]) -> Any:
    """`test` for each op that has a gradient. Rotation in place has tests of its own, since `Call` rotates a copy."""
    return pytest.mark.parametrize("op", [op for op in CALLS if op != "rope, in place"])(test)


def outcome(f: Callable[..., torch.Tensor], tensors: list[torch.Tensor], upstream: Any = None) -> list[torch.Tensor]:
    """Output and all gradients."""
    y = f(*tensors)
    dy = torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(1)).to(y.dtype)
    dy = dy if upstream is None else upstream(dy)
    return [y.detach(), *(g for g in torch.autograd.grad(y, tensors, dy, allow_unused=True) if g is not None)]


UPSTREAMS = {
    "expanded": lambda dy: torch.ones_like(dy[..., :1]).expand_as(dy),
    "transposed": lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda dy: torch.stack((dy, dy), -1)[..., 0],
    "one number": lambda dy: dy.new_ones(()).expand_as(dy),
}


@every
@corpus(41)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_upstream_gradients_that_are_not_contiguous(op, upstream, device):
    """`.sum().backward()` gives a stride of 0: flash-attention#355, quack#88, unsloth#10617."""
    f, tensors = an_op(op, device)
    make = UPSTREAMS[upstream]
    assert equal_results(outcome(f, tensors, make), outcome(f, tensors, lambda dy: make(dy).contiguous()))


@every
@corpus(42, 45)
def test_expanded_inputs_after_contiguous_ones(op, device):
    """A stride of 0 in a kernel that was specialised for a contiguous call: flash-attention#2189, unsloth#3782."""
    f, tensors = an_op(op, device)
    one = [t.detach()[:1] if t.ndim > 2 else t.detach() for t in tensors]
    if op == "attention_varlen":
        one = [t.detach()[:1].expand_as(t) for t in tensors]
    expanded = [t.expand_as(like).requires_grad_() for t, like in zip(one, tensors, strict=True)]
    copied = [t.detach().contiguous().requires_grad_() for t in expanded]
    first = outcome(f, copied)
    assert equal_results(first, outcome(f, expanded)) and equal_results(first, outcome(f, copied))


@corpus(43, 44)
@pytest.mark.parametrize("seed", range(4))
def test_five_memory_orders_in_one_call(seed, device):
    """The strides of do were used for o, and dv had those of k: flash-attention 9ee0ff1d, 2423cca3."""
    check(Case(2, 4, 2, 20, 30, 16, 24), torch.float16, device, layout=10 * seed)
    check(packed((8, 12), (20, 10), 4, 2, 16, 24), torch.float16, device, layout=10 * seed)


@every
@corpus(46)
@pytest.mark.parametrize("shift", [1, 3])
def test_misaligned_slices_after_an_aligned_call(op, shift, device):
    """A kernel that was specialised for an alignment to 16 bytes got x[1:]: pytorch#184714, triton#11583."""
    f, tensors = an_op(op, device, torch.float16)
    expected = outcome(f, tensors)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        dense = x.detach()
        buffer = torch.empty(dense.numel() + shift, dtype=x.dtype, device=device)
        return buffer[shift:].as_strided(x.shape, x.stride(), shift).copy_(dense).requires_grad_()

    assert equal_results(expected, outcome(f, [shifted(t) for t in tensors]))


@every
@corpus(47)
def test_strides_of_dimensions_of_one_element_change_nothing(op, device):
    """Such strides have no meaning and may have any value: cudnn-frontend's random configurations."""
    f, tensors = an_op(op, device, B=1, S=1)
    strange = [relaid(t.detach(), seed).requires_grad_() for seed, t in enumerate(tensors)]
    assert any(a.stride() != b.stride() for a, b in zip(strange, tensors, strict=True))
    assert equal_results(outcome(f, tensors), outcome(f, strange))


@every
@corpus(48)
def test_an_upstream_gradient_with_two_readers_is_not_overwritten(op, device):
    """dx was written over dy, which another branch still needed: Liger#370, #376 (Gemma 2)."""
    f, tensors = an_op(op, device)
    x = tensors[0]
    y = f(*tensors)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    side = torch.zeros_like(y, requires_grad=True)
    dx, dside = torch.autograd.grad((f(*tensors) + side).sum(), (x, side))
    assert torch.equal(dx, expected) and torch.equal(dside, torch.ones_like(side))


@corpus(49, 51)
def test_rotation_changes_its_inputs_only_in_place(device):
    """unsloth#5001; quack 7142154. In place, autograd records the change, and a leaf raises an error."""
    q, k = qk(1, 2, 2, 6, 8, torch.float32, device)
    before, versions = (q.clone(), k.clone()), (q._version, k._version)
    cos, sin = rope_tables(6, 8, device)
    lk.rope(q, k, cos, sin)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]) and (q._version, k._version) == versions
    lk.rope(q, k, cos, sin, inplace=True)
    assert not torch.equal(q, before[0]) and q._version > versions[0] and k._version > versions[1]
    with pytest.raises(ValueError, match="q is a leaf"):
        lk.rope(q.requires_grad_(), k, cos, sin, inplace=True)


@corpus(50)
def test_q_k_and_v_may_share_the_storage_of_a_projection(device):
    """q, k and v are views of one tensor, which gets their gradients: xformers#1401."""
    qkv = torch.randn(2, 20, 3, 4, 16, device=device, requires_grad=True)

    def attend(q, k, v):
        return lk.attention(*(x.transpose(1, 2) for x in (q, k, v)))

    out = attend(*qkv.unbind(2))
    (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    apart = [x.detach().clone().requires_grad_() for x in qkv.unbind(2)]
    expected = attend(*apart)
    grads = torch.autograd.grad(expected, apart, torch.ones_like(out))
    assert torch.equal(out, expected) and torch.equal(dqkv, torch.stack(grads, 2))


def test_writing_beside_or_into_tensors_of_negated_values(device):
    """In memory they have the opposite sign, as the imaginary part of a complex conjugate does."""
    q, k = qk(2, 4, 2, 9, 16, torch.float32, device)
    angles = torch.polar(*torch.rand(2, 9, 8, device=device)).conj()
    cos, sin = angles.real, angles.imag
    assert sin.is_neg()
    expected = lk.rope(q, k, cos, sin.resolve_neg())
    for x, y in zip((q, k), expected, strict=True):
        rotated, negated = x.clone(), torch._neg_view(-x)
        lk.rope(rotated, None, cos, sin, inplace=True)
        lk.rope(negated, None, cos, sin, inplace=True)
        assert torch.equal(rotated, y) and torch.equal(negated, y)
    k_cache, v_cache = torch.zeros_like(k), torch._neg_view(torch.zeros_like(k))
    lk.rope_into_cache(q, k, k, k_cache, v_cache, torch.arange(9, device=device), cos, sin)
    assert torch.equal(k_cache, expected[1]) and torch.equal(v_cache, k)


@every
@corpus(58)
def test_saved_tensors_pass_through_hooks(op, device):
    """Saved tensors were read twice, or no hook saw them: TransformerEngine#1334, xformers#1152."""
    f, tensors = an_op(op, device)
    expected = outcome(f, tensors)
    packed_away = []
    with saved_tensors_hooks(lambda x: packed_away.append(x) or x.clone(), lambda x: x):
        hooked = outcome(f, tensors)
    with save_on_cpu():
        offloaded = outcome(f, tensors)
    assert packed_away and equal_results(expected, hooked) and equal_results(expected, offloaded)


@every
@corpus(62, 64)
def test_fake_strides_are_the_real_ones(op, device):
    """A compiler relies on the strides of the fake kernel: pytorch#178499, prime-rl#3567. No op returns its input."""
    for seed in range(3):
        f, tensors = an_op(op, device)
        tensors = [relaid(t.detach(), seed + i).requires_grad_() for i, t in enumerate(tensors)]
        real = f(*tensors)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = f(*(mode.from_tensor(t) for t in tensors))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        assert real.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}


@corpus(62)
@pytest.mark.parametrize("seed", range(2))
def test_registered_ops_pass_opcheck_on_strided_inputs(seed, device):
    """On inputs of several memory orders."""
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    q, k, v, do = (relaid(torch.randn(2, H, 9, 16, device=device), seed + i) for i, H in enumerate((4, 2, 2, 4)))
    call = attention_options(9, 9, 0.25)
    out, lse = torch.ops.llama_kernels.attention_forward(q, k, v, *call)
    opcheck(torch.ops.llama_kernels.attention_forward.default, (q, k, v, *call), test_utils=checks)
    grads = (do, None, q, k, v, out, lse, *call, True, True, True, False, None)
    opcheck(torch.ops.llama_kernels.attention_backward.default, grads, test_utils=checks)
    cos, sin = rope_tables(9, 16, device)
    opcheck(torch.ops.llama_kernels.rope.default, (q, k, cos, sin, None, False, False), test_utils=checks)
    opcheck(torch.ops.llama_kernels.rms_norm_forward.default, (q, None, None, 1e-6, 0.0), test_utils=checks)
