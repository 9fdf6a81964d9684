"""Arithmetic, comparisons and conversions against Python's integers, fractions and math."""

from __future__ import annotations

import itertools
import math
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from .emit import OPCODES, load_opcodes
from .exact import decode, encode, floats, integers, is_nan, signed
from .ptx_text import evaluate

FILES = ("instructions", "warp_instructions", "checks")
EDGES = {
    "u16": (0, 1, 2, 7, 0x7FFF, 0x8000, 0xFFFF), "u32": (0, 1, 2, 3, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF),
    "u64": (0, 1, 3, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
    "f32": (0, 0x80000000, 1, 0x80000001, 0x00800000, 0x3F800000, 0xBFC00000, 0x4B800000, 0x7F7FFFFF, 0x7F800000,
            0xFF800000, 0x7FC00000, 0x3F808000, 0x3F818000, 0x33800000, 0x387FC000),
    "f16": (0, 0x8000, 1, 0x3C00, 0xBC00, 0x7BFF, 0x7C00, 0x7E00, 0x0400, 0x3C01),
    "bf16": (0, 0x8000, 1, 0x3F80, 0xBF80, 0x7F7F, 0x7F80, 0x7FC0, 0x0080, 0x3F81),
    "f64": (0, 2**63, 0x3FF0000000000000, 0xBFF8000000000000, 0x7FF0000000000000, 0x7FF8000000000000),
}  # fmt: skip
EDGES |= {"s16": EDGES["u16"], "s32": EDGES["u32"], "s64": EDGES["u64"], "b32": EDGES["u32"], "b64": EDGES["u64"],
          "b16": EDGES["u16"], "pred": (0, 1)}  # fmt: skip


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else int(kind.lstrip("bfsu"))


def values(kind: str, count: int, chance: random.Random) -> list[int]:
    """Edge cases, then numbers of every size."""
    out = list(EDGES[kind])
    while len(out) < count:
        if kind[0] == "f" or kind == "bf16":
            out.append(encode(chance.uniform(-2, 2) * 2.0 ** chance.randint(-12, 12), kind))
        elif kind == "pred":
            out.append(chance.randint(0, 1))
        else:
            out.append(chance.getrandbits(chance.randint(1, bits_of(kind))))
    return out


def rows(kinds: tuple[str, ...]) -> list[tuple[int, ...]]:
    """All pairs of edge cases, and random operands."""
    chance = random.Random(0)
    columns = [values(kind, 96, chance) for kind in kinds]
    edges = [EDGES[kind] for kind in kinds]
    pairs = list(itertools.product(*edges)) if len(kinds) <= 2 else []
    chance.shuffle(columns[-1])
    shuffled = [tuple(chance.choice(column) for column in columns) for _ in range(120)]
    return pairs + list(zip(*columns, strict=True)) + shuffled


def _flush(x: int) -> int:
    return x & 0x80000000 if x & 0x7F800000 == 0 else x


def ftz(f):
    """With .ftz: denormal operands and results are zeros."""
    return lambda *args: _flush(f(*map(_flush, args)))


def saturate(f):
    def bits(*args: int) -> int:
        x = decode(f(*args), "f32")
        return encode(0.0 if math.isnan(x) else min(max(0.0, x), 1.0), "f32")

    return bits


def _pick(best, nan_wins: bool, kind: str = "f32"):
    def bits(a: int, b: int) -> int:
        x, y = decode(a, kind), decode(b, kind)
        if math.isnan(x) or math.isnan(y):
            if nan_wins or (math.isnan(x) and math.isnan(y)):
                return encode(math.nan, kind)
            return b if math.isnan(x) else a
        return encode(best(x, y), kind)

    return bits


def halves(f):
    """Of both halves of 32 bits."""
    return lambda *args: sum(f(*(x >> shift & 0xFFFF for x in args)) << shift for shift in (0, 16))


def _division(f):
    return lambda a, b: 0 if b == 0 else f(a, b)


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _extract(kind: str):
    def f(x: int, at: int, n: int) -> int:
        """The pseudocode of bfe in the PTX ISA."""
        most = bits_of(kind) - 1
        at, n = at & 255, n & 255
        sign = 0 if kind[0] == "u" or n == 0 else x >> min(at + n - 1, most) & 1
        return sum((x >> (at + i) & 1 if i < n and at + i <= most else sign) << i for i in range(most + 1))

    return f


def _insert(a: int, b: int, at: int, n: int) -> int:
    out = b
    for i in range(min(n, 32)):
        if at + i < 32:
            out = out & ~(1 << (at + i)) | (a >> i & 1) << (at + i)
    return out


def _permute(a: int, b: int, selector: int) -> int:
    data = (a | b << 32).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = data[nibble & 7]
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << (8 * i)
    return out


def _rounded_integer(how, kind: str, source: str = "f32"):
    """A float to an integer: rounded, clipped, NaN is 0."""
    bits = bits_of(kind)
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)

    def f(x: int) -> int:
        value = decode(x, source)
        if math.isnan(value):
            return 0
        if math.isinf(value):
            return (most if value > 0 else least) % 2**bits
        return min(max(how(Fraction(value)), least), most) % 2**bits

    return f


