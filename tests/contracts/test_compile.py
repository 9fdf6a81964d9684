"""Every op in torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import llama_kernels as lk
from tests.support.derivatives import (
    assert_same,
    differentiable,
    layer,
    layer_inputs,
    loss_of,
    not_interpreted,
    with_grads,
)
from tests.support.ops import CALLS, Call, Make, Shape, calls
from tests.support.rope import tables


@not_interpreted
@pytest.mark.corpus(63)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_layer_of_every_op_compiles_without_graph_breaks(backend, dynamic, device):
    torch._dynamo.reset()
    t, (cos, sin) = layer_inputs(device), tables(12, 32, device)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for a, b in zip(with_grads(compiled, t, cos, sin), with_grads(layer, t, cos, sin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_packed_attention_compiles_where_q_and_k_share_their_bounds(device):
    """Dynamo refuses an autograd.Function that is given one tensor twice, as self-attention gives the bounds."""
    torch._dynamo.reset()
    q, k, v = (torch.randn(20, H, 32, device=device).requires_grad_() for H in (4, 2, 2))
    cu = torch.tensor([0, 7, 20], dtype=torch.int32, device=device)

    def loss(q, k, v, cu):
        return lk.attention_varlen(q, k, v, cu, cu, 13, 13).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, cu), loss(q, k, v, cu))
    assert torch.equal(torch.compile(lk.attention, fullgraph=True, backend="aot_eager")(*(q[None],) * 3),
                       lk.attention(*(q[None],) * 3))  # fmt: skip


@not_interpreted
def test_sizes_without_values_do_not_break_the_graph(device):
    """Lengths that depend on data, as after x[mask], are symbols about which a trace must not ask."""
    torch._dynamo.reset()
    cos, sin = tables(40, 32, device)

    def step(x, keep, weight, longest):
        x = lk.rms_norm(x[keep], weight)  # (tokens, 4, 32)
        q, k = lk.rope(x, x[:, :2], cos, sin)
        length = longest.item()
        cu = torch.stack((torch.zeros_like(longest), longest))
        dense = lk.attention(*(t.transpose(0, 1)[None] for t in (q, k, x[:, :2])))
        return lk.attention_varlen(q, k, x[:, :2], cu, cu, length, length), dense[0].transpose(0, 1)

    x, weight = torch.randn(20, 4, 32, device=device), torch.randn(32, device=device)
    keep = torch.arange(20, device=device) % 3 > 0
    longest = keep.sum().int()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, keep, weight, longest)
    for ours, theirs in zip(compiled, step(x, keep, weight, longest), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_place_rotation_compiles(device):
    torch._dynamo.reset()
    t, (cos, sin) = layer_inputs(device), tables(12, 32, device)

    def rotated(leaves, cos, sin):
        q, k = lk.rope(leaves["q"] * 1, leaves["k"] * 1, cos, sin, inplace=True)
        return (q.square() * leaves["v"].mean()).sum() + k.exp().sum()

    qkv = {name: t[name] for name in ("q", "k", "v")}
    compiled = torch.compile(rotated, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_grads(compiled, qkv, cos, sin), with_grads(rotated, qkv, cos, sin), strict=True):
        torch.testing.assert_close(a, b)


def test_rope_into_cache_compiles(device):
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, H, 1, 32, device=device) for H in (4, 2, 2))
    slot, angles = torch.tensor([7], device=device), tables(12, 32, device)

    def step(caches):
        return lk.rope_into_cache(q, k, v, *caches, slot, *angles) * 2

    eager, compiled = ([torch.zeros(2, 2, 12, 32, device=device) for _ in range(2)] for _ in range(2))
    with torch.no_grad():
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(compiled), step(eager))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(eager, compiled, strict=True))


def test_rotation_of_q_alone_compiles(device):
    """An output that is None has no gradient that torch.compile could handle."""
    q = torch.randn(1, 2, 6, 8, device=device, requires_grad=True)
    cos, sin = tables(6, 8, device)

    def rotate(q):
        return lk.rope(q, None, cos, sin)[0]

    expected, compiled = rotate(q), torch.compile(rotate, backend="aot_eager", fullgraph=True)(q)
    assert torch.equal(compiled, expected)
    dy = torch.randn_like(q)
    assert torch.equal(*(torch.autograd.grad(y, q, dy)[0] for y in (compiled, expected)))


# --- exported graphs -------------------------------------------------------------------------------------------------


def test_exported_graphs_hold_the_registered_ops(device):
    class Block(torch.nn.Module):
        def forward(self, q, k, v, cos, sin):
            q, k = lk.rope(q, k, cos, sin)
            return lk.rms_norm(lk.attention(q, k, v))

    t, (cos, sin) = layer_inputs(device), tables(12, 32, device)
    with torch.no_grad():
        program = torch.export.export(Block(), (t["q"], t["k"], t["v"], cos, sin))
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert {f"llama_kernels.{op}.default" for op in ("rope", "attention_forward", "rms_norm_forward")} <= names
        args = (t["q"], t["k"], t["v"], cos, sin)
        torch.testing.assert_close(program.module()(*args), Block()(*args))


@not_interpreted
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_every_op_exports_with_a_dynamic_length(strict, device):
    """No check, stride or cache of the package restricts the length more than the user did."""
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


class Module(torch.nn.Module):
    """A call by lk whose tensors are parameters, times `scale`."""

    def __init__(self, call: Call, tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.call, self.tensors = call, torch.nn.ParameterList(t.clone() for t in tensors)

    def forward(self, scale):
        return tuple(tree_leaves(self.call(lk, *[t * scale for t in self.tensors])))


def gradients(module: torch.nn.Module, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss_of(module(scale)), list(module.parameters()))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=not_interpreted)], ids=["traced", "strict"])
@pytest.mark.parametrize("op", CALLS)
def test_exported_modules_have_gradients(op, strict, device):
    """An exported graph holds the registered ops alone, and not the autograd.Function around them."""
    module, scale = Module(*differentiable(op, device)), torch.ones((), device=device)
    exported = torch.export.export(module, (scale,), strict=strict).module()
    assert_same(gradients(exported, scale), expected := gradients(module, scale))
    assert all(grad.any() for grad in expected)


@pytest.mark.parametrize("op", ["rms_norm", "rope", "attention"])
def test_exported_modules_compile(op, device):
    torch._dynamo.reset()
    module, scale = Module(*differentiable(op, device)), torch.ones((), device=device)
    exported = torch.export.export(module, (scale,)).module()
    assert_same(gradients(torch.compile(exported, backend="aot_eager"), scale), gradients(module, scale))


@pytest.mark.parametrize("op", ["add_rms_norm", "qk_norm_rope", "rope", "rope_attention"])
def test_double_backward_through_an_exported_module(op, device):
    module, scale = Module(*differentiable(op, device)), torch.ones((), device=device)
    exported = torch.export.export(module, (scale,)).module()
    (grad,) = torch.autograd.grad(loss_of(exported(scale)), [*exported.parameters()][:1], create_graph=True)
    leaves = list(exported.parameters())
    if op != "rope_attention":
        (expected,) = torch.autograd.grad(loss_of(module(scale)), [*module.parameters()][:1], create_graph=True)
        options = {"allow_unused": True, "materialize_grads": True}
        second = torch.autograd.grad(grad.sum(), leaves, **options)
        assert_same(second, torch.autograd.grad(expected.sum(), [*module.parameters()], **options))
        return
    with pytest.raises(RuntimeError, match=r"llama_kernels.\w+: double backward"):
        torch.autograd.grad(grad.sum(), leaves)
