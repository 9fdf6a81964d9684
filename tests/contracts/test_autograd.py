"""Registration and autograd: opcheck, torch.compile, autocast, checkpointing, double backward, gradients on demand."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import llama_kernels as lk
from llama_kernels.core.language import INTERPRETED
from tests.support.judge import UNIT, relative_error
from tests.support.ops import CALLS, REGISTERED, Call, Make, Shape, calls, registered_calls
from tests.support.rope import tables

ops = torch.ops.llama_kernels


def tensors(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What `block` takes; q, k and v in the memory order of a projection."""
    x = {name: torch.randn(2, 12, 96, device=device).to(dtype) for name in ("x", "residual")}
    x["weight"] = torch.randn(96, device=device).to(dtype)
    for name, H in (("q", 4), ("k", 2), ("v", 2)):
        x[name] = torch.randn(2, 12, H, 32, device=device).to(dtype).transpose(1, 2)
    return x


def block(t: dict[str, torch.Tensor], cos, sin, **options: Any) -> torch.Tensor:
    """Every op at least once."""
    y, s = lk.add_rms_norm(t["x"], t["residual"], t["weight"])
    z = lk.rms_norm(y + s, t["weight"], offset=1.0)
    q, k = lk.rope(t["q"], t["k"], cos, sin)
    q, k = lk.qk_norm_rope(q, k, t["weight"][:32], t["weight"][32:64], cos, sin)
    q_, k_, v = lk.rope_qkv(t["x"].repeat(1, 1, 3)[..., : 8 * 32], 4, 2, cos, sin)
    o, lse = lk.attention(q + q_, k + k_, t["v"] + v, return_lse=True, **options)
    o = o + lk.rope_attention(t["q"], t["k"], t["v"], cos, sin)
    return z.square().mean() + o.square().mean() + lse.mean()


def with_grads(function, t: dict[str, torch.Tensor], *args: Any) -> list[torch.Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in t.items()}
    loss = function(leaves, *args)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


# What runs here is wiring, the same on every path; the interpreter takes minutes for these.
wiring = pytest.mark.skipif(INTERPRETED, reason="wiring, which the run of the reference path tests")


# --- opcheck ---------------------------------------------------------------------------------------------------------


def registered(name: str, device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    """A registered op, and arguments of it."""
    op, args = registered_calls(Shape(S=12, D=32, N=96), Make(device))[name]
    return getattr(ops, op), args


@pytest.mark.corpus(62, 64)
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_ops_pass_opcheck(name, device):
    op, args = registered(name, device)
    opcheck(op.default, args)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@wiring
@pytest.mark.corpus(63)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend, dynamic, device):
    torch._dynamo.reset()
    t, (cos, sin) = tensors(device), tables(12, 32, device)
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)
    for a, b in zip(with_grads(compiled, t, cos, sin), with_grads(block, t, cos, sin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiles_packed_sequences_that_share_their_bounds(device):
    """Dynamo refuses a Function that gets one tensor twice, which is how everyone calls self-attention."""
    torch._dynamo.reset()
    q, k, v = (torch.randn(20, H, 32, device=device).requires_grad_() for H in (4, 2, 2))
    cu = torch.tensor([0, 7, 20], dtype=torch.int32, device=device)

    def loss(q, k, v, cu):
        return lk.attention_varlen(q, k, v, cu, cu, 13, 13).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, cu), loss(q, k, v, cu))
    assert torch.equal(torch.compile(lk.attention, fullgraph=True, backend="aot_eager")(*(q[None],) * 3),
                       lk.attention(*(q[None],) * 3))  # fmt: skip


