"""RoPE's angles: frequencies, with the rescaling rules of Hugging Face configs, and tables of cos and sin.

Formulas and order of operations are those of transformers.modeling_rope_utils. Results are equal bit for bit, except
those of dynamic with a tensor for seq_len: Transformers computes the new base in float32, this module in float64.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from llama_kernels.core.checks import (
    LARGEST,
    SMALLEST,
    check_dense,
    check_device,
    check_flag,
    check_number,
    is_integer,
    message,
)

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
    """Frequencies of RoPE: pair i of a head rotates by θ_i = base^(-2i/R) radians per position, possibly rescaled.

    Args:
        head_dim: the width of a head. R of its elements rotate: all, or the fraction scaling["partial_rotary_factor"].
        base: the base of θ_i. scaling["rope_theta"] overrides it.
        scaling: the `rope_scaling` or `rope_parameters` dict of a Hugging Face config, or None. "rope_type" (or "type")
            is default, linear, dynamic (NTK), yarn (arXiv 2309.00071), longrope (arXiv 2402.13753) or llama3
            (arXiv 2407.21783).
        seq_len: the sequence length, an int or a scalar tensor. If it is above max_position_embeddings, dynamic
            rescales. If it is above the original length, longrope uses its long factors. None: above neither.
        max_position_embeddings: that of the config; `scaling` may have it instead. dynamic needs it with seq_len; yarn
            and longrope need it unless `scaling` has both "factor" and "original_max_position_embeddings".
        device: the device of the frequencies.
        dtype: float32, as in Transformers, or float64. A float32 frequency has a relative error of 6e-8, which is an
            error of 0.06 in the angle at position 1,000,000. With float64, cos and sin are right to 1e-6 at position
            10,000,000.

    Returns:
        inv_freq (R/2,) in dtype, and the attention factor, which multiplies cos and sin. It is 1.0 except with yarn and
        longrope.

    Raises:
        ValueError: rope_type is unknown, or missing beside keys of a rescaling; a key that it needs is missing; a
            number is not finite, or not positive where it must be; `scaling` has a dict for each kind of layer;
            longrope has other than R/2 factors; R is odd or zero; the numbers have no frequencies, as with yarn of a
            base of 1.
        TypeError: head_dim, seq_len or `scaling` is of another type, or dtype is neither float32 nor float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(message("rope_frequencies", "dtype", dtype, "torch.float32 or torch.float64"))
    if not is_integer(head_dim):
        raise TypeError(message("rope_frequencies", "head_dim", repr(head_dim), "an int"))
    check_device("rope_frequencies", device)
    kind = rope_type_of(scaling)
    scaling, base = _checked_scaling(scaling or {}), _positive("base", base)
    _check_seq_len(seq_len)

    def need(key: str) -> Any:
        if scaling.get(key) is None:
            _refuse(f"scaling[{key!r}]", "missing", f"a value, for {kind!r}")
        return scaling[key]

    if max_position_embeddings is not None:
        scaling["max_position_embeddings"] = _positive("max_position_embeddings", max_position_embeddings)
    scaling["original_max_position_embeddings"] = original_length(scaling, None)
    base = scaling.get("rope_theta") or base
    R = int(head_dim * (scaling.get("partial_rotary_factor") or 1.0))
    if R < 2 or R % 2 or head_dim < R:
        _refuse("head_dim", f"{head_dim}, of which {R} rotate", f"an even number, at most {head_dim}")
    if kind == "dynamic" and R == 2:
        _refuse("head_dim", f"{head_dim}, of which 2 rotate", "at least 4 that rotate, for 'dynamic'")
    device = torch.get_default_device() if device is None else torch.device(device)
    # Powers on a CPU, so that the frequencies have the same bits on every device. A `seq_len` on a GPU stays there,
    # since the host would have to wait for it.
    where = seq_len.device if isinstance(seq_len, torch.Tensor) else "cpu"
    exponents = torch.arange(0, R, 2, dtype=torch.int64, device=where).to(dtype) / R
    attention_factor = 1.0
    if kind == "linear":
        inv_freq = 1.0 / base**exponents / need("factor")
    elif kind == "dynamic":
        inv_freq = _dynamic(base, exponents, R, need("factor"), seq_len, lambda: need("max_position_embeddings"))
    elif kind == "yarn":
        inv_freq, attention_factor = _yarn(base, exponents, R, scaling, need)
    elif kind == "longrope":
        inv_freq, attention_factor = _longrope(base, exponents, scaling, need, seq_len)
    elif kind == "llama3":
        inv_freq = _llama3(1.0 / base**exponents, need)
    else:
        inv_freq = 1.0 / base**exponents
    return inv_freq.to(device), attention_factor