def _tf32(x: int) -> int:
    if x & 0x7F800000 == 0x7F800000:
        return x & 0xFFFFE000
    units, rest = divmod(x & 0x7FFFFFFF, 0x2000)
    return x & 0x80000000 | (units + (rest >= 0x1000)) * 0x2000


def _compare(f, kind: str, unordered: bool = False):
    if kind[0] in "us":
        return lambda a, b: f(*(signed(x, bits_of(kind)) if kind[0] == "s" else x for x in (a, b)))
    return lambda a, b: unordered if is_nan(a, kind) or is_nan(b, kind) else f(decode(a, kind), decode(b, kind))


def _shift(left: bool, kind: str):
    def f(x: int, by: int) -> int:
        bits = bits_of(kind)
        by = min(by, bits)
        x = signed(x, bits) if kind[0] == "s" else x
        return (x << by if left else x >> by) % 2**bits

    return f


ADD, MUL, FMA = (lambda a, b: a + b), (lambda a, b: a * b), (lambda a, b, c: a * b + c)
MASK32 = 2**32 - 1

# Instruction; the types of d, a, b, c; what d is. {t} stands for the type of a.
TABLE = [
    *((f"add.{t} d, a, b;", t, (t, t), integers(ADD, t)) for t in ("u16", "s32", "u32", "u64", "s64")),
    *((f"sub.{t} d, a, b;", t, (t, t), integers(lambda a, b: a - b, t)) for t in ("s32", "u64")),
    ("add.f32 d, a, b;", "f32", ("f32", "f32"), floats(ADD, "f32")),
    ("add.ftz.f32 d, a, b;", "f32", ("f32", "f32"), ftz(floats(ADD, "f32"))),
    ("add.sat.f32 d, a, b;", "f32", ("f32", "f32"), saturate(floats(ADD, "f32"))),
    ("sub.f32 d, a, b;", "f32", ("f32", "f32"), floats(lambda a, b: a - b, "f32")),
    ("add.f64 d, a, b;", "f64", ("f64", "f64"), floats(ADD, "f64")),
    ("mul.f32 d, a, b;", "f32", ("f32", "f32"), floats(MUL, "f32")),
    ("mul.ftz.f32 d, a, b;", "f32", ("f32", "f32"), ftz(floats(MUL, "f32"))),
    ("mul.f64 d, a, b;", "f64", ("f64", "f64"), floats(MUL, "f64")),
    ("fma.rn.f32 d, a, b, c;", "f32", ("f32",) * 3, floats(FMA, "f32")),
    ("fma.rn.ftz.f32 d, a, b, c;", "f32", ("f32",) * 3, ftz(floats(FMA, "f32"))),
    ("fma.rn.f16 d, a, b, c;", "f16", ("f16",) * 3, floats(FMA, "f16")),
    ("fma.rn.bf16 d, a, b, c;", "bf16", ("bf16",) * 3, floats(FMA, "bf16")),
    ("fma.rn.relu.bf16 d, a, b, c;", "bf16", ("bf16",) * 3,
     lambda *x: 0 if decode(y := floats(FMA, "bf16")(*x), "bf16") <= 0 else y),
    *((f"{op}.{t}x2 d, a, b;", f"{t}x2", ("b32", "b32"), halves(floats(f, t)))
      for op, f in (("add", ADD), ("mul", MUL), ("sub", lambda a, b: a - b)) for t in ("f16", "bf16")),
    ("mul.bf16 d, a, b;", "bf16", ("bf16", "bf16"), floats(MUL, "bf16")),
    *((f"mul.lo.{t} d, a, b;", t, (t, t), integers(MUL, t)) for t in ("u16", "s32", "s64")),
    *((f"mul.hi.{t} d, a, b;", t, (t, t), integers(lambda a, b, n=bits_of(t): a * b >> n, t))
      for t in ("u32", "s32", "u64", "s64")),
    *((f"mul.wide.{t} d, a, b;", f"b{2 * bits_of(t)}", (t, t), integers(MUL, t, 2 * bits_of(t)))
      for t in ("u16", "s16", "u32", "s32")),
    ("mad.lo.s32 d, a, b, c;", "s32", ("s32",) * 3, integers(FMA, "s32")),
    ("mad.wide.u32 d, a, b, c;", "u64", ("u32", "u32", "u64"), lambda a, b, c: (a * b + c) % 2**64),
    ("mad.wide.s32 d, a, b, c;", "s64", ("s32", "s32", "s64"),
     lambda a, b, c: (signed(a, 32) * signed(b, 32) + c) % 2**64),
    ("div.s32 d, a, b;", "s32", ("s32", "s32"), integers(_division(_truncated), "s32")),
    ("rem.s32 d, a, b;", "s32", ("s32", "s32"), integers(_division(lambda a, b: a - b * _truncated(a, b)), "s32")),
    ("div.u32 d, a, b;", "u32", ("u32", "u32"), integers(_division(lambda a, b: a // b), "u32")),
    ("rem.u64 d, a, b;", "u64", ("u64", "u64"), integers(_division(lambda a, b: a % b), "u64")),
    ("div.rn.f32 d, a, b;", "f32", ("f32", "f32"), floats(lambda a, b: a / b, "f32")),
    ("div.full.f32 d, a, b;", "f32", ("f32", "f32"), floats(lambda a, b: a / b, "f32")),
    *((f"{op}.{t} d, a, b;", t, (t, t), integers(f, t)) for op, f in (("min", min), ("max", max))
      for t in ("s32", "u32", "s64")),
    ("max.f32 d, a, b;", "f32", ("f32", "f32"), _pick(max, False)),
    ("min.f32 d, a, b;", "f32", ("f32", "f32"), _pick(min, False)),
    ("max.NaN.f32 d, a, b;", "f32", ("f32", "f32"), _pick(max, True)),
    ("min.NaN.f32 d, a, b;", "f32", ("f32", "f32"), _pick(min, True)),
    ("max.bf16 d, a, b;", "bf16", ("bf16", "bf16"), _pick(max, False, "bf16")),
    ("max.NaN.bf16x2 d, a, b;", "bf16x2", ("b32", "b32"), halves(_pick(max, True, "bf16"))),
    ("abs.s32 d, a;", "s32", ("s32",), integers(abs, "s32")),
    ("abs.f32 d, a;", "f32", ("f32",), lambda a: a & 0x7FFFFFFF),
    ("neg.s32 d, a;", "s32", ("s32",), integers(lambda a: -a, "s32")),
    ("neg.f32 d, a;", "f32", ("f32",), lambda a: a ^ 0x80000000),
    ("neg.bf16x2 d, a;", "bf16x2", ("b32",), lambda a: a ^ 0x80008000),
    ("abs.f16 d, a;", "f16", ("f16",), lambda a: a & 0x7FFF),
    ("not.b32 d, a;", "b32", ("b32",), lambda a: a ^ MASK32),
    ("not.pred d, a;", "pred", ("pred",), lambda a: 1 - a),
    ("cnot.b32 d, a;", "b32", ("b32",), lambda a: int(a == 0)),
    *((f"{op}.{t} d, a, b;", t, (t, t), integers(f, "u" + t[1:] if t != "pred" else "u1"))
      for op, f in (("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b))
      for t in ("b16", "b32", "b64", "pred")),
    *((f"shl.{t} d, a, b;", t, (t, "u32"), _shift(True, t)) for t in ("b32", "b64")),
    *((f"shr.{t} d, a, b;", t, (t, "u32"), _shift(False, t)) for t in ("u32", "s32", "s64", "b16")),
    *((f"bfe.{t} d, a, b, c;", t, (t, "u32", "u32"), _extract(t)) for t in ("u32", "s32", "u64")),
    ("prmt.b32 d, a, b, c;", "b32", ("b32",) * 3, _permute),
    ("lop3.b32 d, a, b, c, 0x96;", "b32", ("b32",) * 3, lambda a, b, c: a ^ b ^ c),
    ("lop3.b32 d, a, b, c, 0xca;", "b32", ("b32",) * 3, lambda a, b, c: a & b | ~a & c),
    ("lop3.b32 d, a, b, c, 0;", "b32", ("b32",) * 3, lambda a, b, c: 0),
    ("shf.l.wrap.b32 d, a, b, c;", "b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32 & MASK32),
    ("shf.r.wrap.b32 d, a, b, c;", "b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) >> (c & 31) & MASK32),
    ("shf.r.clamp.b32 d, a, b, c;", "b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) >> min(c, 32) & MASK32),
    ("popc.b32 d, a;", "u32", ("b32",), lambda a: bin(a).count("1")),
    ("clz.b32 d, a;", "u32", ("b32",), lambda a: 32 - a.bit_length()),
    ("clz.b64 d, a;", "u32", ("b64",), lambda a: 64 - a.bit_length()),
    ("brev.b32 d, a;", "b32", ("b32",), lambda a: int(f"{a:032b}"[::-1], 2)),
    ("copysign.f32 d, a, b;", "f32", ("f32", "f32"), lambda a, b: a & 0x80000000 | b & 0x7FFFFFFF),
    # Comparisons, of NaN too.
    *((f"setp.{name}.{t} d, a, b;", "pred", (t, t), _compare(f, t)) for name, f in (
        ("eq", lambda a, b: a == b), ("ne", lambda a, b: a != b), ("lt", lambda a, b: a < b),
        ("le", lambda a, b: a <= b), ("gt", lambda a, b: a > b), ("ge", lambda a, b: a >= b)
    ) for t in ("s32", "u32", "s64", "f32", "bf16", "f16")),
    *((f"setp.{name}.f32 d, a, b;", "pred", ("f32", "f32"), _compare(f, "f32", True)) for name, f in (
        ("equ", lambda a, b: a == b), ("neu", lambda a, b: a != b), ("ltu", lambda a, b: a < b),
        ("geu", lambda a, b: a >= b)
    )),
    ("setp.num.f32 d, a, b;", "pred", ("f32", "f32"), lambda a, b: not (is_nan(a, "f32") or is_nan(b, "f32"))),
    ("setp.nan.f32 d, a, b;", "pred", ("f32", "f32"), lambda a, b: is_nan(a, "f32") or is_nan(b, "f32")),
    ("setp.lt.and.s32 d, a, b, c;", "pred", ("s32", "s32", "pred"),
     lambda a, b, c: (signed(a, 32) < signed(b, 32)) and c),
    ("selp.b32 d, a, b, c;", "b32", ("b32", "b32", "pred"), lambda a, b, c: a if c else b),
    ("selp.f32 d, a, b, c;", "f32", ("f32", "f32", "pred"), lambda a, b, c: a if c else b),
    # Moves and conversions.
    ("mov.b32 d, a;", "b32", ("b32",), lambda a: a),
    ("mov.b64 d, {a, b};", "b64", ("b32", "b32"), lambda a, b: a | b << 32),
    ("cvta.to.global.u64 d, a;", "u64", ("u64",), lambda a: a),
    ("cvt.u64.u32 d, a;", "u64", ("u32",), lambda a: a),
    ("cvt.s64.s32 d, a;", "s64", ("s32",), lambda a: signed(a, 32) % 2**64),
    ("cvt.u32.u64 d, a;", "u32", ("u64",), lambda a: a % 2**32),
    ("cvt.u32.u16 d, a;", "u32", ("u16",), lambda a: a),
    ("cvt.s32.s16 d, a;", "s32", ("s16",), lambda a: signed(a, 16) % 2**32),
    ("cvt.u16.u32 d, a;", "u16", ("u32",), lambda a: a % 2**16),
    ("cvt.rn.f32.s32 d, a;", "f32", ("s32",), lambda a: encode(Fraction(signed(a, 32)), "f32")),
    ("cvt.rn.f32.u32 d, a;", "f32", ("u32",), lambda a: encode(Fraction(a), "f32")),
    ("cvt.rn.f64.s64 d, a;", "f64", ("s64",), lambda a: encode(Fraction(signed(a, 64)), "f64")),
    *((f"cvt.{how}.{to}.f32 d, a;", to, ("f32",), _rounded_integer(f, to)) for how, f in (
        ("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)
    ) for to in ("s32", "u32", "s64")),
    ("cvt.rn.bf16.f32 d, a;", "bf16", ("f32",), floats(lambda a: a, "f32", "bf16")),
    ("cvt.rn.f16.f32 d, a;", "f16", ("f32",), floats(lambda a: a, "f32", "f16")),
    ("cvt.f32.bf16 d, a;", "f32", ("bf16",), floats(lambda a: a, "bf16", "f32")),
    ("cvt.f32.f16 d, a;", "f32", ("f16",), floats(lambda a: a, "f16", "f32")),
    ("cvt.f64.f32 d, a;", "f64", ("f32",), floats(lambda a: a, "f32", "f64")),
    ("cvt.rn.f32.f64 d, a;", "f32", ("f64",), floats(lambda a: a, "f64", "f32")),
    ("cvt.rn.f16.s32 d, a;", "f16", ("s32",), lambda a: encode(Fraction(signed(a, 32)), "f16")),
    ("cvt.rn.bf16x2.f32 d, a, b;", "bf16x2", ("f32", "f32"), lambda a, b:
     floats(lambda x: x, "f32", "bf16")(a) << 16 | floats(lambda x: x, "f32", "bf16")(b)),
    ("cvt.rn.f16x2.f32 d, a, b;", "f16x2", ("f32", "f32"), lambda a, b:
     floats(lambda x: x, "f32", "f16")(a) << 16 | floats(lambda x: x, "f32", "f16")(b)),
    ("cvt.rna.tf32.f32 d, a;", "tf32", ("f32",), _tf32),
]  # fmt: skip


def agree(got: int, want: int, kind: str, zeros: bool = False) -> bool:
    """zeros: of either sign are alike. Of min and max the machine does not order them."""
    if kind.endswith("x2"):
        return all(agree(got >> s & 0xFFFF, want >> s & 0xFFFF, kind[:-2], zeros) for s in (0, 16))
    if kind in ("f16", "bf16", "f32", "f64"):
        if zeros and decode(got, kind) == decode(want, kind) == 0:
            return True
        return got == want or (is_nan(got, kind) and is_nan(want, kind))
    if kind == "tf32":
        return got == want or (is_nan(got, "f32") and is_nan(want, "f32"))
    return got == want


@pytest.mark.parametrize("text, result, operands, expected", TABLE, ids=[row[0].rstrip(";") for row in TABLE])
def test_exactly(text, result, operands, expected):
    given = rows(operands)
    if text.startswith(("div.s32", "rem.s32")):
        given = [(a, b) for a, b in given if (a, b) != (0x80000000, 0xFFFFFFFF)]
    if text.startswith(("div.s", "div.u", "rem")):
        given = [(a, b) for a, b in given if b]  # the ISA leaves it open
    bits = 32 if result.endswith("x2") or result == "tf32" else bits_of(result)
    got = evaluate(text, bits, [bits_of(kind) for kind in operands], given)
    wrong = [(row, hex(x), hex(int(expected(*row)))) for row, x in zip(given, got, strict=True)
             if not agree(x, int(expected(*row)), result, text.startswith(("min", "max")))]  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(given)} differ, (operands, got, expected): {wrong[:3]}"


def test_bits_are_inserted():
    chance = random.Random(0)
    for at, n in ((0, 32), (5, 3), (31, 1), (31, 9), (7, 0), (0, 1)):
        given = [(chance.getrandbits(32), chance.getrandbits(32)) for _ in range(32)]
        got = evaluate(f"bfi.b32 d, a, b, {at}, {n};", 32, [32, 32], given)
        assert got == [_insert(a, b, at, n) for a, b in given], (at, n)


def test_a_register_is_split():
    given = [(x,) for x in EDGES["u64"]]
    assert evaluate("mov.b64 {%r70, d}, a;", 32, [64], given) == [x >> 32 for (x,) in given]
    assert evaluate("mov.b32 {d, %h9}, a;", 16, [32], [(x & MASK32,) for (x,) in given]) == [
        x & 0xFFFF for (x,) in given
    ]


# The hardware's functions are approximate; here they are the nearest float, or one beside it.
FUNCTIONS = {
    "ex2.approx.f32": lambda x: 2.0**x, "ex2.approx.ftz.f32": lambda x: 2.0**x, "lg2.approx.f32": math.log2,
    "rcp.approx.f32": lambda x: 1 / x, "rcp.rn.f32": lambda x: 1 / x, "rsqrt.approx.f32": lambda x: x**-0.5,
    "sqrt.rn.f32": math.sqrt, "sqrt.approx.f32": math.sqrt, "tanh.approx.f32": math.tanh, "sin.approx.f32": math.sin,
    "cos.approx.f32": math.cos,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    chance = random.Random(0)
    given = [(encode(chance.uniform(0.01, 30), "f32"),) for _ in range(64)]
    got = evaluate(f"{name} d, a;", 32, [32], given)
    for (a,), x in zip(given, got, strict=True):
        assert abs(x - encode(FUNCTIONS[name](decode(a, "f32")), "f32")) <= 1, (decode(a, "f32"), decode(x, "f32"))


def test_functions_at_the_edges():
    inf, minus_inf, nan = 0x7F800000, 0xFF800000, 0x7FC00000
    edges = (
        ("ex2.approx.f32", minus_inf, 0), ("ex2.approx.f32", inf, inf), ("lg2.approx.f32", 0, minus_inf),
        ("rcp.approx.f32", 0, inf), ("rsqrt.approx.f32", 0, inf), ("rcp.approx.f32", 0x80000000, minus_inf),
        ("ex2.approx.ftz.f32", 0xC3020000, 0), ("rsqrt.approx.ftz.f32", 1, inf),
    )  # fmt: skip
    for name, a, want in edges:
        assert evaluate(f"{name} d, a;", 32, [32], [(a,)]) == [want], name
    assert is_nan(evaluate("lg2.approx.f32 d, a;", 32, [32], [(0xBF800000,)])[0], "f32")
    assert is_nan(evaluate("sqrt.rn.f32 d, a;", 32, [32], [(nan,)])[0], "f32")
    assert evaluate("ex2.approx.ftz.bf16x2 d, a;", 32, [32], [(0x3F804000,)]) == [0x40004080]


def test_every_opcode_is_tested():
    """Each stands, with an operand or a modifier, in a string of one of the files that test the machine."""
    load_opcodes()
    text = "".join((Path(__file__).parent / f"test_{name}.py").read_text() for name in FILES)
    text += " ".join(row[0] for row in TABLE)
    assert not [opcode for opcode in OPCODES if not re.search(rf"(?<![\w.]){opcode}(\.\w|;| %)", text)]