def test_compiles_in_place_rotation(device):
    torch._dynamo.reset()
    t, (cos, sin) = tensors(device), tables(12, 32, device)

    def rotated(leaves, cos, sin):
        q, k = lk.rope(leaves["q"] * 1, leaves["k"] * 1, cos, sin, inplace=True)
        return (q.square() * leaves["v"].mean()).sum() + k.exp().sum()

    qkv = {name: t[name] for name in ("q", "k", "v")}
    compiled = torch.compile(rotated, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_grads(compiled, qkv, cos, sin), with_grads(rotated, qkv, cos, sin), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_what_writes_into_a_cache(device):
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, H, 1, 32, device=device) for H in (4, 2, 2))
    slot, angles = torch.tensor([7], device=device), tables(12, 32, device)

    def step(caches):
        return lk.rope_into_cache(q, k, v, *caches, slot, *angles) * 2

    eager, compiled = ([torch.zeros(2, 2, 12, 32, device=device) for _ in range(2)] for _ in range(2))
    with torch.no_grad():
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(compiled), step(eager))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(eager, compiled, strict=True))


def test_exported_graphs_hold_the_registered_ops(device):
    class Block(torch.nn.Module):
        def forward(self, q, k, v, cos, sin):
            q, k = lk.rope(q, k, cos, sin)
            return lk.rms_norm(lk.attention(q, k, v))

    t, (cos, sin) = tensors(device), tables(12, 32, device)
    with torch.no_grad():
        program = torch.export.export(Block(), (t["q"], t["k"], t["v"], cos, sin))
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert {f"llama_kernels.{op}.default" for op in ("rope", "attention_forward", "rms_norm_forward")} <= names
        args = (t["q"], t["k"], t["v"], cos, sin)
        torch.testing.assert_close(program.module()(*args), Block()(*args))


@wiring
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exports_with_a_dynamic_length(strict, device):
    """No check of ours, stride or cache says more of the length than the user did."""
    length = torch.export.Dim("length", min=2, max=64)
    for label, call in calls(Shape(S=64, D=16, N=32), Make(device)):
        if label in ("rope, in place", "attention_varlen"):  # writes into its inputs; has lengths of its own
            continue
        dims = [None if x.ndim == 1 else x.ndim - 2 for x in call.tensors]  # where the tokens are
        shapes = tuple({} if dim is None else {dim: length} for dim in dims)
        args = tuple(x.detach() for x in call.tensors)

        class Module(torch.nn.Module):
            def forward(self, *tensors, call=call):
                return call(lk, *tensors)

        with torch.no_grad():
            program = torch.export.export(Module(), args, dynamic_shapes={"tensors": shapes}, strict=strict)
            for n in (2, 9):
                cut = [x if dim is None else x.narrow(dim, 0, n) for x, dim in zip(args, dims, strict=True)]
                torch.testing.assert_close(program.module()(*cut), call(lk, *cut), msg=label)


