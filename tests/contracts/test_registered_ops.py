"""The ops of torch.ops.llama_kernels, called without the public functions around them, as exported graphs call them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._pytree import tree_leaves

import llama_kernels as lk
from tests.support.derivatives import assert_same, loss_of, zeros_for_none
from tests.support.launches import KERNELS_RUN
from tests.support.ops import REGISTERED, Make, Shape, registered_calls
from tests.support.rope import tables

ops = torch.ops.llama_kernels


def registered(name: str, device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    """A registered op, and arguments of a call."""
    op, args = registered_calls(Shape(S=12, D=32, N=96), Make(device))[name]
    return getattr(ops, op), args


@pytest.mark.corpus(62, 64)
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_ops_pass_opcheck(name, device):
    op, args = registered(name, device)
    opcheck(op.default, args)


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_ops_take_any_last_dimension(name, device):
    """The public functions copy a tensor whose last dimension is not contiguous. An exported graph may not: it has the
    copies that the tensors of its trace needed. All tensors are such, and each alone."""
    op, args = registered(name, device)
    tensors = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
    for changed in (tensors, *([i] for i in tensors)):
        # An op may write into its arguments.
        given, strided = ([x.clone() if isinstance(x, torch.Tensor) else x for x in args] for _ in range(2))
        for i in changed:
            strided[i] = args[i].unsqueeze(-1).repeat_interleave(2, -1)[..., 0]
        for ours, theirs in zip(tree_leaves(op(*strided)), tree_leaves(op(*given)), strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        for i in tensors:
            torch.testing.assert_close(strided[i], given[i], rtol=0, atol=0)


# --- tables of RoPE ---


def by_name(op: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((argument.name for argument in op.default._schema.arguments), args, strict=False))


def takes_row_i_for_token_i(op: Any, args: tuple[Any, ...]) -> bool:
    given = by_name(op, args)
    return "cos" in given and given["position_ids"] is None and given["cos"].ndim == 2


ROW_BY_TOKEN = [
    name
    for name, (op, args) in registered_calls(Shape(), Make()).items()
    if takes_row_i_for_token_i(getattr(ops, op), args)
]


@pytest.mark.parametrize("name", ROW_BY_TOKEN)
def test_tables_with_fewer_rows_than_tokens_are_not_read_past_their_end(name, device):
    """The public functions refuse such tables."""
    op, args = registered(name, device)
    given = by_name(op, args)
    short = {side: given[side][:3].clone() for side in ("cos", "sin")}
    refused = pytest.raises(ValueError, match=r"cos is of shape \(3, \d+\); wanted a row for each of \d+ tokens")
    with refused if KERNELS_RUN or "attention" in name else contextlib.nullcontext():
        op(**{**given, **short})


# --- tensors without a kernel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_ops_name_a_tensor_that_is_not_dense(name, device):
    op, args = registered(name, device)
    first = next(i for i, x in enumerate(args) if isinstance(x, torch.Tensor))
    given = [*args[:first], args[first].to_sparse(), *args[first + 1 :]]
    argument = op.default._schema.arguments[first].name
    with pytest.raises(TypeError, match=rf"{argument} is of layout torch.sparse_coo; wanted a dense tensor"):
        op(*given)


# --- gradients -------------------------------------------------------------------------------------------------------

DIFFERENTIABLE = {"rms_norm_forward", "rope", "qk_norm_rope", "attention_forward"}
WITH_GRADIENT = [name for name, (op, _) in registered_calls(Shape(), Make()).items() if op in DIFFERENTIABLE]
WITHOUT_GRADIENT = [name for name in REGISTERED if name not in (*WITH_GRADIENT, "decode_attention")]


def differentiable(name: str, device: torch.device) -> tuple[Any, list[Any], list[int]]:
    """A registered op, arguments of a call, and the places of those that have a gradient."""
    op, args = registered_calls(Shape(S=5, D=16, N=16), Make(device))[name]
    names = [argument.name for argument in getattr(ops, op).default._schema.arguments]
    floating = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return getattr(ops, op), list(args), [i for i in floating if names[i] not in ("cos", "sin")]


def by_the_reference(op: str, args: list[Any]) -> tuple[torch.Tensor, ...]:
    """The results of a registered op that depend on its differentiable arguments."""
    if op == "rms_norm_forward":
        x, residual, weight, eps, offset = args
        summed = x if residual is None else x + residual
        rstd = torch.rsqrt(summed.square().mean(-1, keepdim=True) + eps)
        return lk.reference.rms_norm(summed, weight, eps, offset=offset), *([summed] * (residual is not None)), rstd
    if op == "rope":
        q, k, cos, sin, position_ids, interleaved, inverse = args
        results = lk.reference.rope(q, k, cos, -sin if inverse else sin, position_ids, interleaved=interleaved)
    elif op == "qk_norm_rope":
        *given, eps, offset, interleaved = args
        results = lk.reference.qk_norm_rope(*given, eps=eps, offset=offset, interleaved=interleaved)
    else:
        # The dtype of out, where it is given, is that of q here: float32.
        q, k, v, sinks, kv_start, kv_end, cu_q, cu_k, longest_q, longest_k, scale, softcap, left, right = args[:14]
        window = tuple(-1 if side is None else side for side in (left, right))
        options = {"is_causal": False, "window_size": window, "scale": scale, "softcap": softcap, "sinks": sinks,
                   "kv_start": kv_start, "kv_end": kv_end, "return_lse": True,
                   "kv_prefix": args[15] if len(args) > 15 else None}  # fmt: skip
        if cu_q is None:
            results = lk.reference.attention(q, k, v, **options)
        else:
            results = lk.reference.attention_varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, **options)
    return tuple(x for x in results if x is not None)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_registered_ops_have_gradients(name, device):
    """With respect to all tensors at once and to each alone; of all results at once and of each alone."""
    op, args, places = differentiable(name, device)
    for wanted in (places, *([place] for place in places)):
        given = [x.detach().requires_grad_(i in wanted) if i in places else x for i, x in enumerate(args)]
        leaves = [given[place] for place in wanted]
        zero = sum(0 * leaf.sum() for leaf in leaves)  # a result may depend on none of them
        results = [x for x in tree_leaves(op(*given)) if x.numel()]
        expected = by_the_reference(op.__name__, given)
        for ours, theirs in ((results, expected), *zip(results, expected, strict=True)):
            losses = (loss_of(ours) + zero, loss_of(theirs) + zero)
            assert_same(*(torch.autograd.grad(y, leaves, retain_graph=True) for y in losses))


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_second_derivatives_and_forward_mode_of_registered_ops(name, device):
    """Of attention they are refused. The others equal the reference, in every result."""
    op, args, (first, *_) = differentiable(name, device)
    x = args[first].detach()

    def call(function: Any) -> Any:
        return lambda x: [y for y in tree_leaves(function([*args[:first], x, *args[first + 1 :]])) if y.numel()]

    ours, theirs = call(lambda given: op(*given)), call(lambda given: by_the_reference(op.__name__, given))
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=r"ops.llama_kernels.\w+: torch.func does not differentiate the op"):
            transform(lambda x: ours(x)[0].sum())(x)

    def second(function: Any) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(function(leaf)), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    def tangents(function: Any) -> list[torch.Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.unpack_dual(y) for y in function(forward_ad.make_dual(x, x.cos()))]
            return [zeros_for_none(y.tangent, y.primal) for y in duals]

    if op.__name__ != "attention_forward":
        assert_same(second(ours), second(theirs))
        assert_same(tangents(ours), tangents(theirs))
        return
    with pytest.raises(RuntimeError, match=r"llama_kernels.\w+: double backward"):
        second(ours)
    with pytest.raises(RuntimeError, match=r"llama_kernels.\w+: forward-mode"):
        tangents(ours)


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_tensors_that_require_grad_are_refused_by_ops_without_a_gradient(name, device):
    op, args = registered(name, device)
    floating = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    before = [args[i].clone() for i in floating]
    for i in floating:
        leaf = args[i].detach().clone().requires_grad_()
        wanted = f"llama_kernels.{op.__name__}: {op.default._schema.arguments[i].name} is a tensor that requires grad"
        with pytest.raises(ValueError, match=wanted):
            op(*args[:i], leaf, *args[i + 1 :])
    for i, x in zip(floating, before, strict=True):
        assert torch.equal(args[i], x), "the op ran"


@pytest.mark.parametrize("op", ["rope", "qk_norm_rope"])
def test_gradients_of_the_tables_of_registered_ops_are_refused(op, device):
    q, (cos, sin) = torch.randn(1, 2, 5, 16, device=device), tables(5, 16, device)
    calls = {
        "rope": lambda c: ops.rope(q, None, c, sin, None, False, False),
        "qk_norm_rope": lambda c: ops.qk_norm_rope(q, None, None, None, c, sin, None, 1e-6, 0.0, False),
    }
    with pytest.raises(ValueError, match=f"llama_kernels.{op}: cos is a tensor that requires grad"):
        calls[op](cos.requires_grad_())
    with torch.no_grad():
        calls[op](cos)


def test_decode_attention_has_no_gradient(device):
    q, kv, visible = torch.randn(1, 2, 1, 16, device=device), torch.randn(1, 2, 8, 16, device=device), torch.ones(1, 8)
    args = (kv, kv, visible.bool().to(device), None, None, None, 0.25, None)
    with pytest.raises(ValueError, match=r"llama_kernels.decode_attention: q is a tensor that requires grad"):
        ops.decode_attention(q.requires_grad_(), *args)
    said = r"decode_attention: .* It is for inference\.$"
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match=said):
        ops.decode_attention(forward_ad.make_dual(q.detach(), q.detach()), *args)
