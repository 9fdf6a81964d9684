"""RoPE's angles: equal to Transformers' own, bit for bit, and to the definition."""

from __future__ import annotations

import decimal
import math
import re
from typing import Any

import pytest
import torch

import llama_kernels as lk
from tests.support.rotary import SCALINGS, config


def theirs(scaling: dict[str, Any], seq_len: int | None) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if scaling["rope_type"] in ROPE_INIT_FUNCTIONS:
        return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config(scaling), torch.device("cpu"), seq_len=seq_len)
    return LlamaRotaryEmbedding.compute_default_rope_parameters(config(scaling))


@pytest.mark.parametrize("seq_len", [None, 100, 9000, 20000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers_bit_for_bit(name, seq_len):
    expected, factor = theirs(SCALINGS[name], seq_len)
    rule = {"seq_len": seq_len, "max_position_embeddings": 8192}
    inv_freq, attention_factor = lk.rope_frequencies(64, scaling=SCALINGS[name], **rule)
    assert inv_freq.dtype == torch.float32 and torch.equal(inv_freq, expected) and attention_factor == factor
    if seq_len is not None:  # on the device, without a sync
        inv_freq, _ = lk.rope_frequencies(64, scaling=SCALINGS[name], **{**rule, "seq_len": torch.tensor(seq_len)})
        torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head_dim, factor", [(64, 1.0), (80, 0.25), (128, 0.5), (2, 1.0)])
def test_default_frequencies_are_those_of_the_paper(head_dim, factor):
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


@pytest.mark.parametrize("name", SCALINGS)
def test_float64_frequencies_round_to_those_of_float32(name):
    for seq_len in (None, 20000):
        rule = {"scaling": SCALINGS[name], "seq_len": seq_len, "max_position_embeddings": 8192}
        exact, factor = lk.rope_frequencies(64, **rule, dtype=torch.float64)
        rounded, same = lk.rope_frequencies(64, **rule)
        assert exact.dtype == torch.float64 and factor == same
        torch.testing.assert_close(rounded.double(), exact, rtol=1e-6, atol=0)


def test_tables_of_distant_positions():
    """Against cos(10,000,000 / 10,000^(2i/64)), its argument reduced with 60 decimal digits."""
    decimal.getcontext().prec = 60
    pi = decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494")
    inv_freq, _ = lk.rope_frequencies(64, dtype=torch.float64)
    for position in (131_071, 1_000_000, 10_000_000):
        cos, sin = lk.rope_tables(inv_freq, torch.tensor([position]))
        assert cos.shape == (1, 32) and cos.dtype == torch.float32
        for i in range(32):
            angle = float(position * decimal.Decimal(10000) ** (decimal.Decimal(-2 * i) / 64) % (2 * pi))
            assert abs(cos[0, i].item() - math.cos(angle)) < 1e-6 and abs(sin[0, i].item() - math.sin(angle)) < 1e-6


def test_angles_are_float64_in_tables():
    """Those of float32 frequencies too: at position 131,071 a float32 angle is off by up to 0.008."""
    inv_freq, _ = lk.rope_frequencies(64)
    cos, _ = lk.rope_tables(inv_freq, torch.tensor([131_071]))
    torch.testing.assert_close(cos.double(), (131_071 * inv_freq.double()).cos()[None], rtol=0, atol=1e-7)
    whole = lk.rope_tables(inv_freq, 9)
    assert all(torch.equal(a, b) for a, b in zip(whole, lk.rope_tables(inv_freq, torch.arange(9)), strict=True))


def test_frequencies_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"llama_kernels.rope_frequencies: dtype is torch.bfloat16"):
        lk.rope_frequencies(64, dtype=torch.bfloat16)


@pytest.mark.parametrize("scaling, said", [
    ({"rope_type": "ntk"}, "rope_type"),
    ({"rope_type": "linear"}, "factor"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
    ({"rope_type": "longrope", "factor": 8.0}, "original_max_position_embeddings"),
    ({"rope_type": "default", "partial_rotary_factor": 0.01}, "head_dim"),
])  # fmt: skip
def test_a_missing_setting_is_named(scaling, said):
    with pytest.raises(ValueError, match=f"llama_kernels.rope_frequencies: .*{said}"):
        lk.rope_frequencies(64, scaling=scaling)


@pytest.mark.parametrize("scaling, said", [
    ({"factor": 8.0, "rope_theta": 1e4}, r"scaling\['rope_type'\] is missing beside 'factor'"),
    ({"full_attention": SCALINGS["llama3"], "sliding_attention": SCALINGS["default"]},
     r"scaling\['full_attention'\] is a dict; wanted the settings of one kind of layer. Pass scaling"),
    ({"rope_type": "linear", "factor": "8"}, r"scaling\['factor'\] is '8'; wanted a positive number"),
    ({"rope_type": "dynamic", "factor": 0}, r"scaling\['factor'\] is 0; wanted a positive number"),
    ({"rope_theta": -1.0}, r"scaling\['rope_theta'\] is -1.0; wanted a positive number"),
    ({**SCALINGS["longrope"], "short_factor": [1.0]}, r"scaling\['short_factor'\] is 1 factors; wanted 32"),
    ({**SCALINGS["longrope"], "long_factor": [1.0] * 64}, r"scaling\['long_factor'\] is 64 factors; wanted 32"),
])  # fmt: skip
def test_settings_that_would_be_ignored_or_give_no_frequencies_are_named(scaling, said):
    with pytest.raises(ValueError, match=f"llama_kernels.rope_frequencies: {said}"):
        lk.rope_frequencies(64, scaling=scaling)
    with pytest.raises(ValueError, match=f"llama_kernels.rope_frequencies: {said}"):
        lk.nn.RotaryEmbedding(64, scaling=scaling)


NUMBERS = [("base", None), *((key, SCALINGS[kind]) for kind, key in (
    ("default", "rope_theta"), ("default", "partial_rotary_factor"), ("linear", "factor"),
    ("llama3", "low_freq_factor"), ("llama3", "high_freq_factor"), ("dynamic", "max_position_embeddings"),
    ("yarn", "original_max_position_embeddings"), ("yarn", "attention_factor"), ("yarn", "beta_fast"),
    ("yarn", "beta_slow"), ("yarn", "mscale"), ("yarn", "mscale_all_dim"), ("longrope", "attention_factor"),
))]  # fmt: skip


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, "x", True, [1.0], 1e39], ids=repr)
@pytest.mark.parametrize("key, scaling", NUMBERS, ids=[key for key, _ in NUMBERS])
def test_every_number_must_be_one_and_finite(key, scaling, value):
    with pytest.raises(ValueError, match=rf"rope_frequencies: (base|scaling\['{key}'\]) is {re.escape(repr(value))}; "):
        if scaling is None:
            lk.rope_frequencies(64, base=value)
        else:
            lk.rope_frequencies(64, scaling={**scaling, key: value})