# --- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.corpus(60)
def test_attention_follows_autocast(device):
    """Mixed as it comes: rope gives q and k in float32, a Linear gives v in bfloat16."""
    q, k, v = (torch.randn(1, H, 12, 32, device=device).requires_grad_() for H in (4, 2, 2))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = lk.attention(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, lk.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [g.dtype for g in grads] == [torch.float32] * 3


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
    t, (cos, sin) = tensors(device), tables(12, 32, device)

    def checkpointed(leaves, cos, sin):
        names = list(leaves)
        return checkpoint(
            lambda *xs: block(dict(zip(names, xs, strict=True)), cos, sin),
            *leaves.values(),
            use_reentrant=use_reentrant,
        )

    for name, x in t.items():
        t[name] = x.detach()
    results = []
    for function in (checkpointed, block):
        leaves = {name: x.clone().requires_grad_() for name, x in t.items()}
        function(leaves, cos, sin).backward()
        results.append([x.grad for x in leaves.values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_selective_checkpointing_keeps_attention(device):
    """The registered op is what the policy names; saved, it runs once."""
    t, (cos, sin) = tensors(device), tables(12, 32, device)
    ran = []

    def policy(context, op, *args, **kwargs):
        ran.append((op, context.is_recompute))
        saved = op == ops.attention_forward.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    leaves = {name: x.detach().requires_grad_() for name, x in t.items()}
    loss = checkpoint(
        block, leaves, cos, sin, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert (ops.attention_forward.default, False) in ran
    for a, b in zip(grads, with_grads(block, t, cos, sin)[1:], strict=True):
        assert torch.equal(a, b)


# --- derivatives of every op -----------------------------------------------------------------------------------------


def differentiable(op: str, device: torch.device) -> tuple[Call, tuple[torch.Tensor, ...]]:
    """A call of each op with options, by lk or by lk.reference, and all tensors that have a gradient."""
    torch.manual_seed(0)
    call = dict(calls(Shape(S=5, D=16, N=16), Make(device), options=True))[op]
    return call, call.tensors


LIGHT_OPS = [pytest.param(op, marks=wiring) if op in ("attention_varlen", "rope_attention") else op for op in CALLS]


def _loss(call: Any, module: Any) -> Any:
    return lambda *tensors: sum(y.sin().sum() for y in tree_leaves(call(module, *tensors)))


def _same(results: Any, expected: Any) -> None:
    """The same numbers, computed in another order: a few float32 roundings apart, of the whole and of the largest."""
    for a, b in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) <= 8 * UNIT[torch.float32]
        assert (a - b).abs().max() <= 64 * UNIT[torch.float32] * b.abs().max()


def _stacked(results: list[Any]) -> list[torch.Tensor]:
    return [torch.stack(each) for each in zip(*map(tree_leaves, results), strict=True)]


@pytest.mark.parametrize("op", CALLS)
def test_torch_func_grad_equals_the_references(op, device):
    call, tensors = differentiable(op, device)
    everything = tuple(range(len(tensors)))
    expected = torch.func.grad(_loss(call, lk.reference), everything)(*tensors)
    _same(torch.func.grad(_loss(call, lk), everything)(*tensors), expected)
    _same(torch.func.grad_and_value(_loss(call, lk), everything)(*tensors)[0], expected)
    _same(torch.func.vjp(_loss(call, lk), *tensors)[1](torch.ones((), device=device)), expected)


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=wiring)], ids=["outermost", "innermost"])
@pytest.mark.parametrize("op", LIGHT_OPS)
def test_vmap_equals_a_loop(op, last, device):
    """vmap of the op, gradients an example, and gradients through a vmap. A batch that lies innermost leaves the last
    dimension of an example not contiguous."""
    call, tensors = differentiable(op, device)
    if last and op == "rope, in place":
        pytest.skip("in place takes no copy of what is not contiguous")
    everything, dim = tuple(range(len(tensors))), -1 if last else 0
    examples = [[t * scale for t in tensors] for scale in (1.0, -0.5, 1.5)]
    batch = [torch.stack(each, dim) for each in zip(*examples, strict=True)]
    outputs = _stacked([call(lk.reference, *example) for example in examples])
    gradient = torch.func.grad(_loss(call, lk.reference), everything)
    gradients = _stacked([gradient(*example) for example in examples])

    _same(torch.func.vmap(lambda *t: call(lk, *t), dim)(*batch), outputs)
    _same(torch.func.vmap(torch.func.grad(_loss(call, lk), everything), dim)(*batch), gradients)
    through = torch.func.grad(lambda *t: torch.func.vmap(_loss(call, lk), dim)(*t).sum(), everything)(*batch)
    _same([g.movedim(dim, 0) for g in through], gradients)


@wiring
@pytest.mark.parametrize("op", [op for op in CALLS if op != "rope, in place"])
def test_vmap_over_one_tensor(op, device):
    """The others are shared: their gradients are sums over the batch."""
    call, (first, *others) = differentiable(op, device)
    batch, everything = torch.stack((first, 2 * first)), tuple(range(1 + len(others)))
    dims = (0, *[None] * len(others))
    _same(torch.func.vmap(lambda *t: call(lk, *t), dims)(batch, *others),
          _stacked([call(lk.reference, x, *others) for x in batch]))  # fmt: skip
    per_example = [torch.func.grad(_loss(call, lk.reference), everything)(x, *others) for x in batch]
    through = torch.func.grad(lambda *t: torch.func.vmap(_loss(call, lk), dims)(*t).sum(), everything)(batch, *others)
    ours, *shared = zip(*per_example, strict=True)
    _same(through, (torch.stack(ours), *map(sum, shared)))


