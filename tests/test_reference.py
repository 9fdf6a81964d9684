"""The specification itself: its gradients by gradcheck, its numbers by code that others wrote, all in float64.

Every kernel is judged against `llama_kernels.reference`, so here nothing of ours stands on the other side: PyTorch's
operators, Hugging Face's modelling code, complex multiplication as Meta wrote it, and sums written out.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import llama_kernels as lk

ref = lk.reference


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [normal(*shape).requires_grad_() for shape in shapes]


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def assert_same(actual: Any, expected: Any) -> None:
    """But for float64's own rounding, 1e-16 an operation on numbers of size one."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@contextlib.contextmanager
def float32_means_float64() -> Iterator[None]:
    """Hugging Face's code computes in float32 in places, by that name; inside here it does so in float64."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def test_signatures_are_those_of_the_ops():
    for name in ref.__all__:
        theirs, ours = (inspect.signature(getattr(module, name)).parameters for module in (ref, lk))
        assert [(p.name, p.kind, p.default) for p in theirs.values()] == [
            (p.name, p.kind, p.default) for p in ours.values()
        ]


# --- RoPE ------------------------------------------------------------------------------------------------------------


def angles(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Any angles will do: rows of a table or of a token."""
    theta = math.pi * normal(*shape)
    return theta.cos(), theta.sin()


# q, k, the tables, position_ids. B = 2, Hq = 2, Hkv = 1, S = 3, D = 6; T = 4 packed.
ROPE = {
    "counted": ((2, 2, 3, 6), (2, 1, 3, 6), (3, 3), None),
    "longer table": ((2, 2, 3, 6), (2, 1, 3, 6), (7, 3), None),
    "partial": ((2, 2, 3, 6), (2, 1, 3, 6), (3, 2), None),
    "positions for all": ((2, 2, 3, 6), (2, 1, 3, 6), (5, 3), torch.tensor([4, 0, 4])),
    "positions, batch of one": ((2, 2, 3, 6), (2, 1, 3, 6), (5, 3), torch.tensor([[4, 0, 4]])),
    "positions of each": ((2, 2, 3, 6), (2, 1, 3, 6), (5, 3), torch.tensor([[4, 0, 4], [1, 2, 3]], dtype=torch.uint8)),
    "a row a token": ((2, 2, 3, 6), (2, 1, 3, 6), (2, 3, 3), None),
    "a row a token, batch of one": ((2, 2, 3, 6), (2, 1, 3, 6), (1, 3, 3), None),
    "packed": ((4, 2, 6), (4, 1, 6), (4, 3), None),
    "packed, positions": ((4, 2, 6), (4, 1, 6), (3, 2), torch.tensor([0, 1, 0, 2])),
}  # fmt: skip
rope_cases = pytest.mark.parametrize("q, k, table, position_ids", ROPE.values(), ids=ROPE)
pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


@pairings
@rope_cases
def test_gradients_of_rope(q, k, table, position_ids, interleaved):
    """Of the angles too: the reference is what one trains them with."""

    def rotate(q, k, cos, sin):
        return ref.rope(q, k, cos, sin, position_ids, interleaved=interleaved)

    assert torch.autograd.gradcheck(rotate, leaves(q, k, table, table))


@pairings
@rope_cases
def test_rope_is_complex_multiplication(q, k, table, position_ids, interleaved):
    """Pairs as complex numbers times e^{i m theta}, as Meta's apply_rotary_emb has it."""
    q, k, (cos, sin) = normal(*q), normal(*k), angles(*table)
    R = 2 * table[-1]
    turns = torch.complex(cos, sin)
    if turns.ndim == 2:
        turns = turns[: q.shape[-2 if q.ndim == 4 else 0]] if position_ids is None else turns[position_ids.long()]
    if q.ndim == 4:
        turns = turns.expand(2, -1, -1)  # (B, S, R/2)
    for x, out in zip((q, k), ref.rope(q, k, cos, sin, position_ids, interleaved=interleaved), strict=True):
        x_ = x if x.ndim == 3 else x.transpose(1, 2)  # Meta's layout, heads behind tokens
        pairs = x_[..., :R].unflatten(-1, (-1, 2)) if interleaved else x_[..., :R].unflatten(-1, (2, -1)).mT
        pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns.unsqueeze(-2))
        expected = torch.cat(((pairs if interleaved else pairs.mT).flatten(-2), x_[..., R:]), -1)
        assert_same(out, expected if x.ndim == 3 else expected.transpose(1, 2))


