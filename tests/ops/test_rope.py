"""RoPE: outputs and gradients against float64, with every form of tables, positions and layouts."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llama_kernels as lk
from llama_kernels.core.registry import KERNELS
from tests.support.environment import compiles
from tests.support.ideal import eager_rope
from tests.support.judge import DTYPES, judge
from tests.support.rope import (
    LAYOUTS,
    POSITIONS,
    SLOTS,
    TABLE_DTYPES,
    TABLE_LAYOUTS,
    check,
    check_a_packed_projection,
    check_into_a_cache,
    packed,
    qk,
    split,
    tables,
    unlike_tables,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", [(2, 2), (16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256),
                                  (64, 32), (80, 20), (128, 96), (5, 4)])  # fmt: skip
def test_heads_of_any_width_rotated_in_full_or_in_part(D, R, interleaved, dtype, device):
    q, k = qk(2, 4, 2, 13, D, dtype, device)
    check(q, k, *tables(13, R, device), interleaved=interleaved)


@pytest.mark.corpus(17)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("Hq, Hkv", [(1, 1), (3, 3), (8, 1), (32, 8), (7, 5)])
def test_any_number_of_query_and_key_heads(Hq, Hkv, inplace, device):
    q, k = qk(1, Hq, Hkv, 37, 64, torch.bfloat16, device)
    check(q, k, *tables(40, 64, device), inplace=inplace)


@pytest.mark.corpus(52)
@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("form", POSITIONS)
def test_position_ids_of_every_shape_and_integer_dtype(form, integer, device):
    q, k = qk(2, 4, 2, 13, 64, torch.float16, device)
    check(q, k, *tables(60, 64, device), POSITIONS[form](2, 13).to(integer).to(device))


@pytest.mark.corpus(53)
@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_packed_tokens_with_and_without_position_ids(given, device):
    q, k = (x[0].transpose(0, 1) for x in qk(1, 4, 2, 50, 64, torch.bfloat16, device))
    position_ids = torch.cat((torch.arange(20), torch.arange(30))).to(device) if given else None
    check(q, k, *tables(50, 64, device), position_ids)


@pytest.mark.corpus(52)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_tables_with_a_row_for_each_token(table_dtype, batch, device):
    q, k = qk(2, 4, 2, 13, 64, torch.float16, device)
    cos, sin = (table.to(table_dtype) for table in tables(26, 64, device))
    cos, sin = (table[: 13 * batch].unflatten(0, (batch, 13)) for table in (cos, sin))
    check(q, k, cos, sin)
    doubled = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)  # as Hugging Face has them
    check(q, k, *(table[..., :32] for table in doubled))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", [(2, 2), (64, 64), (80, 80), (128, 96), (64, 34), (5, 4)])
def test_tables_with_an_angle_for_each_element(D, R, interleaved, dtype, device):
    q, k = qk(2, 4, 2, 13, D, dtype, device)
    check(q, k, *unlike_tables(13, R, device), interleaved=interleaved)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("R", [32, 48, 64])
@pytest.mark.parametrize("table_dtype", TABLE_DTYPES, ids=str)
def test_tables_of_every_dtype(table_dtype, R, interleaved, inplace, device):
    """32 entries are an angle a pair, more are an angle an element."""
    q, k = qk(2, 4, 2, 13, 64, torch.float32, device)
    position_ids = torch.randint(0, 20, (2, 13), device=device)
    angles = unlike_tables(20, R, device, table_dtype)
    check(q, k, *angles, position_ids, interleaved=interleaved, inplace=inplace)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("R", [32, 64])
@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
def test_tables_of_any_strides(layout, R, interleaved, device):
    q, k = qk(2, 4, 2, 13, 64, torch.bfloat16, device)
    cos, sin = (TABLE_LAYOUTS[layout](table) for table in unlike_tables(40, R, device, torch.bfloat16))
    check(q, k, cos, sin, interleaved=interleaved)


def test_cos_and_sin_of_different_strides(device):
    q, k = qk(2, 4, 2, 13, 64, torch.float16, device)
    cos, sin = unlike_tables(13, 64, device)
    check(q, k, cos, TABLE_LAYOUTS["columns first"](sin))


def test_full_width_tables_equal_half_width_tables_where_pairs_agree(device):
    q, k = (x.requires_grad_() for x in qk(2, 4, 2, 13, 64, torch.bfloat16, device))
    dys = [torch.randn_like(x) for x in (q, k)]
    for interleaved in (False, True):
        half = tables(13, 64, device)
        full = [t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in half]
        results = []
        for angles in (half, full):
            outs = lk.rope(q, k, *angles, interleaved=interleaved)
            results.append((*outs, *torch.autograd.grad(outs, (q, k), dys)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tables_as_transformers_makes_them(device):
    """Llama's rotary embedding and apply_rotary_pos_emb: in float64 the truth, in float32 the ideal."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64)
    q, k = (x.requires_grad_() for x in qk(2, 4, 2, 13, 64, torch.float32, device))
    dys = [torch.randn_like(x) for x in (q, k)]
    positions = torch.stack((torch.arange(13), torch.arange(100, 113))).to(device)
    cos, sin = llama.LlamaRotaryEmbedding(config).to(device)(q, positions)
    assert cos.shape == (2, 13, 64)
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    truth = llama.apply_rotary_pos_emb(*wide, cos.double(), sin.double())
    stock, ours = llama.apply_rotary_pos_emb(q, k, cos, sin), lk.rope(q, k, cos, sin)
    grads = [torch.autograd.grad(outs, (q, k), dys) for outs in (ours, stock)]
    wide_grads = torch.autograd.grad(truth, wide, [dy.double() for dy in dys])
    for name, K, R, I in zip(
        ("q", "k", "dq", "dk"), (*ours, *grads[0]), (*truth, *wide_grads), (*stock, *grads[1]), strict=True
    ):
        judge(name, K, R, I)