@pytest.mark.parametrize("op", ["rms_norm", "rope, q alone", pytest.param("attention", marks=wiring)])
def test_jacobians_equal_the_references(op, device):
    call, tensors = differentiable(op, device)
    everything = tuple(range(len(tensors)))

    def summed(module):
        return lambda *t: tree_leaves(call(module, *t))[0].sum(-1)

    expected = torch.func.jacrev(summed(lk.reference), everything)(*tensors)
    _same(torch.func.jacrev(summed(lk), everything)(*tensors), expected)
    _same(torch.autograd.functional.jacobian(summed(lk), tensors, vectorize=True), expected)


def test_gradients_of_each_sample_of_a_module(device):
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


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_transforms_inside_of_a_compiled_function(backend, device):
    torch._dynamo.reset()
    x, w = torch.randn(3, 16, device=device), torch.rand(16, device=device)

    def gradient(module):
        return lambda x: torch.func.grad(lambda x: module.rms_norm(x, w).sin().sum())(x)

    torch.testing.assert_close(torch.compile(gradient(lk), backend=backend)(x), gradient(lk.reference)(x))
    with pytest.raises(RuntimeError, match=r"llama_kernels.rms_norm: forward-mode"):
        torch.compile(lambda x: torch.func.jvp(lambda x: lk.rms_norm(x, w), (x,), (x,)), backend=backend)(x)


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


# --- the registered ops by themselves --------------------------------------------------------------------------------


class _Calls(torch.nn.Module):
    """A call whose tensors are parameters."""

    def __init__(self, call: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.call, self.tensors = call, torch.nn.ParameterList(t.clone() for t in tensors)

    def forward(self, scale):
        return tuple(tree_leaves(self.call(lk, *[t * scale for t in self.tensors])))


def _gradients(module: torch.nn.Module, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(sum(y.sin().sum() for y in module(scale)), list(module.parameters()))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=wiring)], ids=["traced", "strict"])
@pytest.mark.parametrize("op", CALLS)
def test_exported_modules_have_gradients(op, strict, device):
    """An exported graph holds the registered ops alone, and not the autograd.Function around them."""
    module, scale = _Calls(*differentiable(op, device)), torch.ones((), device=device)
    exported = torch.export.export(module, (scale,), strict=strict).module()
    _same(_gradients(exported, scale), expected := _gradients(module, scale))
    assert all(grad.any() for grad in expected)


@pytest.mark.parametrize("op", ["rms_norm", "rope", "attention"])
def test_exported_modules_compile(op, device):
    torch._dynamo.reset()
    module, scale = _Calls(*differentiable(op, device)), torch.ones((), device=device)
    exported = torch.export.export(module, (scale,)).module()
    _same(_gradients(torch.compile(exported, backend="aot_eager"), scale), _gradients(module, scale))


@pytest.mark.parametrize("op", ["add_rms_norm", "qk_norm_rope", "rope_attention"])
def test_double_backward_through_an_exported_module_is_refused(op, device):
    module, scale = _Calls(*differentiable(op, device)), torch.ones((), device=device)
    exported = torch.export.export(module, (scale,)).module()
    leaves = list(exported.parameters())
    (grad,) = torch.autograd.grad(sum(y.sin().sum() for y in exported(scale)), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"llama_kernels.\w+: double backward"):
        torch.autograd.grad(grad.sum(), leaves)