@pytest.mark.parametrize("R", [6, 4], ids=["whole", "partial"])
def test_rope_is_hugging_face_s(R):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, (cos, sin) = normal(2, 2, 3, 6), normal(2, 1, 3, 6), angles(2, 3, R // 2)
    twice = [torch.cat((x, x), -1) for x in (cos, sin)]
    turned = modeling.apply_rotary_pos_emb(q[..., :R], k[..., :R], *twice)
    expected = [torch.cat((y, x[..., R:]), -1) for x, y in zip((q, k), turned, strict=True)]
    assert_same(list(ref.rope(q, k, cos, sin)), expected)


def test_the_pairings_differ_by_a_permutation_alone():
    """The one that Hugging Face's conversion script applies to Meta's weights."""
    q, (cos, sin) = normal(2, 2, 3, 6), angles(3, 3)
    order = [0, 2, 4, 1, 3, 5]
    half, _ = ref.rope(q[..., order], None, cos, sin)
    interleaved, _ = ref.rope(q, None, cos, sin, interleaved=True)
    assert torch.equal(half, interleaved[..., order])


def test_rope_out_of_the_table_takes_its_ends():
    q, (cos, sin) = normal(1, 2, 4, 6), angles(5, 3)
    wild, tame = torch.tensor([-1, 5, 2**62, -(2**62)]), torch.tensor([0, 4, 4, 0])
    assert torch.equal(ref.rope(q, None, cos, sin, wild)[0], ref.rope(q, None, cos, sin, tame)[0])


def test_rope_in_place_writes_the_same_into_its_arguments():
    x, y = leaves((2, 2, 3, 6), (2, 1, 3, 6))
    cos, sin = angles(3, 3)
    expected = ref.rope(x, y, cos, sin)
    q, k = x * 1, y * 1
    out = ref.rope(q, k, cos, sin, inplace=True)
    assert out[0] is q and out[1] is k
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    upstream = [torch.randn_like(t) for t in expected]
    assert_same(torch.autograd.grad(out, (x, y), upstream), torch.autograd.grad(expected, (x, y), upstream))


# --- RMSNorm ---------------------------------------------------------------------------------------------------------

weightings = pytest.mark.parametrize("offset", [None, 0.0, 1.0], ids=["bare", "weight", "offset"])
SHAPE, EPS = (2, 3, 5), 1e-2


@weightings
def test_gradients_of_rms_norm(offset):
    weight = [] if offset is None else leaves((5,))

    def norm(x, weight=None):
        return ref.rms_norm(x, weight, EPS, offset=offset or 0.0)

    assert torch.autograd.gradcheck(norm, (*leaves(SHAPE), *weight))


@weightings
def test_gradients_of_add_rms_norm(offset):
    weight = [] if offset is None else leaves((5,))

    def norm(x, residual, weight=None):
        return ref.add_rms_norm(x, residual, weight, EPS, offset=offset or 0.0)

    assert torch.autograd.gradcheck(norm, (*leaves(SHAPE, SHAPE), *weight))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
@weightings
def test_rms_norm_is_torch_s(offset, eps):
    x = normal(*SHAPE)
    weight = None if offset is None else normal(5)
    scale = None if offset is None else offset + weight
    assert_same(ref.rms_norm(x, weight, eps, offset=offset or 0.0), F.rms_norm(x, (5,), scale, eps))


def test_rms_norm_is_llama_s():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs = modeling.LlamaRMSNorm(5, EPS).double()
    torch.nn.init.normal_(theirs.weight)
    x = normal(*SHAPE)
    with float32_means_float64():
        expected = theirs(x)
    assert_same(ref.rms_norm(x, theirs.weight, EPS), expected)


def test_rms_norm_with_offset_one_is_gemma_s():
    modeling = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    theirs = modeling.GemmaRMSNorm(5, EPS).double()
    torch.nn.init.normal_(theirs.weight)
    x = normal(*SHAPE)
    with float32_means_float64():
        expected = theirs(x)
    assert_same(ref.rms_norm(x, theirs.weight, EPS, offset=1.0), expected)


@pytest.mark.parametrize("residual_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_add_rms_norm_is_an_add_and_a_norm(residual_dtype):
    """The sum is rounded to the residual's dtype first, and what was rounded is what is normalised."""
    x, residual, weight = normal(*SHAPE), normal(*SHAPE).to(residual_dtype), normal(5)
    y, residual_out = ref.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual_out, (x + residual.double()).to(residual_dtype))
    assert y.dtype == torch.float64
    # Narrow residuals are normalised in float32, whose rounding is 6e-8 an operation.
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 1e-6}[residual_dtype]
    torch.testing.assert_close(y, F.rms_norm(residual_out.double(), (5,), weight, EPS), rtol=tolerance, atol=0)


