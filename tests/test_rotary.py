"""RoPE's angles: equal to Transformers' own, bit for bit, and to the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llama_kernels as lk

transformers = pytest.importorskip("transformers")

FACTORS = [1.0 + 0.1 * i for i in range(32)]
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.3},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 2048},
    "yarn, all options": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 32.0, "original_max_position_embeddings": 4096, "mscale": 0.7,
        "mscale_all_dim": 0.9, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn, its own factor": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048,
        "attention_factor": 1.25},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048,
        "long_factor": FACTORS, "short_factor": FACTORS[::-1]},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096},
    "llama3.2": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048},
}  # fmt: skip


def config(scaling: dict[str, Any], head_dim: int = 64) -> Any:
    """A LlamaConfig in the manner of the installed version: rope_parameters since 5, rope_scaling before."""
    sizes = {
        "hidden_size": 4 * head_dim,
        "num_attention_heads": 4,
        "head_dim": head_dim,
        "max_position_embeddings": 8192,
    }
    if int(transformers.__version__.split(".")[0]) >= 5:
        return transformers.LlamaConfig(**sizes, rope_parameters=dict(scaling))
    rule = {name: value for name, value in scaling.items() if name != "rope_theta"}
    rule = None if rule["rope_type"] == "default" else rule
    return transformers.LlamaConfig(**sizes, rope_theta=scaling["rope_theta"], rope_scaling=rule)


def theirs(scaling: dict[str, Any], seq_len: int | None) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if scaling["rope_type"] in ROPE_INIT_FUNCTIONS:
        return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config(scaling), torch.device("cpu"), seq_len=seq_len)
    return LlamaRotaryEmbedding.compute_default_rope_parameters(config(scaling))


@pytest.mark.parametrize("seq_len", [None, 100, 9000, 20000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_transformers_to_the_bit(name, seq_len):
    expected, factor = theirs(SCALINGS[name], seq_len)
    rule = {"seq_len": seq_len, "max_position_embeddings": 8192}
    inv_freq, attention_factor = lk.rope_frequencies(64, scaling=SCALINGS[name], **rule)
    assert inv_freq.dtype == torch.float32 and torch.equal(inv_freq, expected) and attention_factor == factor
    if seq_len is not None:  # on the device, without a sync
        inv_freq, _ = lk.rope_frequencies(64, scaling=SCALINGS[name], **{**rule, "seq_len": torch.tensor(seq_len)})
        torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head_dim, factor", [(64, 1.0), (80, 0.25), (128, 0.5), (2, 1.0)])
def test_default_is_the_paper(head_dim, factor):
    R = int(head_dim * factor)
    inv_freq, attention_factor = lk.rope_frequencies(head_dim, 500000.0, {"partial_rotary_factor": factor})
    expected = 500000.0 ** (-2 * torch.arange(R // 2, dtype=torch.float64) / R)
    torch.testing.assert_close(inv_freq.double(), expected, rtol=1e-6, atol=0)
    assert attention_factor == 1.0


def test_tables_are_cosines_and_sines():
    inv_freq, _ = lk.rope_frequencies(64)
    cos, sin = lk.rope_tables(inv_freq, 50, attention_factor=1.5)
    angles = torch.arange(50).double()[:, None] * inv_freq.double()
    torch.testing.assert_close(cos.double(), 1.5 * angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin.double(), 1.5 * angles.sin(), rtol=0, atol=1e-5)
    assert cos.shape == sin.shape == (50, 32) and cos.dtype == torch.float32


@pytest.mark.parametrize("scaling, said", [
    ({"rope_type": "ntk"}, "rope_type"),
    ({"rope_type": "linear"}, "factor"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
    ({"rope_type": "longrope", "factor": 8.0}, "original_max_position_embeddings"),
    ({"rope_type": "default", "partial_rotary_factor": 0.01}, "head_dim"),
])  # fmt: skip
def test_what_is_missing_is_named(scaling, said):
    with pytest.raises(ValueError, match=f"llama_kernels.rope_frequencies: .*{said}"):
        lk.rope_frequencies(64, scaling=scaling)