def _op_calls(device: torch.device) -> dict[str, tuple[Any, Any, tuple[torch.Tensor, ...]]]:
    """Of each registered op that has a gradient: a call of it, the same by lk.reference, and what has a gradient."""
    (cos, sin), positions = tables(8, 16, device), torch.randint(0, 8, (2, 5), device=device)
    (_, (x, residual, weight)), (_, (q, k, v, sinks)) = (
        differentiable(op, device) for op in ("add_rms_norm", "attention")
    )
    rotation, scoring = (cos, sin, positions), (None, None, None, None, 5, 5, 0.25, None, None, 0)

    def rstd(s):
        return torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-6)

    def add_rms_norm(x, r, w):
        y, s = lk.reference.add_rms_norm(x, r, w)
        return y, s, rstd(s)

    return {
        "rms_norm_forward": (
            lambda x, w: ops.rms_norm_forward(x, None, w, 1e-6, 0.0)[::2],
            lambda x, w: (lk.reference.rms_norm(x, w), rstd(x)), (x, weight)),
        "rms_norm_forward with a residual": (
            lambda x, r, w: ops.rms_norm_forward(x, r, w, 1e-6, 0.0), add_rms_norm, (x, residual, weight)),
        "rope": (
            lambda q, k: ops.rope(q, k, *rotation, False, False),
            lambda q, k: lk.reference.rope(q, k, *rotation), (q, k)),
        "rope of q, inverse": (
            lambda q: ops.rope(q, None, *rotation, False, True)[0],
            lambda q: lk.reference.rope(q, None, cos, -sin, positions)[0], (q,)),
        "qk_norm_rope": (
            lambda q, k, a, b: ops.qk_norm_rope(q, k, a, b, *rotation, 1e-6, 0.0, False),
            lambda q, k, a, b: lk.reference.qk_norm_rope(q, k, a, b, *rotation), (q, k, weight, weight + 1)),
        "qk_norm_rope of q": (
            lambda q: ops.qk_norm_rope(q, None, None, None, *rotation, 1e-6, 0.0, False)[0],
            lambda q: lk.reference.qk_norm_rope(q, None, None, None, *rotation)[0], (q,)),
        "attention_forward": (
            lambda q, k, v, s: ops.attention_forward(q, k, v, s, *scoring),
            lambda q, k, v, s: lk.reference.attention(q, k, v, sinks=s, return_lse=True), (q, k, v, sinks)),
    }  # fmt: skip


OP_CALLS = list(_op_calls(torch.device("cpu")))


@pytest.mark.parametrize("name", OP_CALLS)
def test_registered_ops_have_gradients(name, device):
    """Of all tensors at once, of each alone, and from each result alone."""
    call, reference, tensors = _op_calls(device)[name]
    for wanted in (range(len(tensors)), *([i] for i in range(len(tensors)))):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        asked = [leaves[i] for i in wanted]
        zero = sum(0 * t.sum() for t in asked)  # some result depends on none of them
        results, expected = tree_leaves(call(*leaves)), tree_leaves(reference(*leaves))
        losses = [[y.sin().sum() for y in each] for each in (results, expected)]
        for ours, theirs in (*zip(*losses, strict=True), map(sum, losses)):
            _same(*(torch.autograd.grad(y + zero, asked, retain_graph=True) for y in (ours, theirs)))


@pytest.mark.parametrize("name", OP_CALLS)
def test_derivatives_that_registered_ops_lack_are_refused(name, device):
    call, _, tensors = _op_calls(device)[name]
    leaves = [t.detach().requires_grad_() for t in tensors]
    (grad,) = torch.autograd.grad(sum(y.sin().sum() for y in tree_leaves(call(*leaves))), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"llama_kernels.\w+: double backward"):
        torch.autograd.grad(grad.sum(), leaves)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"llama_kernels.\w+: forward-mode"):
        call(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=r"ops.llama_kernels.\w+: torch.func does not differentiate the op"):
            transform(lambda x: tree_leaves(call(x, *tensors[1:]))[0].sum())(tensors[0])