@pytest.mark.parametrize("scaling, said", [
    ({**SCALINGS["yarn"], "rope_theta": 1}, r"scaling\['rope_theta'\] is 1.0; wanted above 1, for 'yarn'"),
    ({**SCALINGS["yarn"], "beta_fast": 0.5}, r"scaling\['beta_fast'\] is 0.5; wanted at least"),
    ({**SCALINGS["yarn"], "truncate": "no"}, r"scaling\['truncate'\] is 'no'; wanted True or False"),
    ({**SCALINGS["llama3"], "high_freq_factor": 1.0}, r"scaling\['high_freq_factor'\] is 1.0; wanted above"),
    ({**SCALINGS["longrope"], "original_max_position_embeddings": 1},
     r"scaling\['original_max_position_embeddings'\] is 1.0; wanted above 1, where scaling\['attention_factor'\]"),
    ({**SCALINGS["longrope"], "long_factor": 5}, r"scaling\['long_factor'\] is 5; wanted a list of numbers"),
    ({**SCALINGS["longrope"], "long_factor": "x"}, r"scaling\['long_factor'\] is 'x'; wanted a list of numbers"),
    ({**SCALINGS["longrope"], "short_factor": [1.0] * 31 + [0]}, r"scaling\['short_factor'\]\[31\] is 0.0; wanted"),
    ({"partial_rotary_factor": 0}, r"scaling\['partial_rotary_factor'\] is 0; wanted a positive number"),
])  # fmt: skip
def test_settings_without_frequencies_are_named(scaling, said):
    with pytest.raises(ValueError, match=f"llama_kernels.rope_frequencies: {said}"):
        lk.rope_frequencies(64, scaling=scaling)