# --- attention -------------------------------------------------------------------------------------------------------


def qkv(B=1, Hq=2, Hkv=1, Sq=3, Sk=3, D=2, Dv=2) -> list[torch.Tensor]:
    return leaves((B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv))


# Sizes, then options. "no key": some rows see none.
ATTENTION: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "causal": ({}, {}),
    "full": ({}, {"is_causal": False}),
    "one head each": ({"Hq": 2, "Hkv": 2}, {}),
    "groups": ({"B": 2, "Hq": 6, "Hkv": 2}, {}),
    "more keys": ({"Sk": 5}, {}),
    "one query": ({"Sq": 1, "Sk": 5}, {}),
    "fewer keys, full": ({"Sq": 5}, {"is_causal": False}),
    "fewer keys, no key": ({"Sq": 5}, {}),
    "wide values": ({"D": 1, "Dv": 3}, {}),
    "scale": ({}, {"scale": -0.7}),
    "window": ({"Sq": 5, "Sk": 5}, {"window_size": (1, -1)}),
    "window of both sides": ({"Sq": 5, "Sk": 5}, {"is_causal": False, "window_size": (2, 1)}),
    "window to the right": ({"Sq": 4, "Sk": 6}, {"is_causal": False, "window_size": (-1, 1)}),
    "causal cuts the right side": ({"Sq": 4, "Sk": 4}, {"window_size": (2, 3)}),
    "softcap": ({}, {"softcap": 0.8}),
    "kv_start": ({"B": 2, "Sk": 4}, {"kv_start": int32([0, 1, 2], [1, 1, 3])}),
    "kv_start, no key": ({"B": 2, "Sk": 4}, {"kv_start": int32([0, 4, -3], [9, 1, 3])}),
    "all": (
        {"B": 2, "Hq": 4, "Hkv": 2, "Sk": 5, "Dv": 3},
        {"scale": 0.9, "window_size": (2, 1), "softcap": 1.1, "kv_start": int32([0, 1, 2], [1, 0, 3])},
    ),
}
attention_cases = pytest.mark.parametrize("sizes, options", ATTENTION.values(), ids=ATTENTION)
sink_cases = pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])


def with_lse(function: Any, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, whose -inf, which no difference quotient can take, is 0."""
    out, lse = function(*args, return_lse=True, **options)
    return out, lse.masked_fill(lse == -math.inf, 0)


@sink_cases
@attention_cases
def test_gradients_of_attention(sizes, options, with_sinks):
    inputs = qkv(**sizes)
    inputs += leaves((inputs[0].shape[1],)) if with_sinks else []

    def attend(q, k, v, sinks=None):
        return with_lse(ref.attention, q, k, v, sinks=sinks, **options)

    assert torch.autograd.gradcheck(attend, inputs)


def test_second_derivatives():
    q, k, v, sinks = *qkv(Sq=2, Sk=3), *leaves((2,))
    assert torch.autograd.gradgradcheck(
        lambda *qkvs: ref.attention(*qkvs[:3], sinks=qkvs[3], softcap=0.8, return_lse=True), (q, k, v, sinks)
    )
    assert torch.autograd.gradgradcheck(lambda *xrw: ref.add_rms_norm(*xrw, EPS), leaves((2, 3), (2, 3), (3,)))
    assert torch.autograd.gradgradcheck(lambda *qkcs: ref.rope(*qkcs), leaves((2, 1, 4), (2, 1, 4), (2, 2), (2, 2)))


def mask_of(q: torch.Tensor, k: torch.Tensor, *, is_causal=True, window_size=(-1, -1), kv_start=None, **_: Any):
    """Diagonals of a matrix: torch.tril and triu count them from the top left, the ends meet at the bottom right."""
    Sq, Sk = q.shape[2], k.shape[2]
    left, right = window_size
    see = torch.ones(Sq, Sk, dtype=torch.bool)
    see = see.tril(Sk - Sq) if is_causal else see
    see = see.triu(Sk - Sq - left) if left >= 0 else see
    see = see.tril(Sk - Sq + right) if right >= 0 else see
    if kv_start is None:
        return see
    return torch.stack([torch.stack([row & (torch.arange(Sk) >= first) for row, first in zip(see, firsts, strict=True)])
                        for firsts in kv_start.tolist()]).unsqueeze(1)  # fmt: skip


def additive(see: torch.Tensor) -> torch.Tensor:
    return torch.zeros(see.shape, dtype=torch.float64).masked_fill(~see, -math.inf)


def results(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and all gradients, the upstream gradient being the same each time."""
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


# Without softcap, and where every row sees a key: F.scaled_dot_product_attention has neither.
SDPA = {name: case for name, case in ATTENTION.items() if "no key" not in name and "softcap" not in case[1]}


@pytest.mark.parametrize("sizes, options", SDPA.values(), ids=SDPA)
def test_attention_is_torch_s(sizes, options):
    q, k, v = inputs = qkv(**sizes)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_of(q, k, **options), scale=options.get("scale"), enable_gqa=True
    )
    assert_same(results(ref.attention(q, k, v, **options), inputs), results(expected, inputs))