WITHOUT_GRADIENT = [name for name in REGISTERED if "backward" in name or name in ("rope, in place", "rope_into_cache")]


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_registered_ops_without_a_gradient_are_refused(name, device):
    op, args = registered(name, device)
    floating = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    before = [args[i].clone() for i in floating]
    for i in floating:
        leaf = args[i].detach().clone().requires_grad_()
        wanted = f"llama_kernels.{op.__name__}: {op.default._schema.arguments[i].name} is a tensor that requires grad"
        with pytest.raises(ValueError, match=wanted):
            op(*args[:i], leaf, *args[i + 1 :])
    for i, x in zip(floating, before, strict=True):
        assert torch.equal(args[i], x), "it ran all the same"


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
    importlib.import_module("llama_kernels.ops.attention.masked_decode")
    q, kv, visible = torch.randn(1, 2, 1, 16, device=device), torch.randn(1, 2, 8, 16, device=device), torch.ones(1, 8)
    args = (kv, kv, visible.bool().to(device), None, None, None, 0.25, None)
    with pytest.raises(ValueError, match=r"llama_kernels.decode_attention: q is a tensor that requires grad"):
        ops.decode_attention(q.requires_grad_(), *args)
    said = r"decode_attention: .* It is for inference\.$"
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match=said):
        ops.decode_attention(forward_ad.make_dual(q.detach(), q.detach()), *args)


# --- derivatives that there are not ----------------------------------------------------------------------------------


def _forward_mode(call: Any, x: torch.Tensor) -> dict[str, Any]:
    """Every way to ask for the tangent of `call` at x."""

    def dual():
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(x, x))

    return {
        "jvp": lambda: torch.func.jvp(call, (x,), (x,)),
        "jvp of vmap": lambda: torch.func.jvp(torch.func.vmap(call), (x[None],), (x[None],)),
        "vmap of jvp": lambda: torch.func.vmap(lambda x: torch.func.jvp(call, (x,), (x,)))(x[None]),
        "jacfwd": lambda: torch.func.jacfwd(call)(x),
        "linearize": lambda: torch.func.linearize(call, x),
        "dual number": dual,
    }


@wiring
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_is_refused(op, grad_mode, device):
    """Whichever tensor has the tangent, whether or not the others require grad."""
    call, tensors = differentiable(op, device)
    name = call.op
    for i, x in enumerate(tensors):
        others = [t.detach().requires_grad_(i % 2 == 0) for t in tensors]

        def of_one(x, i=i, others=others):
            return call(lk, *others[:i], x, *others[i + 1 :])

        for way, differentiate in _forward_mode(of_one, x).items():
            with torch.set_grad_enabled(grad_mode), pytest.raises(RuntimeError) as error:
                differentiate()
            assert str(error.value).startswith(f"llama_kernels.{name}: forward-mode"), (way, i, str(error.value))
            assert f"llama_kernels.reference.{name}" in str(error.value)


@pytest.mark.parametrize("op", CALLS)
def test_ops_work_beside_dual_numbers(op, device):
    """Where no tensor has a tangent there is nothing to refuse."""
    call, tensors = differentiable(op, device)
    leaves = [t.detach().requires_grad_() for t in tensors]
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(1), torch.ones(1))
        loss = _loss(call, lk)(*leaves)
    _same(torch.autograd.grad(loss, leaves), torch.autograd.grad(_loss(call, lk)(*leaves), leaves))


def test_forward_mode_is_refused_into_a_cache(device):
    q, caches, angles = (torch.randn(1, 2, 3, 16, device=device), torch.zeros(2, 1, 2, 8, 16, device=device),
                         tables(8, 16, device))  # fmt: skip
    slots = torch.arange(3, device=device)
    for i in range(3):
        tensors = [q, q, q]

        def write(x, i=i, tensors=tensors):
            return lk.rope_into_cache(*tensors[:i], x, *tensors[i + 1 :], *caches, slots, *angles)

        for way, differentiate in _forward_mode(write, q).items():
            if way == "linearize":
                continue  # calls it once without a tangent
            with pytest.raises((RuntimeError, ValueError), match=r"llama_kernels.rope_into_cache: "):
                differentiate()
        with pytest.raises(ValueError, match=r"inside of a torch.func transform"):
            torch.func.grad(lambda x, write=write: write(x).sum())(q)
    assert not caches.any()


DEPENDENT = [
    op for op in CALLS if not op.startswith("rope") or op == "rope_attention"
]  # gradients that depend on inputs


