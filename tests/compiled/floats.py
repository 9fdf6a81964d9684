"""Floats narrower than float32, as bits: bfloat16, float16, TF32; and flush to zero."""

from __future__ import annotations

import numpy as np

f4, u2, u4 = np.float32, np.uint16, np.uint32
SMALLEST_NORMAL = np.finfo(f4).tiny


def ftz(x: np.ndarray) -> np.ndarray:
    """Replace denormal float32 by zeros of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, x * f4(0), x)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, to nearest even, as uint16. NaN is 0x7FFF, as the hardware has it."""
    bits = x.view(u4)
    out = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    return np.where(x == x, out, u2(0x7FFF))


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(u4) << u4(16)).view(f4)


def to_odd(x: np.ndarray) -> np.ndarray:
    """float64 to float32, inexact results to the neighbour with an odd last bit: to round once more is then safe."""
    near = x.astype(f4)
    below = np.where(np.abs(near) > np.abs(x), np.nextafter(near, f4(0)), near)
    return np.where((below != x) & (x == x), (below.view(u4) | u4(1)).view(f4), near)


def narrow(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 or float64 to "bf16" or "f16", to nearest even, as uint16."""
    if kind == "bf16":
        return bf16_bits(x if x.dtype == f4 else to_odd(x))
    return np.where(x == x, x.astype(np.float16).view(u2), u2(0x7FFF))


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """ "bf16" or "f16" as uint16 to float32."""
    return bf16_values(bits) if kind == "bf16" else bits.view(np.float16).astype(f4)


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high 16 bits of uint32."""
    return x.astype(u2), (x >> u4(16)).astype(u2)


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(u4) | (high.astype(u4) << u4(16))


def tf32(x: np.ndarray) -> np.ndarray:
    """The part of a float32 that a tensor core reads as TF32: the first 19 bits."""
    return (x.view(u4) & u4(0xFFFFE000)).view(f4)


def rounded_tf32(x: np.ndarray) -> np.ndarray:
    """float32 to TF32, to nearest, ties away from zero (cvt.rna.tf32.f32)."""
    return ((x.view(u4) + u4(0x1000)) & u4(0xFFFFE000)).view(f4)