class Called(TorchDispatchMode):
    """The operations that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("R", [32, 64])
@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
def test_tables_reach_the_ops_as_they_are(layout, R, device):
    """No copy and no conversion, forward or backward: only ops of the package are called."""
    q, k = (x.requires_grad_() for x in qk(2, 4, 2, 13, 64, torch.float32, device))
    qkv = packed((2, 13), 4, 2, 64, torch.float32, device).requires_grad_()
    angles = [TABLE_LAYOUTS[layout](table) for table in unlike_tables(40, R, device, torch.bfloat16)]
    caches = torch.zeros(2, 2, 2, 20, 64, device=device).unbind()
    slots = torch.arange(13, device=device)
    dys = [torch.randn_like(x) for x in (q, k)]
    with Called() as called:
        torch.autograd.grad(lk.rope(q, k, *angles), (q, k), dys)
        torch.autograd.grad(lk.qk_norm_rope(q, k, None, None, *angles), (q, k), dys)
        lk.rope_qkv(qkv, 4, 2, *angles)
        torch.autograd.grad(lk.rope_attention(q, k, k.detach(), *angles), (q, k), dys[0])
        with torch.no_grad():
            lk.rope_into_cache(q, k, k, *caches, slots, *angles)
    views = {"aten.view.default", "aten.transpose.int", "aten.slice.Tensor", "aten.detach.default"}
    ours = {name for name in called.names if name.startswith("llama_kernels.")}
    assert len(ours) == 6 and called.names - ours <= views


@compiles
@pytest.mark.parametrize("R", [32, 64])
@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
def test_launchers_take_tables_as_they_are(layout, R):
    """Around the launches the ops allocate results, and nothing else runs on the device."""
    from triton.runtime.jit import JITFunction

    device = torch.device("cpu")
    q, k = qk(2, 4, 2, 13, 64, torch.float32, device)
    angles = [TABLE_LAYOUTS[layout](table) for table in unlike_tables(40, R, device, torch.bfloat16)]
    launched: list[Any] = []
    with mock.patch.object(JITFunction, "run", lambda self, *args, **_: launched.append(args)), Called() as called:
        KERNELS["rope"](q, k, *angles, None, False, False)
        KERNELS["rope"](q, k, *angles, None, True, True)
        KERNELS["qk_norm_rope"](q, k, None, None, *angles, None, 1e-6, 0.0, False)
        KERNELS["qk_norm_rope_backward"](q, k, q, k, None, None, *angles, None, 1e-6, 0.0, False, False)
    assert called.names <= {"aten.new_empty_strided.default", "aten.new_empty.default"}
    assert len(launched) == 4
    for args in launched:
        assert all(any(x is table for x in args) for table in angles)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_k_may_be_none(inplace, device):
    q, _ = qk(2, 4, 2, 13, 64, torch.bfloat16, device)
    check(q, None, *tables(13, 64, device), inplace=inplace)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_strides(layout, interleaved, device):
    q, k = (LAYOUTS[layout](x) for x in qk(2, 4, 2, 13, 64, torch.float16, device))
    outs = lk.rope(q, k, *tables(13, 64, device), interleaved=interleaved)
    truth = lk.reference.rope(q.double(), k.double(), *tables(13, 64, device), interleaved=interleaved)
    ideal = [eager_rope(x.float(), *tables(13, 64, device), interleaved).half() for x in (q, k)]
    for x, K, R, I in zip((q, k), outs, truth, ideal, strict=True):
        judge(layout, K, R, I)
        assert sorted(range(4), key=x.stride) == sorted(range(4), key=K.stride)


@pytest.mark.corpus(50)
def test_in_place_inside_a_packed_projection(device):
    """q and k are rotated in their memory. v, between them in memory, stays as it is."""
    qkv = torch.randn(2, 13, 8, 64, device=device)
    before = qkv.clone()
    q, k = qkv[:, :, :4].transpose(1, 2), qkv[:, :, 4:6].transpose(1, 2)
    truth = lk.reference.rope(q.double(), k.double(), *tables(13, 64, device))
    lk.rope(q, k, *tables(13, 64, device), inplace=True)
    for x, R in zip((q, k), truth, strict=True):
        torch.testing.assert_close(x.double(), R, rtol=0, atol=1e-6)
    assert torch.equal(qkv[:, :, 6:], before[:, :, 6:])


def test_in_place_backward_reaches_the_projection(device):
    x = torch.randn(2, 13, 6, 64, device=device, requires_grad=True)
    upstream = [torch.randn(2, H, 13, 64, device=device) for H in (4, 2)]

    def gradient(inplace: bool) -> torch.Tensor:
        qkv = x * 1
        q, k = qkv[:, :, :4].transpose(1, 2), qkv[:, :, 4:].transpose(1, 2)
        return torch.autograd.grad(lk.rope(q, k, *tables(13, 64, device), inplace=inplace), x, upstream)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_the_backward_is_the_inverse_rotation(device):
    """The transpose of a rotation is its inverse."""
    q = torch.randn(1, 2, 13, 64, device=device, requires_grad=True)
    out, _ = lk.rope(q, None, *tables(13, 64, device))
    (dq,) = torch.autograd.grad(out, q, out.detach())
    torch.testing.assert_close(dq, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("make", [tables, unlike_tables])
def test_the_tangent_is_the_rotated_tangent_bit_for_bit(make, interleaved, device):
    q, k = qk(2, 4, 2, 13, 64, torch.bfloat16, device)
    angles, tangents = make(13, 64, device), tuple(map(torch.randn_like, (q, k)))
    _, results = torch.func.jvp(lambda q, k: lk.rope(q, k, *angles, interleaved=interleaved), (q, k), tangents)
    for a, b in zip(results, lk.rope(*tangents, *angles, interleaved=interleaved), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shapes", [((0, 4, 7, 8), (0, 2, 7, 8)), ((2, 4, 0, 8), (2, 2, 0, 8)), ((0, 4, 8), (0, 2, 8)),
                                    ((2, 4, 7, 8), (2, 0, 7, 8)), ((2, 0, 7, 8), (2, 2, 7, 8))], ids=str)  # fmt: skip
def test_empty_inputs_give_empty_outputs(shapes, device):
    q, k = (torch.randn(shape, device=device).requires_grad_() for shape in shapes)
    outs = lk.rope(q, k, *tables(7, 8, device))
    grads = torch.autograd.grad(outs, (q, k), [torch.ones_like(x) for x in outs])
    assert [x.shape for x in (*outs, *grads)] == [q.shape, k.shape] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_worse_than_eager(dtype, device):
    q, k = qk(2, 4, 2, 40, 64, dtype, device)
    check(q, k, *tables(40, 64, device), eager=True)


def test_large_positions_keep_their_angle(device):
    """At position 131071 float32 holds the angle to a hundredth; bfloat16 would hold it to 512."""
    position = 131071
    inv_freq, _ = lk.rope_frequencies(64, base=500000.0)
    cos, sin = lk.rope_tables(inv_freq.to(device), position + 1)
    q = torch.ones(1, 1, 1, 64, device=device)
    out, _ = lk.rope(q, None, cos, sin, torch.tensor([position], device=device))
    angles = [position * 500000.0 ** (-2 * i / 64) for i in range(32)]
    expected = [math.cos(a) - math.sin(a) for a in angles] + [math.cos(a) + math.sin(a) for a in angles]
    torch.testing.assert_close(out.flatten().cpu(), torch.tensor(expected), rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("tokens, Hq, Hkv, D, R", [
    ((2, 13), 4, 2, 64, 64), ((50,), 4, 2, 64, 64), ((1, 7), 8, 1, 80, 20), ((2, 5), 3, 3, 128, 128),
    ((2, 5), 7, 5, 5, 4),
])  # fmt: skip
def test_a_packed_projection_of_q_k_and_v(tokens, Hq, Hkv, D, R, interleaved, dtype, device):
    check_a_packed_projection(tokens, Hq, Hkv, D, R, interleaved, dtype, device)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("make", [tables, unlike_tables])
def test_a_packed_projection_is_the_separate_calls_bit_for_bit(make, interleaved, device):
    qkv = packed((2, 13), 4, 2, 64, torch.bfloat16, device).requires_grad_()
    angles = make(13, 64, device)
    together = lk.rope_qkv(qkv, 4, 2, *angles, interleaved=interleaved)
    q, k, v = split(qkv, 4, 2, 64)
    apart = (*lk.rope(q, k, *angles, interleaved=interleaved), v)
    dys = [torch.randn_like(x) for x in apart]
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.autograd.grad(together, qkv, dys)[0], torch.autograd.grad(apart, qkv, dys)[0])


@pytest.mark.parametrize("used", ["q", "k", "v", "qv"])
def test_gradients_where_a_part_of_a_packed_projection_is_used(used, device):
    qkv = packed((2, 13), 4, 2, 64, torch.float32, device).requires_grad_()
    angles = tables(13, 64, device)
    dys = {name: torch.randn(2, H, 13, 64, device=device) for name, H in (("q", 4), ("k", 2), ("v", 2)) if name in used}

    def grad(ops) -> torch.Tensor:
        outs = dict(zip("qkv", ops.rope_qkv(qkv, 4, 2, *angles), strict=True))
        return torch.autograd.grad([outs[name] for name in dys], qkv, list(dys.values()))[0]

    torch.testing.assert_close(grad(lk), grad(lk.reference))


@pytest.mark.parametrize("tokens", [(0, 7), (2, 0), (0,)], ids=str)
def test_an_empty_packed_projection(tokens, device):
    qkv = packed(tokens, 4, 2, 8, torch.float32, device).requires_grad_()
    outs = lk.rope_qkv(qkv, 4, 2, *tables(7, 8, device))
    (dqkv,) = torch.autograd.grad(outs, qkv, [torch.ones_like(x) for x in outs])
    assert dqkv.shape == qkv.shape


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("order", ["heads first", "tokens first"])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("make", [tables, unlike_tables])
def test_rotated_keys_and_values_are_written_into_a_cache(make, slots, order, interleaved, device):
    check_into_a_cache(make, slots, order, interleaved, device)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("make", [tables, unlike_tables])
def test_keys_with_several_positions_are_written_into_a_cache(make, interleaved, device):
    check_into_a_cache(make, "some outside", "tokens first", interleaved, device, A=3)


@pytest.mark.parametrize("a_row_a_token", [False, True])
def test_positions_are_the_cache_positions_where_none_are_given(a_row_a_token, device):
    """A table is read at the cache position. Tables with a row for each token are read by token."""
    q, k = qk(2, 4, 2, 1, 64, torch.float32, device)
    v, slots, angles = torch.randn_like(k), torch.tensor([7], device=device), tables(12, 64, device)
    cache = torch.zeros(2, 2, 12, 64, device=device)
    given = [x[None, 7:8] for x in angles] if a_row_a_token else angles
    out = lk.rope_into_cache(q, k, v, cache, torch.zeros_like(cache), slots, *given)
    q_, k_ = lk.rope(q, k, *angles, slots)
    assert torch.equal(out, q_) and torch.equal(cache[:, :, 7:8], k_)