# Settings of `scaling` that are numbers. None stands for a missing one.
_POSITIVE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "max_position_embeddings",
             "original_max_position_embeddings", "partial_rotary_factor", "attention_factor")  # fmt: skip
_NOT_NEGATIVE = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # 0 is the default, as in Transformers
_FOR_EACH_PAIR = ("short_factor", "long_factor")
_OF_RESCALING = ("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "beta_fast")


def _is_number(x: Any, least: float) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and least <= float(x) <= LARGEST


def _refuse(name: str, got: Any, wanted: str, fix: str = "") -> NoReturn:
    raise ValueError(message("rope_frequencies", name, got, wanted, fix))


def rope_type_of(scaling: Mapping[str, Any] | None) -> str:
    """The kind of scaling, one of ROPE_TYPES."""
    if scaling is None:
        return "default"
    if not isinstance(scaling, Mapping):
        raise TypeError(message("rope_frequencies", "scaling", repr(scaling), "a dict, or None"))
    kind: str = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        _refuse("scaling['rope_type']", repr(kind), f"one of {ROPE_TYPES}")
    return kind


def _checked_scaling(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`scaling` with its numbers as Python's."""
    given = dict(scaling)
    for key, value in given.items():
        name = f"scaling[{key!r}]"
        if isinstance(value, Mapping):
            fix = f"Pass {name}, and make frequencies for each kind of layer."
            _refuse(name, "a dict", "the settings of one kind of layer", fix)
        if value is None:
            continue
        if key in _POSITIVE:
            given[key] = _positive(name, value)
        elif key in _NOT_NEGATIVE:
            if not _is_number(value, 0):
                _refuse(name, repr(value), "a number that is not negative, and finite")
            given[key] = float(value)
        elif key in _FOR_EACH_PAIR:
            given[key] = _factors(name, value)
        elif key == "truncate" and not isinstance(value, bool):
            _refuse(name, repr(value), "True or False")
    rescaling = [key for key in _OF_RESCALING if given.get(key) is not None]
    if rescaling and "rope_type" not in given and "type" not in given:
        _refuse("scaling['rope_type']", f"missing beside {rescaling[0]!r}", f"one of {ROPE_TYPES}")
    return given


def _positive(name: str, value: Any) -> float:
    if not _is_number(value, SMALLEST):
        _refuse(name, repr(value), "a positive number, and finite in float32")
    return float(value)


def _factors(name: str, value: Any) -> list[float]:
    try:
        factors = [float(x) for x in value]
    except (TypeError, ValueError):
        _refuse(name, repr(value), "a list of numbers, one for each pair")
    for i, factor in enumerate(factors):
        _positive(f"{name}[{i}]", factor)
    return factors


def _check_seq_len(seq_len: Any) -> None:
    if isinstance(seq_len, torch.Tensor):
        if seq_len.numel() != 1 or seq_len.is_complex():
            _refuse("seq_len", f"{seq_len.dtype} of shape {tuple(seq_len.shape)}", "a scalar tensor, or an int")
    elif seq_len is not None:
        if not is_integer(seq_len):
            raise TypeError(message("rope_frequencies", "seq_len", repr(seq_len), "an int, a scalar tensor, or None"))
        if seq_len < 0:
            _refuse("seq_len", seq_len, "a number of tokens")


def original_length(scaling: Mapping[str, Any], max_position_embeddings: float | None) -> float | None:
    """The maximum length in training before the context was extended, or None where neither argument has it."""
    longest = scaling.get("max_position_embeddings") if max_position_embeddings is None else max_position_embeddings
    original = scaling.get("original_max_position_embeddings")
    return longest if original is None else original


def rope_tables(
    inv_freq: torch.Tensor, positions: int | torch.Tensor, attention_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of cos and sin for `rope`, (positions, R/2) float32 each, of positions 0 to positions - 1.

    Args:
        inv_freq: (R/2,), from `rope_frequencies`.
        positions: the number of positions, or a tensor of positions, which gives tables (*positions.shape, R/2).
        attention_factor: multiplies cos and sin, from `rope_frequencies`.

    Angles are computed in float64, so the error at a distant position comes from the frequencies alone. For exact
    tables use `rope_frequencies(..., dtype=torch.float64)`.

    Raises:
        TypeError: inv_freq or positions is of another type.
        ValueError: inv_freq is not (R/2,), positions is negative or on another device, or attention_factor is no
            positive number.
    """
    op = "rope_tables"
    check_dense(op, "inv_freq", inv_freq)
    if not inv_freq.is_floating_point() or inv_freq.ndim != 1:
        got = f"{inv_freq.dtype} of shape {tuple(inv_freq.shape)}"
        raise ValueError(message(op, "inv_freq", got, "(R/2,), floating-point, as rope_frequencies returns it"))
    check_number(op, "attention_factor", attention_factor, SMALLEST, "a positive finite number")
    if isinstance(positions, torch.Tensor):
        check_positions(op, "positions", positions)
        if positions.device != inv_freq.device:
            wanted, fix = f"the device of inv_freq, {inv_freq.device}", "Pass positions.to(inv_freq.device)."
            raise ValueError(message(op, "positions", f"on {positions.device}", wanted, fix))
    else:
        if not is_integer(positions):
            raise TypeError(message(op, "positions", repr(positions), "an int, or a tensor of positions"))
        if positions < 0:
            raise ValueError(message(op, "positions", positions, "a number of positions, or a tensor of them"))
        positions = torch.arange(positions, device=inv_freq.device)
    return angles_of(positions, inv_freq.double(), attention_factor)


def check_positions(op: str, name: str, x: Any) -> None:
    """Raise a TypeError unless `x` is a dense tensor of numbers; they may be fractions."""
    check_dense(op, name, x)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(message(op, name, x.dtype, "a tensor of positions"))


def rope_axes(
    sections: Sequence[int], *, alternating: bool = False, device: torch.device | str | None = None
) -> torch.Tensor:
    """The axes of `rope` where a token has several positions: which of them each column of the tables takes, int64.

    Args:
        sections: the number of columns of each axis, (16, 24, 24) for the time, height and width of Qwen2-VL. Their sum
            is the width of the tables.
        alternating: False: axis 0 has the first sections[0] columns, axis 1 the next, as in Qwen2-VL. True: column i is
            of axis i mod A, as long as that axis has columns left, and of axis 0 otherwise, as in Qwen3-VL.
        device: where to put them.

    Other layouts need no function: any tensor of integers will do.

    Raises:
        TypeError: sections is not a list or tuple, or alternating is neither True nor False.
        ValueError: sections is empty, or one of them is negative or not an integer.
    """
    check_flag("rope_axes", "alternating", alternating)
    check_device("rope_axes", device)
    if not isinstance(sections, Sequence) or isinstance(sections, str):
        raise TypeError(message("rope_axes", "sections", repr(sections), "one number of columns for each axis"))
    if not sections or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in sections):
        raise ValueError(message("rope_axes", "sections", repr(sections), "one number of columns for each axis"))
    if not alternating:
        return torch.tensor([axis for axis, n in enumerate(sections) for _ in range(n)], device=device)
    A = len(sections)
    columns = range(sum(sections))
    return torch.tensor([i % A if i < A * sections[i % A] else 0 for i in columns], device=device)


def angles_of(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, attention_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (*position_ids.shape, R/2) float32, of angles computed in the dtype of `inv_freq`."""
    # Not a matmul: autocast would run it in bfloat16, in which the positions 256 and 257 are equal.
    angles = position_ids.unsqueeze(-1).to(inv_freq.dtype) * inv_freq
    return (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()


def _dynamic(
    base: float,
    exponents: torch.Tensor,
    R: int,
    factor: float,
    seq_len: int | torch.Tensor | None,
    longest_trained: Callable[[], int],
) -> torch.Tensor:
    growth: float | torch.Tensor = factor  # factor · seq_len / max_position_embeddings, in Transformers' order
    if isinstance(seq_len, torch.Tensor):
        growth = factor * seq_len.double().clamp(min=longest_trained()) / longest_trained()
    elif seq_len is not None:
        growth = factor * max(seq_len, longest_trained()) / longest_trained()
    stretched = base * (growth - (factor - 1)) ** (R / (R - 2))
    return (1.0 / stretched**exponents).to(exponents.dtype)


def _yarn(
    base: float, exponents: torch.Tensor, R: int, scaling: Mapping[str, Any], need: Callable[[str], Any]
) -> tuple[torch.Tensor, float]:
    if base <= 1:
        _refuse("base" if scaling.get("rope_theta") is None else "scaling['rope_theta']", base, "above 1, for 'yarn'")
    original = need("original_max_position_embeddings")
    factor = scaling.get("factor") or need("max_position_embeddings") / original

    def mscale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        one, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = mscale(one) / mscale(all_dim) if one and all_dim else mscale()

    def dim_of(rotations: float) -> float:
        """The dimension whose pair makes this many full rotations over the original length."""
        return R * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    fast_rotations, slow_rotations = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    if fast_rotations < slow_rotations:
        _refuse("scaling['beta_fast']", fast_rotations, f"at least scaling['beta_slow'], {slow_rotations}")
    low, high = dim_of(fast_rotations), dim_of(slow_rotations)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    pairs = torch.arange(R // 2, dtype=exponents.dtype, device=exponents.device)
    ramp = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    slow, fast = 1.0 / (factor * base**exponents), 1.0 / base**exponents  # interpolated, extrapolated
    keep = 1 - ramp
    return slow * (1 - keep) + fast * keep, float(attention_factor)


def _longrope(
    base: float,
    exponents: torch.Tensor,
    scaling: Mapping[str, Any],
    need: Callable[[str], Any],
    seq_len: int | torch.Tensor | None,
) -> tuple[torch.Tensor, float]:
    original = need("original_max_position_embeddings")
    factor = scaling.get("factor") or need("max_position_embeddings") / original
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None and factor > 1 and original <= 1:
        wanted = "above 1, where scaling['attention_factor'] is missing"
        _refuse("scaling['original_max_position_embeddings']", original, wanted)
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    for key in ("short_factor", "long_factor"):
        if len(need(key)) != len(exponents):
            got, wanted = f"{len(need(key))} factors", f"{len(exponents)}, one for each pair"
            _refuse(f"scaling[{key!r}]", got, wanted)
    short, long = (
        1.0 / (torch.tensor(need(key), dtype=exponents.dtype, device=exponents.device) * base**exponents)
        for key in ("short_factor", "long_factor")
    )
    if isinstance(seq_len, torch.Tensor):
        return torch.where(seq_len > original, long, short), float(attention_factor)
    return long if seq_len and seq_len > original else short, float(attention_factor)


def _llama3(inv_freq: torch.Tensor, need: Callable[[str], Any]) -> torch.Tensor:
    factor, low, high = need("factor"), need("low_freq_factor"), need("high_freq_factor")
    if high <= low:
        _refuse("scaling['high_freq_factor']", high, f"above scaling['low_freq_factor'], {low}")
    original = need("original_max_position_embeddings")
    wavelength = 2 * math.pi / inv_freq
    slowed = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / factor + smooth * slowed
    return torch.where((wavelength >= original / high) & (wavelength <= original / low), between, slowed)
