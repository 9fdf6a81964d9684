"""The modules of lk.nn against those of Hugging Face: state_dicts, angles and results."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import llama_kernels as lk
from tests.support.rotary import SCALINGS, config

llama = pytest.importorskip("transformers.models.llama.modeling_llama")


def test_the_norm_exchanges_state_dicts_with_transformers(device):
    x = torch.randn(5, 96, device=device)
    theirs, mine = llama.LlamaRMSNorm(96, 1e-5).to(device), lk.nn.RMSNorm(96, 1e-5, device=device)
    torch.nn.init.normal_(theirs.weight)
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine(x), theirs(x))
    theirs.load_state_dict(mine.state_dict())
    assert list(mine.state_dict()) == ["weight"]


def test_the_norm_with_an_offset_equals_gemmas(device):
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    x = torch.randn(5, 96, device=device)
    theirs, mine = gemma.GemmaRMSNorm(96, 1e-5).to(device), lk.nn.RMSNorm(96, 1e-5, offset=1.0, device=device)
    torch.testing.assert_close(mine(x), theirs(x))  # both start at zero, which means one
    torch.nn.init.normal_(theirs.weight)
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine(x), theirs(x))


def test_the_norm_with_a_residual(device):
    norm = lk.nn.RMSNorm(96, device=device)
    x, r = torch.randn(5, 96, device=device), torch.randn(5, 96, device=device)
    y, s = norm(x, residual=r)
    assert torch.equal(s, x + r) and torch.equal(y, norm(s))
    with pytest.raises(TypeError, match=r"llama_kernels.nn.RMSNorm: .*Pass the residual as residual="):
        norm(x, r)  # torch's SequenceParallel would pass on x alone, and drop it


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_equal_those_of_transformers(name, device):
    """Those of Transformers hold each angle twice, and depend on the longest position so far."""
    theirs = llama.LlamaRotaryEmbedding(config(SCALINGS[name])).to(device)
    mine = lk.nn.RotaryEmbedding(64, scaling=SCALINGS[name], max_position_embeddings=8192, device=device)
    x = torch.empty(1, device=device)
    for first in (0, 10000):  # past what it was trained for too; float32 holds an angle of 10,000 to a thousandth
        position_ids = torch.arange(first, first + 7, device=device)[None]
        for a, b in zip(mine(x, position_ids), theirs(x, position_ids), strict=True):
            assert a.shape == (1, 7, 32) and a.dtype == torch.float32
            torch.testing.assert_close(a, b[..., :32], rtol=0, atol=2e-3 if first else 1e-6)
    assert not mine.state_dict()


def test_angles_stay_float32(device):
    """In bfloat16, positions 256 and 257 would be equal."""
    rotary = lk.nn.RotaryEmbedding(64, device=device)
    position_ids = torch.arange(300, device=device)[None]
    expected = rotary(torch.empty(1, device=device), position_ids)
    for converted in (
        copy.deepcopy(rotary).bfloat16(),
        copy.deepcopy(rotary).half(),
        copy.deepcopy(rotary).to(torch.float16),
    ):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            results = converted(torch.empty(1, device=device, dtype=torch.bfloat16), position_ids)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_of_distant_positions(name, device):
    """Positions past 100,000 are where float32 angles are wrong by more than a thousandth."""
    exact = lk.nn.RotaryEmbedding(
        64, scaling=SCALINGS[name], max_position_embeddings=8192, device=device, frequency_dtype=torch.float64
    ).bfloat16()
    position_ids = torch.tensor([[131_071, 10_000_000]], device=device)
    rule = {"scaling": SCALINGS[name], "max_position_embeddings": 8192, "seq_len": 10_000_001, "dtype": torch.float64}
    inv_freq, factor = lk.rope_frequencies(64, **rule)
    angles = position_ids.cpu()[..., None].double() * inv_freq
    results = exact(torch.empty(1, device=device), position_ids)
    for table, expected in zip(results, (angles.cos(), angles.sin()), strict=True):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.cpu().double(), factor * expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_angles_that_follow_the_length_make_no_copy_to_the_device(name, device):
    """A copy from the host's memory would wait for the device at every forward, and cannot be captured in a graph."""
    rotary = lk.nn.RotaryEmbedding(64, scaling=SCALINGS[name], max_position_embeddings=8192, device=device)
    made = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func)
            return func(*args, **(kwargs or {}))

    ops = torch.ops.aten
    for longest in (10, 9000):
        position_ids = torch.tensor([[longest]], device=device)
        with Spy():
            rotary(torch.empty(1, device=device), position_ids)
        assert made and not {ops.lift_fresh.default, ops._local_scalar_dense.default} & {*made}