@wiring
@pytest.mark.corpus(56)
@pytest.mark.parametrize("op", CALLS)
def test_double_backward_is_refused(op, device):
    call, tensors = differentiable(op, device)
    name = call.op
    for i in range(len(tensors)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        (grad,) = torch.autograd.grad(_loss(call, lk)(*leaves), leaves[i], create_graph=True)
        for leaf in leaves if op in DEPENDENT else leaves[i : i + 1]:
            with pytest.raises(RuntimeError, match=rf"llama_kernels.{name}: double backward"):
                torch.autograd.grad(grad.sum(), leaf, retain_graph=True)

        def of_one(x, i=i):
            return _loss(call, lk)(*tensors[:i], x, *tensors[i + 1 :])

        with pytest.raises(RuntimeError, match=rf"llama_kernels.{name}: double backward"):
            torch.func.grad(lambda x, of_one=of_one: torch.func.grad(of_one)(x).sum())(tensors[i])
        with pytest.raises(RuntimeError, match=rf"llama_kernels.{name}: forward-mode"):
            torch.func.hessian(of_one)(tensors[i])


@pytest.mark.corpus(56)
@pytest.mark.parametrize("op", DEPENDENT)
def test_double_backward_is_refused_where_the_upstream_gradient_is_constant(op, device):
    """Where once_differentiable would let the second derivative go missing; one tensor at a time requires grad."""
    call, tensors = differentiable(op, device)
    leaves = [tensors[0].detach().requires_grad_(), *tensors[1:]]
    (grad,) = torch.autograd.grad(tree_leaves(call(lk, *leaves))[0].sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"llama_kernels.{op}: double backward"):
        torch.autograd.grad(grad.sum(), leaves[0])


# --- gradients on demand ---------------------------------------------------------------------------------------------


@pytest.mark.corpus(57)
@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in itertools.combinations("qkvs", n)], ids="".join)
def test_only_the_gradients_asked_for(wanted, device, monkeypatch):
    q, k, v = (torch.randn(1, H, 12, 32, device=device) for H in (4, 2, 2))
    t = {"q": q, "k": k, "v": v, "s": torch.randn(4, device=device)}

    def grads(names) -> dict[str, torch.Tensor]:
        leaves = {name: x.detach().requires_grad_(name in names) for name, x in t.items()}
        out = lk.attention(leaves["q"], leaves["k"], leaves["v"], sinks=leaves["s"])
        asked = [leaves[name] for name in names]
        return dict(zip(names, torch.autograd.grad(out, asked, torch.ones_like(out)), strict=True))

    everything = grads("qkvs")
    for name, grad in grads(wanted).items():
        assert torch.equal(grad, everything[name])


@pytest.mark.corpus(57)
def test_what_is_not_asked_for_is_not_computed(device):
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


def test_no_graph_where_no_gradient_is_needed(device):
    q = torch.randn(1, 2, 12, 32, device=device).requires_grad_()
    with torch.no_grad():
        assert lk.attention(q, q, q).grad_fn is None
    assert lk.attention(*(q.detach(),) * 3).grad_fn is None


@pytest.mark.corpus(59)
def test_repeated_backward_over_one_graph(device):
    q, k, v = (torch.randn(1, 2, 12, 32, device=device).requires_grad_() for _ in range(3))
    out = lk.attention(q, k, v)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(a, b)


def test_shapes_are_known_without_data():
    """On the meta device every op gives shapes, dtypes and gradients, as models built there need it."""
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


def test_compiles_the_rotation_of_one_tensor(device):
    """An output that is None has no gradient that torch.compile could handle."""
    q = torch.randn(1, 2, 6, 8, device=device, requires_grad=True)
    cos, sin = tables(6, 8, device)

    def rotate(q):
        return lk.rope(q, None, cos, sin)[0]

    expected, compiled = rotate(q), torch.compile(rotate, backend="aot_eager", fullgraph=True)(q)
    assert torch.equal(compiled, expected)
    dy = torch.randn_like(q)
    assert torch.equal(*(torch.autograd.grad(y, q, dy)[0] for y in (compiled, expected)))
