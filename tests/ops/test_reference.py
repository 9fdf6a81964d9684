"""The reference: gradcheck in float64, and comparison with independent code."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from llama_kernels import reference
from llama_kernels.reference.rope import rope_transpose
from tests.support import ideal
from tests.support.ideal import attention_mask

pytestmark = pytest.mark.once

f64 = torch.float64


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=f64)


def leaf(*shape: int) -> torch.Tensor:
    return randn(*shape).requires_grad_()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- gradcheck -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("position_ids", [None, [4, 0, 2], [[4, 0, 2], [1, 1, 3]]])
def test_rope_gradients(position_ids, interleaved):
    cos, sin = randn(5, 2), randn(5, 2)  # any table: the rule is linear in it
    ids = None if position_ids is None else torch.tensor(position_ids)
    q, k = leaf(2, 2, 3, 6), leaf(2, 1, 3, 6)
    rotated = lambda q, k: reference.rope(q, k, cos, sin, ids, interleaved=interleaved)  # noqa: E731
    assert gradcheck(rotated, (q, k), check_forward_ad=True)
    assert gradgradcheck(rotated, (q, k), check_fwd_over_rev=True, fast_mode=True)
    gradcheck(lambda cos, sin: reference.rope(q.detach(), None, cos, sin, ids)[0], (cos.requires_grad_(), sin))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [4, 6])
def test_rope_gradients_with_an_angle_for_each_element(R, interleaved):
    cos, sin, q, k = randn(5, R), leaf(5, R), leaf(2, 2, 3, 6), leaf(2, 1, 3, 6)
    gradcheck(lambda q, k, sin: reference.rope(q, k, cos, sin, interleaved=interleaved), (q, k, sin))
    outs, dys = reference.rope(q, k, cos, sin, interleaved=interleaved), (randn(2, 2, 3, 6), randn(2, 1, 3, 6))
    grads = rope_transpose(*dys, cos, sin, interleaved=interleaved)
    for a, b in zip(grads, torch.autograd.grad(outs, (q, k), dys), strict=True):
        close(a, b)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weight", [False, True])
def test_rms_norm_gradients(weight, offset):
    inputs = (leaf(3, 5), leaf(3, 5), leaf(5) if weight else None)
    for norm, given in (
        (lambda x, r, w: reference.add_rms_norm(x, r, w, 1e-2, offset=offset), inputs),
        (lambda x, w: reference.rms_norm(x, w, 1e-2, offset=offset), (inputs[0], inputs[2])),
    ):
        assert gradcheck(norm, given, check_forward_ad=True) and gradgradcheck(norm, given, check_fwd_over_rev=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_qk_norm_rope_derivatives(interleaved):
    angles, inputs = (randn(5, 2), randn(5, 2)), (leaf(1, 2, 2, 6), leaf(1, 1, 2, 6), leaf(6), leaf(6))

    def normed(*heads_and_weights):
        return reference.qk_norm_rope(*heads_and_weights, *angles, eps=1e-2, offset=1.0, interleaved=interleaved)

    assert gradcheck(normed, inputs, check_forward_ad=True) and gradgradcheck(normed, inputs, check_fwd_over_rev=True)


ATTENTION = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"window_size": (2, 1), "is_causal": False},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.7},
    "kv_end": {"kv_end": torch.tensor([[3, 1, 0], [2, 9, 4]], dtype=torch.int32)},
    "kv_start": {"kv_start": torch.tensor([[0, 1, 3], [2, 9, 0]], dtype=torch.int32)},
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("Sk", [3, 5, 2])
def test_attention_gradients(name, Sk):
    inputs = leaf(2, 4, 3, 3), leaf(2, 2, Sk, 3), leaf(2, 2, Sk, 2), leaf(4)

    def out_and_lse(q, k, v, sinks):
        return reference.attention(q, k, v, sinks=sinks, return_lse=True, **ATTENTION[name])

    gradcheck(out_and_lse, inputs)
    # Without sinks rows that see nothing have lse = -inf, which has no difference quotient.
    gradcheck(lambda q, k, v: reference.attention(q, k, v, **ATTENTION[name]), inputs[:3])


def test_attention_second_derivatives():
    gradgradcheck(lambda *qkv: reference.attention(*qkv), (leaf(1, 2, 3, 2), leaf(1, 1, 3, 2), leaf(1, 1, 3, 2)))


def test_packed_gradients():
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 5], [0, 3, 4, 6]))
    inputs = leaf(6, 2, 3), leaf(6, 1, 3), leaf(6, 1, 3), leaf(2)
    gradcheck(lambda q, k, v, s: reference.attention_varlen(q, k, v, cu_q, cu_k, 3, 3, sinks=s), inputs)


# --- attention, against others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("Hq, Hkv", [(4, 4), (4, 2), (6, 1)])
def test_attention_equals_that_of_pytorch(Hq, Hkv):
    q, k, v = leaf(2, Hq, 7, 8), leaf(2, Hkv, 7, 8), leaf(2, Hkv, 7, 8)
    do = randn(2, Hq, 7, 8)
    outs = reference.attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for a, b in zip(*((out, *torch.autograd.grad(out, (q, k, v), do)) for out in outs), strict=True):
        close(a, b)


@pytest.mark.parametrize("Sq, Sk", [(5, 9), (9, 5), (1, 6), (6, 6)])
@pytest.mark.parametrize(
    "is_causal, window", list(itertools.product([True, False], [(-1, -1), (2, 0), (3, 1), (-1, 2)]))
)
def test_masks_equal_those_of_pytorch(Sq, Sk, is_causal, window):
    q, k, v = randn(1, 2, Sq, 8), randn(1, 2, Sk, 8), randn(1, 2, Sk, 3)
    mask = attention_mask(Sq, Sk, is_causal, window, None, None, q.device)
    out, lse = reference.attention(q, k, v, is_causal=is_causal, window_size=window, scale=0.4, return_lse=True)
    seen = mask.any(-1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4)
    close(out, expected.masked_fill(~seen.unsqueeze(-1), 0))
    close(lse, torch.logsumexp((q @ k.mT * 0.4).masked_fill(~mask, -math.inf), -1))


def test_sinks_and_softcap_equal_those_of_transformers():
    """GPT-OSS's eager attention has the sinks, Gemma 2's the softcap."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    q, k, v, sinks = randn(2, 4, 6, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8), randn(4)
    mask = torch.zeros(1, 1, 6, 6, dtype=f64).masked_fill(
        ~attention_mask(6, 6, True, (-1, -1), None, None, q.device), -1e300
    )
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks, module.training, module.head_dim = 2, sinks, False, 8
    theirs, _ = gpt_oss.eager_attention_forward(module, q, k, v, mask, scaling=0.3)
    close(reference.attention(q, k, v, scale=0.3, sinks=sinks), theirs.transpose(1, 2))
    theirs, _ = gemma2.eager_attention_forward(module, q, k, v, mask, scaling=0.3, softcap=2.0)
    # It takes the softmax in float32.
    torch.testing.assert_close(
        reference.attention(q, k, v, scale=0.3, softcap=2.0), theirs.transpose(1, 2), rtol=0, atol=1e-6
    )


