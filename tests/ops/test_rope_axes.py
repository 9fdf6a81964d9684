"""Several positions a token: M-RoPE and 2-D RoPE, against float64, and against the functions of Transformers."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import llama_kernels as lk
from tests.support.guards import guarded, guarded_allocations, unchanged
from tests.support.ideal import eager_rope
from tests.support.judge import DTYPES, judge
from tests.support.rope import check_axes, packed, qk, tables, unlike_tables


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R, A", [(64, 64, 3), (128, 128, 4), (80, 40, 2), (5, 4, 3), (64, 64, 1)])
def test_several_positions_a_token(D, R, A, interleaved, dtype, device):
    axes = torch.randint(0, A, (R // 2,), device=device)
    check_axes(D, tables(60, R, device), axes, A, dtype, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("D, R", [(64, 64), (64, 48)])
def test_several_positions_with_an_angle_for_each_element(D, R, interleaved, device):
    """The two elements of a pair take their angles from different positions."""
    axes = torch.randint(0, 3, (R,), device=device)
    check_axes(D, unlike_tables(60, R, device), axes, 3, torch.bfloat16, interleaved=interleaved)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_axes_and_positions_of_any_integer_dtype_and_strides(integer, device):
    axes = torch.randint(0, 3, (64,), device=device).to(integer)[::2]
    check_axes(64, tables(60, 64, device), axes, 3, torch.float16, layout=lambda x: x.to(integer).transpose(0, 2))
    check_axes(64, tables(60, 64, device), axes, 3, torch.float16, layout=lambda x: x[:, :1].to(integer))


def test_axes_and_positions_out_of_range_are_clamped(device):
    q, k = qk(1, 2, 1, 5, 16, torch.float32, device)
    cos, sin = (guarded(x) for x in tables(9, 16, device))
    position_ids = guarded(torch.randint(-(2**40), 2**40, (3, 1, 5), device=device))
    axes = guarded(torch.tensor([-(2**40), -1, 0, 1, 2, 3, 2**31, 2**40], device=device))
    for a, b in zip(
        lk.rope(q, k, cos, sin, position_ids, axes=axes),
        lk.rope(q, k, cos, sin, position_ids.clamp(0, 8), axes=axes.clamp(0, 2)),
        strict=True,
    ):
        assert a.isfinite().all() and torch.equal(a, b)
    with lk.checked(), pytest.raises(ValueError, match="axes is from"):
        lk.rope(q, k, cos, sin, position_ids.clamp(0, 8), axes=axes)
    with lk.checked(), pytest.raises(ValueError, match="position_ids is from"):
        lk.rope(q, k, cos, sin, position_ids, axes=axes.clamp(0, 2))


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_equal_positions_are_one_position_bit_for_bit(inplace, device):
    """Text: every axis has the same positions. In place, packed, of a packed projection, and of the norms too."""
    q, k = qk(2, 4, 2, 13, 64, torch.bfloat16, device)
    angles, position_ids = tables(40, 64, device), torch.randint(0, 40, (2, 13), device=device)
    three, axes = position_ids.expand(3, 2, 13), lk.rope_axes((8, 12, 12), device=device)
    one = lk.rope(q, k, *angles, position_ids)
    given = [x.clone() for x in (q, k)]
    assert_equal(lk.rope(*given, *angles, three, axes=axes, inplace=inplace), one)
    row, rows = position_ids[0], three[:, 0]
    tokens = [x[0].transpose(0, 1) for x in (q, k)]
    assert_equal(lk.rope(*tokens, *angles, rows, axes=axes), lk.rope(*tokens, *angles, row))
    qkv = packed((2, 13), 4, 2, 64, torch.bfloat16, device).requires_grad_()
    results = [lk.rope_qkv(qkv, 4, 2, *angles, ids, axes=a) for ids, a in ((three, axes), (position_ids, None))]
    dys = [torch.randn_like(x) for x in results[0]]
    assert_equal(*results)
    assert_equal(*(torch.autograd.grad(outs, qkv, dys) for outs in results))
    w = torch.rand(64, device=device).requires_grad_()
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    results = [lk.qk_norm_rope(*leaves, w, w, *angles, ids, axes=a) for ids, a in ((three, axes), (position_ids, None))]
    assert_equal(*results)
    assert_equal(*(torch.autograd.grad(outs, [*leaves, w], dys[:2]) for outs in results))


def assert_equal(results: Any, expected: Any) -> None:
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def test_derivatives_with_several_positions_equal_those_of_the_reference(device):
    q, k = qk(1, 2, 1, 3, 8, torch.float32, device)
    angles, position_ids = tables(9, 8, device), torch.randint(0, 9, (3, 1, 3), device=device)
    axes, w = lk.rope_axes((2, 1, 1), device=device), torch.rand(8, device=device)

    def results(ops: Any) -> list[torch.Tensor]:
        def norm(q, k):
            return ops.qk_norm_rope(q, k, w, None, *angles, position_ids, axes=axes)

        def rotate(q, k):
            return ops.rope(q, k, *angles, position_ids, axes=axes)

        found = []
        for function in (norm, rotate):
            found += torch.func.jvp(function, (q, k), (q.cos(), k.cos()))[1]
            leaves = [x.detach().requires_grad_() for x in (q, k)]
            grads = torch.autograd.grad(sum(y.sin().sum() for y in function(*leaves)), leaves, create_graph=True)
            found += torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)
        return found

    for a, b in zip(results(lk), results(lk.reference), strict=True):
        torch.testing.assert_close(a, b)


def test_axes_from_sections():
    assert lk.rope_axes((1, 2, 3)).tolist() == [0, 1, 1, 2, 2, 2]
    assert lk.rope_axes((4, 2, 2), alternating=True).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    for sections in ((), (1, -1), (1.0, 2), (True, 2)):
        with pytest.raises(ValueError, match="rope_axes: sections"):
            lk.rope_axes(sections)


# --- the models of Transformers --------------------------------------------------------------------------------------


def made(cls: Any, **attributes: Any) -> Any:
    """A rotary embedding without its config."""
    module = cls.__new__(cls)
    torch.nn.Module.__init__(module)
    for name, value in {"attention_scaling": 1.0, "rope_type": "default", **attributes}.items():
        setattr(module, name, value)
    return module


def modeling(family: str) -> Any:
    return pytest.importorskip(f"transformers.models.{family}.modeling_{family}", minversion=None)


def table_of(inv_freq: torch.Tensor, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """In float32, as the models compute their angles."""
    angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * inv_freq.to(device)
    return angles.cos(), angles.sin()


def rotated_by_stock(module: Any, embedding: Any, q: torch.Tensor, k: torch.Tensor, position_ids: torch.Tensor) -> Any:
    cos, sin = embedding(q, position_ids)
    return module.apply_rotary_pos_emb(q, k, cos, sin)


SECTIONS = (8, 12, 12)
TEXT = {
    "qwen2_vl": ("Qwen2VLRotaryEmbedding", SECTIONS, {}),
    "qwen2_5_vl": ("Qwen2_5_VLRotaryEmbedding", SECTIONS, {}),
    "qwen3_vl": ("Qwen3VLTextRotaryEmbedding", (12, 10, 10), {"alternating": True}),
    "glm4v": ("Glm4vTextRotaryEmbedding", SECTIONS, {}),
    "hunyuan_vl": ("HunYuanVLRotaryEmbedding", (8, 8, 8, 8), {}),
}


@pytest.mark.corpus(80)
@pytest.mark.parametrize("family", TEXT)
def test_sections_as_the_text_models_of_transformers_have_them(family, device):
    """Qwen2-VL and Qwen2.5-VL, Qwen3-VL, GLM-4V, and HunYuan-VL with four positions a token."""
    if int(pytest.importorskip("transformers").__version__.split(".")[0]) < 5:
        pytest.skip("the rotary embeddings of Transformers 4 do not choose the sections")
    module = modeling(family)
    name, sections, how = TEXT[family]
    if not hasattr(module, name):
        pytest.skip(f"this Transformers has no {name}")
    inv_freq, _ = lk.rope_frequencies(64)
    inv_freq = inv_freq.to(device)
    embedding = made(getattr(module, name), inv_freq=inv_freq, mrope_section=list(sections))
    q, k = qk(2, 4, 2, 13, 64, torch.float32, device)
    position_ids = torch.randint(0, 500, (len(sections), 2, 13), device=device)
    theirs = rotated_by_stock(module, embedding, q, k, position_ids)
    cos, sin = table_of(inv_freq, 500, device)
    if family == "hunyuan_vl":  # its sections divide all elements of a head: those of a pair have different axes
        cos, sin, sections = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), [2 * n for n in sections]
    axes = lk.rope_axes(sections, **how, device=device)
    ours = lk.rope(q, k, cos, sin, position_ids, axes=axes, interleaved=family == "glm4v")
    assert_rounded(ours, theirs)


@pytest.mark.corpus(80)
def test_sections_as_ernie_has_them(device):
    """Height and width alternate, and time takes the last frequencies; pairs are interleaved."""
    module = modeling("ernie4_5_vl_moe")
    inv_freq, _ = lk.rope_frequencies(64)
    inv_freq, (h, w, t) = inv_freq.to(device), (11, 11, 10)
    own = torch.cat((inv_freq[:-t][::2], inv_freq[:-t][1::2], inv_freq[-t:]))
    embedding = made(module.Ernie4_5_VLMoeTextRotaryEmbedding, inv_freq=own, mrope_section=[h, w, t])
    q, k = qk(2, 4, 2, 13, 64, torch.float32, device)
    position_ids = torch.randint(0, 500, (3, 2, 13), device=device)
    theirs = rotated_by_stock(module, embedding, q, k, position_ids)
    axes = torch.tensor([1, 2] * h + [0] * t, device=device)
    cos, sin = table_of(inv_freq, 500, device)
    assert_rounded(lk.rope(q, k, cos, sin, position_ids, axes=axes, interleaved=True), theirs)


def assert_rounded(results: Any, expected: Any) -> None:
    """Equal but for roundings of float32: of two products and a sum."""
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(torch.float32).eps * b.abs().max().item())


@pytest.mark.corpus(81)
def test_the_vision_tower_of_qwen2_vl(device):
    module, (H, W) = modeling("qwen2_vl"), (3, 5)
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 16, 2, device=device).float() / 16)
    q, k = (torch.randn(H * W, 4, 32, device=device) for _ in range(2))
    grid = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")).flatten(1).to(device)
    embedding = made(module.Qwen2VLVisionRotaryEmbedding, inv_freq=inv_freq)
    if embedding.forward.__code__.co_argcount != 3:
        pytest.skip("this Transformers computes the angles of its vision tower elsewhere")
    theirs = module.apply_rotary_pos_emb_vision(q, k, *embedding(q, grid.T))
    axes = lk.rope_axes((8, 8), device=device)
    assert_rounded(lk.rope(q, k, *table_of(inv_freq.repeat(2), 8, device), grid, axes=axes), theirs)


@pytest.mark.corpus(81)
def test_the_vision_tower_of_pixtral(device):
    module = modeling("pixtral")
    if not hasattr(module, "PixtralVisionRotaryEmbedding"):
        pytest.skip("this Transformers has a table of all places in an image instead")
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 32, 2, device=device).float() / 32)
    inv_freq = torch.cat((inv_freq[::2], inv_freq[1::2]))
    grid = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")).flatten(1).to(device)
    q, k = qk(1, 4, 4, 64, 32, torch.float32, device)
    cos, sin = made(module.PixtralVisionRotaryEmbedding, inv_freq=inv_freq)(q, grid.T)
    theirs = module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=0)
    axes = lk.rope_axes((8, 8), device=device)
    assert_rounded(lk.rope(q, k, *table_of(inv_freq, 8, device), grid[:, None], axes=axes), theirs)


@pytest.mark.corpus(81)
def test_the_vision_tower_of_llama_4(device):
    """Pairs are interleaved; columns come before rows, both from 1 on; the class token is not rotated."""
    module, n = modeling("llama4"), 4
    config = types.SimpleNamespace(
        image_size=16, patch_size=4, hidden_size=128, num_attention_heads=4, rope_parameters={"rope_theta": 10000.0},
        rope_theta=10000.0,
    )  # fmt: skip
    freqs_ci = module.Llama4VisionRotaryEmbedding._compute_freqs_ci(config).to(device)
    q, k = (torch.randn(2, n * n + 1, 4, 32, device=device) for _ in range(2))
    theirs = module.vision_apply_rotary_emb(q, k, freqs_ci)
    index = torch.arange(n * n, device=device)
    grid = torch.stack((index % n, index // n)) + 1
    grid = torch.cat((grid, grid.new_zeros(2, 1)), 1)[:, None]  # position 0 is the angle 0
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    axes = lk.rope_axes((8, 8), device=device)
    heads = [x.transpose(1, 2) for x in (q, k)]
    ours = lk.rope(*heads, *table_of(inv_freq.repeat(2), n + 1, device), grid, axes=axes, interleaved=True)
    assert_rounded([x.transpose(1, 2) for x in ours], theirs)


def test_llama_4_as_complex_numbers(device):
    """Its tables are one complex tensor; the kernel reads its real and imaginary parts where they are."""
    module = modeling("llama4")
    q, k = (torch.randn(2, 13, H, 64, device=device) for H in (4, 2))
    freqs = torch.arange(13, device=device)[None, :, None] * lk.rope_frequencies(64)[0].to(device)
    freqs_cis = torch.polar(torch.ones_like(freqs), freqs).expand(2, -1, -1)
    theirs = module.apply_rotary_emb(q, k, freqs_cis)
    heads = [x.transpose(1, 2) for x in (q, k)]
    ours = lk.rope(*heads, freqs_cis.real, freqs_cis.imag, interleaved=True)
    assert_rounded([x.transpose(1, 2) for x in ours], theirs)


@pytest.mark.parametrize("family", ["glm", "gptj"])
def test_a_part_of_each_head_in_interleaved_pairs(family, device):
    """GLM and GPT-J: the first R of D elements."""
    module, R = modeling(family), 32
    q, k = qk(2, 4, 2, 13, 64, torch.float32, device)
    cos, sin = (x[None, :13] for x in table_of(lk.rope_frequencies(R)[0], 13, device))
    ours = lk.rope(q, k, cos, sin, interleaved=True)
    if family == "glm":
        theirs = module.apply_rotary_pos_emb(q, k, *(torch.cat((x, x), -1) for x in (cos, sin)))
    else:
        theirs = []
        for x in (q, k):
            rotated = module.apply_rotary_pos_emb(x.transpose(1, 2)[..., :R], sin, cos).transpose(1, 2)
            theirs.append(torch.cat((rotated, x[..., R:]), -1))
    assert_rounded(ours, theirs)


def test_guards_around_axes_and_positions(device):
    """Nothing outside the tensors is read: their neighbours are NaN, or out of range."""
    q, k = (guarded(x) for x in qk(2, 4, 2, 13, 64, torch.float32, device))
    cos, sin = (guarded(x) for x in tables(40, 64, device))
    position_ids, axes = (
        guarded(torch.randint(0, 40, (3, 2, 13), device=device)),
        guarded(lk.rope_axes((8, 12, 12)).to(device)),
    )
    with guarded_allocations(), unchanged(q, k, cos, sin, position_ids, axes):
        outs = lk.rope(q, k, cos, sin, position_ids, axes=axes)
    rows, columns = position_ids[axes].movedim(0, -1), torch.arange(32, device=device)
    for x, K in zip((q, k), outs, strict=True):
        c, s = (table[rows, columns][:, None] for table in (cos, sin))
        judge("rotated", K, eager_rope(x.double(), c.double(), s.double(), False), eager_rope(x, c, s, False))