def test_modules_are_copied_and_pickled(device):
    for module in (lk.nn.RMSNorm(8, offset=1.0), lk.nn.RotaryEmbedding(8, scaling=SCALINGS["llama3"])):
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(twin) == repr(module)
            for a, b in zip(twin.state_dict().values(), module.state_dict().values(), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_can_be_built_on_the_meta_device(offset, device):
    """Large models are built on the meta device and filled later."""
    norm = lk.nn.RMSNorm(8, offset=offset, device="meta").to_empty(device=device)
    norm.weight.data.fill_(torch.nan)
    norm.reset_parameters()
    x = torch.randn(2, 8, device=device)
    assert torch.equal(norm(x), lk.rms_norm(x))


@pytest.mark.corpus(84)
@pytest.mark.parametrize("filled", ["to_empty", "reset_parameters", "in a call", "to_empty of memory with numbers"])
@pytest.mark.parametrize("kind", ["llama3", "longrope", "dynamic"])
def test_the_rotary_embedding_can_be_built_on_the_meta_device(kind, filled, device, monkeypatch):
    """Its frequencies are in no state_dict, so nothing fills them later: they were what the memory held."""
    options = {"scaling": SCALINGS[kind], "max_position_embeddings": 4096}
    x, position_ids = torch.empty(1, device=device), torch.tensor([[3, 9000]], device=device)
    expected = lk.nn.RotaryEmbedding(64, **options).to(device)(x, position_ids)
    with torch.device("cpu" if "numbers" in filled else "meta"):
        rotary = lk.nn.RotaryEmbedding(64, **options)
    monkeypatch.setattr(torch, "empty_like", lambda x, **where: torch.full_like(x, torch.nan, **where))
    if filled != "in a call":
        rotary.to_empty(device=device)
    if filled == "reset_parameters":
        rotary.reset_parameters()
    assert all(map(torch.equal, rotary(x, position_ids), expected))


def test_a_layer_has_the_outputs_and_gradients_of_transformers(device):
    """One attention block, weights alike, forward and backward against Hugging Face's eager code."""
    model_config = config(SCALINGS["default"])
    model_config._attn_implementation = "eager"
    model_config.num_key_value_heads = 2
    theirs = llama.LlamaDecoderLayer(model_config, 0).to(device)
    x, dy = torch.randn(2, 12, 256, device=device), torch.randn(2, 12, 256, device=device)
    position_ids = torch.arange(12, device=device)[None]
    rotary = lk.nn.RotaryEmbedding(64, 500000.0, device=device)
    mine = copy.deepcopy(theirs)
    mask = torch.full((12, 12), -torch.inf, device=device).triu(1)[None, None]

    def ours(x: torch.Tensor) -> torch.Tensor:
        attention, norm = mine.self_attn, mine.input_layernorm
        y = lk.rms_norm(x, norm.weight, norm.variance_epsilon)
        q, k, v = (
            p(y).unflatten(-1, (-1, 64)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = lk.rope(q, k, *rotary(x, position_ids))
        o = attention.o_proj(lk.attention(q, k, v).transpose(1, 2).flatten(2))
        norm = mine.post_attention_layernorm
        y, x = lk.add_rms_norm(o, x, norm.weight, norm.variance_epsilon)
        return x + mine.mlp(y)

    expected = theirs(
        x, attention_mask=mask, position_embeddings=llama.LlamaRotaryEmbedding(model_config).to(device)(x, position_ids)
    )
    expected = expected[0] if isinstance(expected, tuple) else expected
    result = ours(x)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)
    result.backward(dy), expected.backward(dy)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        error = (a.grad - b.grad).norm() / b.grad.norm()
        assert error < 2e-6, name
