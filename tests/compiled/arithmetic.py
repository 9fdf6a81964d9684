"""The functions that the generated Python calls, by the names it calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats

FUNCTIONS: dict[str, Any] = {
    **{t: np.dtype(t) for t in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")},
    **{name: getattr(np, name) for name in ("where", "abs", "sqrt", "rint", "trunc", "floor", "ceil", "copysign")},
    **{name: getattr(floats, name) for name in ("ftz", "narrow", "widen", "joined", "rounded_tf32")},
    "minimum_": np.minimum, "maximum_": np.maximum,  # NaN if an operand is
    "fminimum_": np.fmin, "fmaximum_": np.fmax,  # the other operand if one is NaN
    "True_": np.array([True]),
}  # fmt: skip


def called(f: Callable[..., Any]) -> Callable[..., Any]:
    FUNCTIONS[f.__name__] = f
    return f


@called
def both(M: np.ndarray | None, guard: np.ndarray) -> np.ndarray:
    return guard if M is None else M & guard


# --- floats ----------------------------------------------------------------------------------------------------------


@called
def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c. The product is exact in float64, so float32 is rounded once, but for about one result in 2^29."""
    return (a.astype("f8") * b + c).astype(a.dtype)


@called
def fma_to_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of narrow floats in float64, which holds the product. An inexact sum becomes the neighbour with an odd
    last bit, so that to round it once more is to round it once."""
    product = a * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = np.ascontiguousarray(total).view("u8") & np.uint64(1) == 0
    inexact = even & (error != 0) & np.isfinite(total)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)


@called
def saturated(x: np.ndarray) -> np.ndarray:
    return np.fmin(np.fmax(x, np.float32(0)), np.float32(1))


@called
def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


@called
def narrow_arithmetic(kind: str, formula: Callable[..., np.ndarray], *args: np.ndarray) -> np.ndarray:
    """`formula` of one (bf16) or two (bf16x2) narrow floats in float64, the result rounded once."""
    one = kind.removesuffix("x2")

    def result(*parts: np.ndarray) -> np.ndarray:
        return floats.narrow(formula(*(floats.widen(x, one).astype("f8") for x in parts)), one)

    if one == kind:
        return result(*args)
    return floats.joined(*(result(*part) for part in zip(*(floats.halves(x) for x in args), strict=True)))


def _in_float64(f: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: f(x.astype("f8")).astype(x.dtype)


# The hardware's .approx functions are off by some ulps; these are exact, rounded once.
for _name, _f in {
    "ex2_": np.exp2, "lg2_": np.log2, "rcp_": np.reciprocal, "rsqrt_": lambda x: 1 / np.sqrt(x), "sqrt_": np.sqrt,
    "tanh_": np.tanh, "sin_": np.sin, "cos_": np.cos,
}.items():  # fmt: skip
    FUNCTIONS[_name] = _in_float64(_f)


# --- integers --------------------------------------------------------------------------------------------------------


@called
def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero."""
    q = a // b
    return q + ((q < 0) & (q * b != a)).astype(q.dtype) if a.dtype.kind == "i" else q


@called
def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - quotient(a, b) * b


@called
def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The high 64 of 128 bits."""
    return np.array([int(x) * int(y) >> 64 for x, y in np.broadcast(a, b)], a.dtype)


@called
def shift_by(by: np.ndarray, dtype: Any, bits: int) -> np.ndarray:
    """PTX clamps the shift to the width; NumPy makes zeros, or signs, of that as PTX does."""
    return np.minimum(by, np.uint32(bits)).astype(dtype)


@called
def bit_field(x: np.ndarray, at: np.ndarray, n: np.ndarray) -> np.ndarray:
    """bfe: n bits of x from bit `at` on; of a signed x the last of them is the sign."""
    bits = 8 * x.itemsize
    at, n = (at & np.uint32(255)).astype("i8"), (n & np.uint32(255)).astype("i8")
    left = np.clip(bits - at - n, 0, bits)
    right = np.clip(np.where(at + n > bits, at, bits - n), 0, bits)
    shifted = x << left.astype(x.dtype) >> right.astype(x.dtype)
    return np.where(n == 0, x.dtype.type(0), shifted)


@called
def with_bit_field(a: np.ndarray, b: np.ndarray, at: np.ndarray, n: np.ndarray) -> np.ndarray:
    """bfi: b, with n bits from bit `at` on replaced by the low bits of a."""
    one = b.dtype.type(1)
    bits = np.uint32(8 * b.itemsize)
    at, n = np.minimum(at, bits).astype(b.dtype), np.minimum(n, bits).astype(b.dtype)
    mask = ((one << n) - one) << at
    return (b & ~mask) | (a << at & mask)


@called
def permuted_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each nibble of the selector picks a byte of the pair, or its sign eight times."""
    pair = a.astype("u8") | b.astype("u8") << np.uint64(32)
    out = np.zeros(1, "u4")
    for i in range(4):
        s = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (pair >> (s & np.uint32(7)).astype("u8") * np.uint64(8)).astype("u1")
        byte = np.where(s & np.uint32(8), (byte.view("i1") >> np.int8(7)).view("u1"), byte)
        out = out | byte.astype("u4") << np.uint32(8 * i)
    return out


@called
def funnel_shift(low: np.ndarray, high: np.ndarray, by: np.ndarray, left: bool, wrap: bool) -> np.ndarray:
    by = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype("u8")
    pair = low.astype("u8") | high.astype("u8") << np.uint64(32)
    return ((pair << by) >> np.uint64(32)).astype("u4") if left else (pair >> by).astype("u4")


@called
def popc_(x: np.ndarray) -> np.ndarray:
    return np.array([int(v).bit_count() for v in x], "u4")


@called
def clz_(x: np.ndarray) -> np.ndarray:
    return np.array([8 * x.itemsize - int(v).bit_length() for v in x], "u4")


@called
def brev_(x: np.ndarray) -> np.ndarray:
    bits = 8 * x.itemsize
    return np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in x], x.dtype)


# --- conversions -----------------------------------------------------------------------------------------------------


@called
def split(x: np.ndarray, part: Any, count: int) -> list[np.ndarray]:
    """A wide register as `count` narrow ones, the low bits first."""
    bits = x.dtype.type(8 * part.itemsize)
    return [(x >> x.dtype.type(i) * bits).astype(part) for i in range(count)]


@called
def merged(parts: list[np.ndarray], whole: Any) -> np.ndarray:
    out = parts[0].astype(whole)
    for i, x in enumerate(parts[1:], 1):
        out = out | x.astype(whole) << whole.type(i * 8 * x.itemsize)
    return out


@called
def to_integer(x: np.ndarray, dtype: Any) -> np.ndarray:
    """A float that holds an integer; what does not fit is clipped, NaN is 0."""
    limits = np.iinfo(dtype)
    wide = np.nan_to_num(x.astype("f8"), nan=0.0, posinf=1e300, neginf=-1e300)
    out = np.clip(wide, float(limits.min), float(limits.max)).astype(dtype)
    out = np.where(wide >= float(limits.max), limits.max, out)
    return np.where(wide <= float(limits.min), limits.min, out).astype(dtype)