def test_causal_attention_is_torch_s_own_where_lengths_agree():
    q, k, v = inputs = qkv(B=2, Hq=4, Hkv=2, Sq=7, Sk=7, D=4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_same(results(ref.attention(q, k, v), inputs), results(expected, inputs))


def scores_of(q, k, *, scale=None, softcap=None, **options: Any) -> torch.Tensor:
    """Masked, (B, Hq, Sq, Sk), head by head."""
    G = q.shape[1] // k.shape[1]
    s = torch.stack([q[:, h] @ k[:, h // G].mT for h in range(q.shape[1])], 1)
    s = s * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    s = s if softcap is None else torch.tanh(s / softcap) * softcap
    return s + additive(mask_of(q, k, **options))


@sink_cases
@attention_cases
def test_lse_is_logsumexp(sizes, options, with_sinks):
    q, k, v = qkv(**sizes)
    scores = scores_of(q, k, **options)
    sinks = normal(q.shape[1]) if with_sinks else None
    if with_sinks:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)
    _, lse = ref.attention(q, k, v, sinks=sinks, return_lse=True, **options)
    assert_same(lse, torch.logsumexp(scores, -1))


def hugging_face_eager(name: str, q, k, v, mask, scale, **module: Any) -> torch.Tensor:
    """`eager_attention_forward` of a model, its float32 softmax in float64."""
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    softcap = {"softcap": module.pop("softcap")} if "softcap" in module else {}
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, **module)
    with float32_means_float64():
        out, _ = modeling.eager_attention_forward(module, q, k, v, additive(mask), scaling=scale, **softcap)
    return out.transpose(1, 2)


HUGGING_FACE = {
    "llama": {"window_size": (-1, -1)},
    "gemma2": {"window_size": (2, -1), "softcap": 1.3},
    "gpt_oss": {"window_size": (3, -1), "sinks": normal(4).requires_grad_()},
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_attention_is_hugging_face_s(name):
    options = HUGGING_FACE[name]
    q, k, v = inputs = qkv(B=2, Hq=4, Hkv=2, Sq=5, Sk=6, D=3)
    inputs = [*inputs, options["sinks"]] if "sinks" in options else inputs
    features = {key: value for key, value in options.items() if key != "window_size"}
    expected = hugging_face_eager(name, q, k, v, mask_of(q, k, **options), 0.6, **features)
    assert_same(results(ref.attention(q, k, v, scale=0.6, **options), inputs), results(expected, inputs))


@sink_cases
@pytest.mark.parametrize("name", ["fewer keys, no key", "kv_start, no key"])
def test_rows_without_a_key_are_zero_and_give_no_gradient(name, with_sinks):
    sizes, options = ATTENTION[name]
    q, k, v = inputs = qkv(**sizes)
    sinks = torch.zeros(q.shape[1], dtype=torch.float64, requires_grad=True) if with_sinks else None
    out, lse = ref.attention(q, k, v, sinks=sinks, return_lse=True, **options)
    blind = (~mask_of(q, k, **options)).all(-1).expand(lse.shape)
    assert blind.any() and not blind.all()
    assert not out[blind].any()
    assert torch.equal(lse[blind], torch.full_like(lse[blind], 0.0 if with_sinks else -math.inf))
    assert lse[~blind].isfinite().all()
    grads = torch.autograd.grad((out, lse), inputs, (torch.randn_like(out), torch.randn_like(lse)))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][blind].any() and grads[0][~blind].all()


@pytest.mark.parametrize("sizes", [{"Sk": 0}, {"Sq": 0}, {"B": 0}, {"Hq": 0, "Hkv": 0}], ids=str)
def test_attention_of_nothing(sizes):
    q, k, v = inputs = qkv(**sizes)
    out, lse = ref.attention(q, k, v, return_lse=True)
    assert out.shape == (*q.shape[:3], 2) and lse.shape == q.shape[:3]
    assert not out.any() and (lse == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), inputs)
    assert not any(grad.any() for grad in grads)


# --- packed sequences ------------------------------------------------------------------------------------------------

# cu_seqlens of queries and of keys; 7 query tokens and 8 keys. Tokens before the first and behind the last are nobody's.
PACKED = {
    "one": ((0, 7), (0, 8)),
    "several": ((0, 2, 4, 7), (0, 2, 5, 8)),
    "without queries": ((0, 0, 4, 7), (0, 2, 5, 8)),
    "without keys": ((0, 3, 5, 7), (0, 4, 4, 8)),
    "without anything": ((0, 3, 3, 7), (0, 4, 4, 8)),
    "tokens of nobody": ((1, 3, 5), (2, 4, 7)),
    "no sequence": ((0,), (0,)),
}
packed_cases = pytest.mark.parametrize("cu_q, cu_k", PACKED.values(), ids=PACKED)
VARLEN = {
    "plain": {},
    "full": {"is_causal": False},
    "all": {
        "scale": 0.9, "window_size": (2, 1), "softcap": 1.1,
        "sinks": normal(4).requires_grad_(), "kv_start": int32(0, 1, 0, 1, 2, 9, -1),
    },
}  # fmt: skip
varlen_options = pytest.mark.parametrize("options", VARLEN.values(), ids=VARLEN)


def packed_qkv() -> list[torch.Tensor]:
    return leaves((7, 4, 2), (8, 2, 2), (8, 2, 3))


@varlen_options
@packed_cases
def test_packed_is_dense_sequence_by_sequence(cu_q, cu_k, options):
    q, k, v = packed_qkv()
    out, lse = ref.attention_varlen(q, k, v, int32(*cu_q), int32(*cu_k), 7, 8, return_lse=True, **options)
    assert out.shape == (7, 4, 3) and lse.shape == (4, 7)
    owned = torch.zeros(7, dtype=torch.bool)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        own = {**options, "kv_start": options["kv_start"][None, a:b]} if "kv_start" in options else options
        o, l = ref.attention(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])), return_lse=True, **own)
        assert_same(out[a:b], o[0].transpose(0, 1))
        assert_same(lse[:, a:b], l[0])
        owned[a:b] = True
    assert not out[~owned].any()
    assert (lse[:, ~owned] == -math.inf).all()