def test_kv_start_hides_padding():
    q, k, v = randn(2, 2, 6, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8)
    kv_start = torch.tensor([[2] * 6, [0] * 6], dtype=torch.int32)
    out = reference.attention(q, k, v, kv_start=kv_start)
    close(out[:1, :, 2:], reference.attention(q[:1, :, 2:], k[:1, :, 2:], v[:1, :, 2:]))
    close(out[1:], reference.attention(q[1:], k[1:], v[1:]))
    assert not out[0, :, :2].any()


def test_packed_attention_equals_a_loop_over_dense_sequences():
    bounds = [0, 3, 3, 8]
    q, k, v = randn(9, 4, 8), randn(9, 2, 8), randn(9, 2, 5)
    cu = torch.tensor(bounds, dtype=torch.int32)
    out, lse = reference.attention_varlen(q, k, v, cu, cu, 5, 5, return_lse=True)
    for a, b in itertools.pairwise(bounds):
        o, l = reference.attention(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), return_lse=True)
        close(out[a:b], o[0].transpose(0, 1))
        close(lse[:, a:b], l[0])
    assert not out[8].any() and (lse[:, 8] == -math.inf).all()  # no sequence owns the last token


def test_a_packed_batch_of_no_sequence_has_gradients():
    q, k, v, sinks = leaf(9, 4, 8), leaf(9, 2, 8), leaf(9, 2, 8), leaf(4)
    cu = torch.tensor([3], dtype=torch.int32)
    out, lse = reference.attention_varlen(q, k, v, cu, cu, 9, 9, sinks=sinks, return_lse=True)
    grads = torch.autograd.grad((out, lse), (q, k, v, sinks), (torch.ones_like(out), torch.ones_like(lse)))
    assert (lse == -math.inf).all() and not any(x.any() for x in (out, *grads))