def test_settings_that_are_0_or_none_are_those_of_transformers():
    yarn = SCALINGS["yarn"]
    for scaling in ({**yarn, "beta_fast": 0, "beta_slow": None}, {**yarn, "mscale": 0.0, "truncate": None}):
        expected, factor = theirs(scaling, None)
        inv_freq, attention_factor = lk.rope_frequencies(64, scaling=scaling, max_position_embeddings=8192)
        assert torch.equal(inv_freq, expected) and attention_factor == factor


@pytest.mark.parametrize("R", [4, 6, 64])
def test_dynamic_frequencies_of_any_length_equal_those_of_transformers(R):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for seq_len in (8193, 10007, 12345, 999_999):
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config(SCALINGS["dynamic"], R), torch.device("cpu"), seq_len)
        rule = {"scaling": SCALINGS["dynamic"], "seq_len": seq_len, "max_position_embeddings": 8192}
        assert torch.equal(lk.rope_frequencies(R, **rule)[0], expected)


def test_dynamic_needs_two_pairs():
    with pytest.raises(ValueError, match="head_dim is 2, of which 2 rotate; wanted at least 4 that rotate, for 'dynam"):
        lk.rope_frequencies(2, scaling=SCALINGS["dynamic"], max_position_embeddings=8)


@pytest.mark.parametrize("changed, said", [
    ({"head_dim": 64.0}, "head_dim is 64.0; wanted an int"),
    ({"head_dim": "64"}, "head_dim is '64'; wanted an int"),
    ({"scaling": "linear"}, "scaling is 'linear'; wanted a dict, or None"),
    ({"scaling": ""}, "scaling is ''; wanted a dict, or None"),
    ({"seq_len": 2.5}, "seq_len is 2.5; wanted an int, a scalar tensor, or None"),
    ({"seq_len": "x"}, "seq_len is 'x'; wanted an int"),
])  # fmt: skip
def test_arguments_of_other_types_are_named(changed, said):
    with pytest.raises(TypeError, match=f"^llama_kernels.rope_frequencies: {said}"):
        lk.rope_frequencies(**{"head_dim": 64, **changed})
    if "scaling" in changed:
        with pytest.raises(TypeError, match=said):
            lk.nn.RotaryEmbedding(64, **changed)


@pytest.mark.parametrize("changed, said", [
    ({"seq_len": -1}, "seq_len is -1; wanted a number of tokens"),
    ({"seq_len": torch.arange(3)}, r"seq_len is torch.int64 of shape \(3,\); wanted a scalar tensor, or an int"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0; wanted a positive number"),
    ({"max_position_embeddings": "x"}, "max_position_embeddings is 'x'; wanted a positive number"),
])  # fmt: skip
def test_lengths_that_are_none_are_named(changed, said):
    with pytest.raises(ValueError, match=f"^llama_kernels.rope_frequencies: {said}"):
        lk.rope_frequencies(64, **changed)


def test_a_base_of_zero_and_a_negative_number_of_positions_are_named():
    with pytest.raises(ValueError, match=r"rope_frequencies: base is 0\.0; wanted a positive number"):
        lk.rope_frequencies(64, base=0.0)
    with pytest.raises(ValueError, match="rope_tables: positions is -1; wanted a number of positions"):
        lk.rope_tables(lk.rope_frequencies(64)[0], -1)


@pytest.mark.parametrize("positions", [None, "a", 2.5, True])
def test_numbers_of_positions_are_integers(positions):
    with pytest.raises(TypeError, match=r"rope_tables: positions is .*; wanted an int, or a tensor of positions"):
        lk.rope_tables(torch.ones(4), positions)


def test_no_more_elements_rotate_than_a_head_has():
    with pytest.raises(ValueError, match=r"head_dim is 8, of which 12 rotate; wanted an even number, at most 8"):
        lk.rope_frequencies(8, scaling={"partial_rotary_factor": 1.5})