@varlen_options
@packed_cases
def test_gradients_of_packed_attention(cu_q, cu_k, options):
    inputs = packed_qkv() + ([options["sinks"]] if "sinks" in options else [])
    others = {key: value for key, value in options.items() if key != "sinks"}

    def attend(q, k, v, sinks=None):
        return with_lse(ref.attention_varlen, q, k, v, int32(*cu_q), int32(*cu_k), 7, 8, sinks=sinks, **others)

    if len(cu_q) == 1:
        assert not any(x.requires_grad for x in attend(*inputs))  # nothing depends on anything
    else:
        assert torch.autograd.gradcheck(attend, inputs)


def test_bounds_are_kept_inside_the_tensors_and_the_longest_length():
    q, k, v = packed_qkv()
    wild = ref.attention_varlen(q, k, v, int32(-5, 3, 99), int32(-(2**31), 4, 2**31 - 1), 7, 8)
    assert torch.equal(wild, ref.attention_varlen(q, k, v, int32(0, 3, 7), int32(0, 4, 8), 7, 8))
    cut = ref.attention_varlen(q, k, v, int32(0, 7), int32(0, 8), 4, 5)
    assert torch.equal(cut[:4], ref.attention_varlen(q[:4], k[:5], v[:5], int32(0, 4), int32(0, 5), 4, 5))
    assert not cut[4:].any()


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_rounded_once(dtype):
    def once(function: Any, *inputs: torch.Tensor, **options: Any) -> None:
        rounded = [x.to(dtype) for x in inputs]
        outs = function(*rounded, **options), function(*(x.float() for x in rounded), **options)
        outs = [out if isinstance(out, tuple) else (out,) for out in outs]
        for narrow, wide in zip(*outs, strict=True):
            assert narrow.dtype == dtype and wide.dtype == torch.float32
            assert torch.equal(narrow, wide.to(dtype))

    once(ref.rms_norm, normal(4, 33), normal(33))
    once(ref.rope, normal(2, 2, 3, 6), normal(2, 1, 3, 6), *angles(3, 3))
    once(ref.attention, *(x.detach() for x in qkv(Sq=9, Sk=9, D=8)), softcap=2.0, window_size=(4, -1))


def test_lse_of_half_precision_is_float32():
    _, lse = ref.attention(*(x.half() for x in qkv()), return_lse=True)
    assert lse.dtype == torch.float32