@pytest.mark.corpus(18)
def test_rows_without_keys_have_zero_outputs_and_gradients():
    q, k, v = leaf(1, 2, 5, 8), leaf(1, 2, 2, 8), leaf(1, 2, 2, 8)
    out, lse = reference.attention(q, k, v, return_lse=True)
    grads = torch.autograd.grad(out.sum() + lse[:, :, 3:].sum(), (q, k, v))
    assert not out[:, :, :3].any() and (lse[:, :, :3] == -math.inf).all()
    assert not grads[0][:, :, :3].any() and all(g.isfinite().all() for g in grads)


# --- RoPE and RMSNorm, against others --------------------------------------------------------------------------------


def test_rope_equals_that_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, angles = randn(2, 4, 6, 8), randn(2, 2, 6, 8), randn(2, 6, 4)
    doubled = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    for a, b in zip(
        reference.rope(q, k, angles.cos(), angles.sin()), llama.apply_rotary_pos_emb(q, k, *doubled), strict=True
    ):
        close(a, b)


def test_rope_with_an_angle_for_each_element_equals_that_of_transformers():
    """Tables whose two angles of a pair differ. Llama pairs the two halves of a head, GLM neighbours."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    glm = pytest.importorskip("transformers.models.glm.modeling_glm")
    q, k, cos, sin = randn(2, 4, 6, 8), randn(2, 2, 6, 8), randn(2, 6, 8), randn(2, 6, 8)
    for a, b in zip(reference.rope(q, k, cos, sin), llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        close(a, b)
    across = glm.rotate_half(q)
    close(reference.rope(q, None, cos, sin, interleaved=True)[0], q * cos.unsqueeze(1) + across * sin.unsqueeze(1))
    narrow = cos[..., :6], sin[..., :6]
    close(reference.rope(q, None, *narrow)[0][..., :6], llama.apply_rotary_pos_emb(q[..., :6], k[..., :6], *narrow)[0])
    close(reference.rope(q, None, *narrow)[0][..., 6:], q[..., 6:])


def test_interleaved_rope_is_a_complex_product():
    """As Meta's original code has it."""
    q, angles = randn(2, 4, 6, 8), randn(6, 4)
    rotated = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    close(
        reference.rope(q, None, angles.cos(), angles.sin(), interleaved=True)[0],
        torch.view_as_real(rotated).flatten(-2),
    )


