"""RoPE's angles: frequencies with the rescaling rules that Hugging Face configs name, and cos/sin tables.

Formulas and their order of operations are those of transformers.modeling_rope_utils, so that the numbers are too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from llama_kernels.core.checks import message

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rope_frequencies(
    head_dim: int,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    seq_len: int | torch.Tensor | None = None,
    max_position_embeddings: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, float]:
    """The angle by which pair i of a head turns at each position, θ_i = base^(-2i/R), rescaled as `scaling` says.

    Args:
        head_dim: width of a head; with scaling["partial_rotary_factor"] only that share of it, R, is rotated.
        base: θ. scaling["rope_theta"], where there is one, takes its place.
        scaling: the `rope_scaling` or `rope_parameters` dict of a Hugging Face config, or None. "rope_type" (or "type")
            is one of default, linear, dynamic (NTK), yarn (arXiv 2309.00071), longrope (arXiv 2402.13753) and llama3
            (arXiv 2407.21783).
        seq_len: the length to serve, an int or a scalar tensor: dynamic stretches with it past
            max_position_embeddings, longrope changes its factors past the original length. None: as at construction.
        max_position_embeddings: of the config; may stand in `scaling` too. dynamic needs it with seq_len, yarn and
            longrope where scaling does not say everything.
        device: where the frequencies go.
        dtype: float32, as in Transformers, or float64. A frequency is off by 6e-8 of itself in float32, and an angle
            at position 1,000,000 by up to 0.06. float64 keeps cosines right to 1e-6 at position 10,000,000.

    Returns:
        inv_freq (R/2,) in dtype, and the factor by which cos and sin are multiplied (1.0 but for yarn and longrope).

    Raises:
        ValueError: an unknown rope_type, or a key that it needs is missing.
        TypeError: another dtype.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(message("rope_frequencies", "dtype", dtype, "torch.float32 or torch.float64"))
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(message("rope_frequencies", "scaling['rope_type']", repr(kind), f"one of {ROPE_TYPES}"))

    def need(key: str) -> Any:
        if scaling.get(key) is None:
            raise ValueError(message("rope_frequencies", f"scaling[{key!r}]", "missing", f"a value, for {kind!r}"))
        return scaling[key]

    if max_position_embeddings is not None:
        scaling["max_position_embeddings"] = max_position_embeddings
    scaling["original_max_position_embeddings"] = original_length(scaling, max_position_embeddings)
    base = scaling.get("rope_theta") or base
    R = int(head_dim * (scaling.get("partial_rotary_factor") or 1.0))
    if R < 2 or R % 2:
        raise ValueError(message("rope_frequencies", "head_dim", f"{head_dim}, of which {R} rotate", "an even number"))
    exponents = torch.arange(0, R, 2, dtype=torch.int64, device=device).to(dtype) / R

    if kind == "linear":
        return 1.0 / base**exponents / need("factor"), 1.0
    if kind == "dynamic":
        return _dynamic(base, exponents, R, need("factor"), seq_len, lambda: need("max_position_embeddings")), 1.0
    if kind == "yarn":
        return _yarn(base, exponents, R, scaling, need)
    if kind == "longrope":
        return _longrope(base, exponents, scaling, need, seq_len)
    if kind == "llama3":
        return _llama3(1.0 / base**exponents, need), 1.0
    return 1.0 / base**exponents, 1.0


def original_length(scaling: Mapping[str, Any], max_position_embeddings: int | None) -> int | None:
    """The length before it was extended; that of the config where `scaling` does not say."""
    longest = scaling.get("max_position_embeddings") if max_position_embeddings is None else max_position_embeddings
    original = scaling.get("original_max_position_embeddings")
    return longest if original is None else original


def rope_tables(
    inv_freq: torch.Tensor, positions: int | torch.Tensor, attention_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions 0 to positions - 1, (positions, R/2) float32, as `rope` takes them.

    `positions` may also be a tensor of positions, of any shape, for a table of those alone. The angles are computed in
    float64, so that what is left of an error at a distant position is that of the frequencies:
    `rope_frequencies(..., dtype=torch.float64)` has none.
    """
    if not isinstance(positions, torch.Tensor):
        positions = torch.arange(positions, device=inv_freq.device)
    return angles_of(positions, inv_freq.double(), attention_factor)


def angles_of(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, attention_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (*position_ids.shape, R/2) float32, of angles in the dtype of `inv_freq`. The product is
    elementwise: autocast, which would make it bfloat16 and positions past 256 alike, leaves it alone."""
    angles = position_ids.unsqueeze(-1).to(inv_freq.dtype) * inv_freq
    return (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()


def _dynamic(base, exponents, R, factor, seq_len, longest_trained) -> torch.Tensor:
    stretch = 1.0
    if isinstance(seq_len, torch.Tensor):
        stretch = seq_len.double().clamp(min=longest_trained()) / longest_trained()
    elif seq_len is not None:
        stretch = max(seq_len, longest_trained()) / longest_trained()
    base = base * (factor * stretch - (factor - 1)) ** (R / (R - 2))
    return (1.0 / base**exponents).to(exponents.dtype)


def _yarn(base, exponents, R, scaling, need) -> tuple[torch.Tensor, float]:
    original = need("original_max_position_embeddings")
    factor = scaling.get("factor") or need("max_position_embeddings") / original

    def mscale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        weights = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = mscale(weights[0]) / mscale(weights[1]) if all(weights) else mscale()

    def dim_of(turns: float) -> float:  # the dim that makes so many turns over the original length
        return R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(scaling.get("beta_fast") or 32), dim_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    pairs = torch.arange(R // 2, dtype=exponents.dtype, device=exponents.device)
    ramp = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    slow, fast = 1.0 / (factor * base**exponents), 1.0 / base**exponents  # interpolated, extrapolated
    keep = 1 - ramp
    return slow * (1 - keep) + fast * keep, float(attention_factor)


def _longrope(base, exponents, scaling, need, seq_len) -> tuple[torch.Tensor, float]:
    original = need("original_max_position_embeddings")
    factor = scaling.get("factor") or need("max_position_embeddings") / original
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (
        1.0 / (torch.tensor(need(key), dtype=exponents.dtype, device=exponents.device) * base**exponents)
        for key in ("short_factor", "long_factor")
    )
    if isinstance(seq_len, torch.Tensor):
        return torch.where(seq_len > original, long, short), float(attention_factor)
    return long if seq_len and seq_len > original else short, float(attention_factor)


def _llama3(inv_freq, need) -> torch.Tensor:
    factor, low, high = need("factor"), need("low_freq_factor"), need("high_freq_factor")
    original = need("original_max_position_embeddings")
    wavelength = 2 * math.pi / inv_freq
    slowed = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / factor + smooth * slowed
    return torch.where((wavelength >= original / high) & (wavelength <= original / low), between, slowed)
