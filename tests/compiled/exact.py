"""For the machine's tests: numbers computed another way, by Python's integers, fractions and struct."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction

# Bits of the fraction, the smallest normal exponent, the largest exponent.
FORMATS = {"f16": (10, -14, 15), "bf16": (7, -126, 127), "f32": (23, -126, 127), "f64": (52, -1022, 1023)}
WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def decode(bits: int, kind: str) -> float:
    """The value of a float's bits."""
    if kind == "bf16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    letter, code = {"f16": ("e", "H"), "f32": ("f", "I"), "f64": ("d", "Q")}[kind]
    return struct.unpack(f"<{letter}", struct.pack(f"<{code}", bits))[0]


def encode(x: float | Fraction, kind: str) -> int:
    """The bits of the float nearest to x, ties to even."""
    fraction_bits, smallest, largest = FORMATS[kind]
    top = WIDTH[kind] - 1
    infinity = ((1 << (top - fraction_bits)) - 1) << fraction_bits
    negative = math.copysign(1.0, x) < 0 if isinstance(x, float) else x < 0
    sign = negative << top
    if isinstance(x, float) and not math.isfinite(x):
        return infinity | (1 << fraction_bits) - 1 if math.isnan(x) else sign | infinity
    exact = abs(Fraction(x))
    if exact == 0:
        return sign
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= exact < Fraction(2) ** exponent
    exponent = max(exponent, smallest)
    units = round(exact / Fraction(2) ** (exponent - fraction_bits))  # Python rounds halves to even
    if units >> (fraction_bits + 1):
        units, exponent = units >> 1, exponent + 1
    if exponent > largest:
        return sign | infinity
    normal = units >> fraction_bits  # 0 of a denormal
    return sign | ((exponent - smallest + 1 if normal else 0) << fraction_bits) | (units & ((1 << fraction_bits) - 1))


def is_nan(bits: int, kind: str) -> bool:
    return math.isnan(decode(bits, kind))


def floats(f: Callable[..., float | Fraction], kind: str, to: str | None = None) -> Callable[..., int]:
    """`f` of the values of bits, computed without rounding, rounded once. Infinities and NaN go through float."""

    def bits(*args: int) -> int:
        values = [decode(x, kind) for x in args]
        if all(map(math.isfinite, values)):
            try:
                exact = f(*map(Fraction, values))
            except ZeroDivisionError:
                exact = None
            if isinstance(exact, (Fraction, int)) and exact != 0:
                return encode(Fraction(exact), to or kind)
        try:
            return encode(float(f(*values)), to or kind)
        except ZeroDivisionError:
            a, b = values
            nan = a == 0 or math.isnan(a)
            return encode(math.nan if nan else math.copysign(math.inf, a) * math.copysign(1, b), to or kind)

    return bits


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def integers(f: Callable[..., int], kind: str, to: int | None = None) -> Callable[..., int]:
    """`f` of unsigned (u32) or signed (s32) integers; the result's low bits."""
    bits = int(kind[1:])
    return lambda *args: f(*(signed(x, bits) if kind[0] == "s" else x for x in args)) & ((1 << (to or bits)) - 1)