def test_every_form_of_rope_is_the_same_rotation():
    """Packed, per token, by position: the same rotation."""
    q, k, cos, sin = randn(1, 4, 6, 8), randn(1, 2, 6, 8), randn(9, 3), randn(9, 3)
    ids = torch.tensor([8, 0, 3, 3, 1, 7])
    expected = reference.rope(q, k, cos[ids], sin[ids])
    for other in (
        reference.rope(q, k, cos, sin, ids),
        reference.rope(q, k, cos, sin, ids[None]),
        reference.rope(q, k, cos[ids][None], sin[ids][None]),
        tuple(x.transpose(0, 1)[None] for x in reference.rope(*(x[0].transpose(0, 1) for x in (q, k)), cos, sin, ids)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    assert torch.equal(expected[0][..., 6:], q[..., 6:])  # past the rotated width


@pytest.mark.parametrize("dtype", [f64, torch.float32])
def test_rms_norm_equals_that_of_pytorch(dtype):
    x, w = torch.randn(5, 12, dtype=dtype), torch.randn(12, dtype=dtype)
    torch.testing.assert_close(reference.rms_norm(x, w, 1e-5), F.rms_norm(x, (12,), w, 1e-5))
    y, s = reference.add_rms_norm(x, x.flip(0), w, 1e-5)
    assert torch.equal(s, x + x.flip(0)) and torch.equal(y, reference.rms_norm(s, w, 1e-5))


@pytest.mark.corpus(31)
def test_rms_norm_equals_that_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    x = torch.randn(5, 12)
    for norm, offset in ((llama.LlamaRMSNorm(12, 1e-5), 0.0), (gemma.GemmaRMSNorm(12, 1e-5), 1.0)):
        torch.nn.init.normal_(norm.weight)
        torch.testing.assert_close(reference.rms_norm(x, norm.weight, 1e-5, offset=offset), norm(x))


@pytest.mark.corpus(31)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    q, k, v = (torch.randn(1, 2, 6, 8).to(dtype) for _ in range(3))
    cos, sin, w = torch.randn(6, 4), torch.randn(6, 4), torch.randn(8).to(dtype)
    assert torch.equal(reference.attention(q, k, v), reference.attention(q.float(), k.float(), v.float()).to(dtype))
    assert torch.equal(reference.rms_norm(q, w), reference.rms_norm(q.float(), w.float()).to(dtype))
    assert torch.equal(reference.rope(q, None, cos, sin)[0], reference.rope(q.float(), None, cos, sin)[0].to(dtype))


def test_how_out_was_rounded_decides_a_small_row_of_dk():
    """Why a row of dk may have a larger error than the ideal's, though the kernel is right. Where the terms of the row
    cancel, its error is that of out, which enters through delta. A walk over blocks of 64 keys rounds p relative to the
    largest score so far, and so gives another out."""
    torch.manual_seed(561)
    q, do, k, v = (torch.randn(1, 1, 144, 192).half() for _ in range(4))
    q, scale, see = 4 * q, 192**-0.5, torch.ones(144, 144, dtype=torch.bool).tril()
    rounded, calls = ideal.rounded, []

    def walked(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        calls.append(p)
        if len(calls) > 1:  # that of p as it goes into out comes first
            return rounded(p, dtype)
        tops = torch.stack([block.amax(-1) for block in p.split(64, -1)], -1).cummax(-1)[0]
        tops = tops.masked_fill(tops == 0, 1).repeat_interleave(64, -1)[..., : p.shape[-1]]
        return rounded(p / tops, dtype) * tops

    call = (q, k, v, see, scale, None, None, do, torch.zeros(1, 1, 144))
    with mock.patch.object(ideal, "rounds_p", lambda device: True):
        whole = ideal.ideal_attention(*call)
        with mock.patch.object(ideal, "rounded", walked):
            other = ideal.ideal_attention(*call)
    assert torch.equal(whole[4], other[4]) and torch.equal(whole[1], other[1])  # dv and lse, to the bit
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    truth = torch.autograd.grad(reference.attention(*inputs, scale=scale), inputs, do.double())[1]
    size = truth.norm(dim=-1)
    rows = [(x[3].double() - truth).norm(dim=-1) / size.clamp_min(0.1 * size.square().mean().sqrt())
            for x in (whole, other)]  # fmt: skip
    assert 1.4 < rows[1].max() / rows[0].max() < 2  # 1.63: the rule of judge.py takes 1.5 times and 2.1e-4
