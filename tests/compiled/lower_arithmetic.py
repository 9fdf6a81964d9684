"""Arithmetic and logic."""

from __future__ import annotations

from .emit import Lines, opcode, unsupported
from .parse import Instruction
from .registers import NARROW_FLOATS, TYPES, size_of


def _unsigned(t: str) -> str:
    """Sums and products of two's complement numbers have the same low bits as unsigned ones."""
    return "u" + t[1] if t[0] == "i" else t


def _wide(t: str) -> str:
    return f"{t[0]}{2 * size_of(t)}"


def rounded(mods: list[str], value: str) -> str:
    """The .ftz and .sat of a float result."""
    value = f"ftz({value})" if "ftz" in mods else value
    return f"saturated({value})" if "sat" in mods and "f32" in mods else value


def _float_operand(g: Lines, x: str, t: str, mods: list[str]) -> str:
    """With .ftz denormal inputs are zeros."""
    return f"ftz({g.get(x, t)})" if "ftz" in mods else g.get(x, t)


def _narrow(g: Lines, i: Instruction, kind: str, formula: str) -> None:
    """Arithmetic of one or two bf16 or f16."""
    t = "u4" if kind.endswith("x2") else "u2"
    args = ", ".join(g.get(x, t) for x in i.args[1:])
    g.put(i.args[0], t, f"narrow_arithmetic({kind!r}, lambda a, b=None, c=None: {formula}, {args})")


@opcode("add", "sub", "and", "or", "xor")
def _binary(g: Lines, i: Instruction, mods: list[str]) -> None:
    sign = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}[mods[0]]
    if mods[-1] in NARROW_FLOATS:
        return _narrow(g, i, mods[-1], f"a {sign} b")
    if "cc" in mods or {"rz", "rm", "rp"} & set(mods) or ("sat" in mods and "s32" in mods):
        raise unsupported(i)
    t = _unsigned(TYPES[mods[-1]])
    a, b = (_float_operand(g, x, t, mods) for x in i.args[1:])
    return g.put(i.args[0], t, rounded(mods, f"{a} {sign} {b}"))


def _product(g: Lines, mods: list[str], x: str, y: str) -> tuple[str, str]:
    """The type and the formula of an integer product, or of a float one."""
    t = TYPES[mods[-1]]
    if "wide" in mods:
        w = _wide(t)
        return w, f"{g.get(x, t)}.astype({w}) * {g.get(y, t)}"
    if "hi" in mods:
        if size_of(t) == 8:
            return t, f"high_product({g.get(x, t)}, {g.get(y, t)})"
        w = _wide(t)
        return t, f"({g.get(x, t)}.astype({w}) * {g.get(y, t)} >> {g.program.constant(8 * size_of(t), w)}).astype({t})"
    t = _unsigned(t)
    return t, f"{_float_operand(g, x, t, mods)} * {_float_operand(g, y, t, mods)}"


@opcode("mul")
def _mul(g: Lines, i: Instruction, mods: list[str]) -> None:
    if mods[-1] in NARROW_FLOATS:
        return _narrow(g, i, mods[-1], "a * b")
    if {"rz", "rm", "rp"} & set(mods):
        raise unsupported(i)
    t, value = _product(g, mods, *i.args[1:])
    return g.put(i.args[0], t, rounded(mods, value))


@opcode("mad", "fma")
def _mad(g: Lines, i: Instruction, mods: list[str]) -> None:
    if {"rz", "rm", "rp", "cc"} & set(mods) or ("sat" in mods and "s32" in mods):
        raise unsupported(i)
    if mods[-1] in NARROW_FLOATS:
        return _narrow(g, i, mods[-1], "relu(fma_to_odd(a, b, c))" if "relu" in mods else "fma_to_odd(a, b, c)")
    if mods[-1] in ("f32", "f64"):
        t = TYPES[mods[-1]]
        a, b, c = (_float_operand(g, x, t, mods) for x in i.args[1:])
        return g.put(i.args[0], t, rounded(mods, f"fma({a}, {b}, {c})"))
    t, value = _product(g, mods, *i.args[1:3])
    return g.put(i.args[0], t, f"{value} + {g.get(i.args[3], t)}")


@opcode("div", "rem")
def _div(g: Lines, i: Instruction, mods: list[str]) -> None:
    t = TYPES[mods[-1]]
    a, b = (_float_operand(g, x, t, mods) for x in i.args[1:])
    if t[0] == "f":
        return g.put(i.args[0], t, rounded(mods, f"{a} / {b}"))
    return g.put(i.args[0], t, f"{'quotient' if mods[0] == 'div' else 'remainder'}({a}, {b})")


@opcode("min", "max")
def _extreme(g: Lines, i: Instruction, mods: list[str]) -> None:
    name = f"{'' if 'NaN' in mods else 'f'}{mods[0]}imum_"
    if "xorsign" in mods or len(i.args) > 3:
        raise unsupported(i)
    if mods[-1] in NARROW_FLOATS:
        return _narrow(g, i, mods[-1], f"{name}(a, b)")
    t = TYPES[mods[-1]]
    a, b = (_float_operand(g, x, t, mods) for x in i.args[1:])
    value = f"{name}({a}, {b})" if t[0] == "f" else f"{mods[0]}imum_({a}, {b})"
    value = f"maximum_({value}, {g.program.constant(0, t)})" if "relu" in mods else value
    return g.put(i.args[0], t, rounded(mods, value))


@opcode("abs", "neg", "not", "cnot")
def _unary(g: Lines, i: Instruction, mods: list[str]) -> None:
    t = TYPES[mods[-1]]
    x = g.get(i.args[1], t)
    if mods[-1] in NARROW_FLOATS:
        signs = g.program.constant(0x80008000 if t == "u4" else 0x8000, t)
        return g.put(i.args[0], t, f"{x} ^ {signs}" if mods[0] == "neg" else f"{x} & ~{signs}")
    if mods[0] == "cnot":
        return g.put(i.args[0], t, f"({x} == 0).astype({t})")
    return g.put(i.args[0], t, rounded(mods, {"abs": f"abs({x})", "neg": f"-{x}", "not": f"~{x}"}[mods[0]]))


@opcode("shl", "shr")
def _shift(g: Lines, i: Instruction, mods: list[str]) -> None:
    t = TYPES[mods[-1]]
    by = g.get(i.args[2], "u4")
    sign = "<<" if mods[0] == "shl" else ">>"
    g.put(i.args[0], t, f"{g.get(i.args[1], t)} {sign} shift_by({by}, {t}, {8 * size_of(t)})")


@opcode("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos")
def _special_function(g: Lines, i: Instruction, mods: list[str]) -> None:
    if mods[-1] in NARROW_FLOATS:
        return _narrow(g, i, mods[-1], f"{mods[0]}_(a)")
    t = TYPES[mods[-1]]
    return g.put(i.args[0], t, rounded(mods, f"{mods[0]}_({_float_operand(g, i.args[1], t, mods)})"))


@opcode("copysign")
def _copysign(g: Lines, i: Instruction, mods: list[str]) -> None:
    """The sign of the first operand, the rest of the second."""
    t = TYPES[mods[-1]]
    g.put(i.args[0], t, f"copysign({g.get(i.args[2], t)}, {g.get(i.args[1], t)})")


@opcode("bfe")
def _bfe(g: Lines, i: Instruction, mods: list[str]) -> None:
    t = TYPES[mods[-1]]
    x, at, n = g.get(i.args[1], t), g.get(i.args[2], "u4"), g.get(i.args[3], "u4")
    g.put(i.args[0], t, f"bit_field({x}, {at}, {n})")


@opcode("bfi")
def _bfi(g: Lines, i: Instruction, mods: list[str]) -> None:
    t = TYPES[mods[-1]]
    a, b, at, n = (g.get(x, u) for x, u in zip(i.args[1:], (t, t, "u4", "u4"), strict=True))
    g.put(i.args[0], t, f"with_bit_field({a}, {b}, {at}, {n})")


@opcode("prmt")
def _prmt(g: Lines, i: Instruction, mods: list[str]) -> None:
    if len(mods) > 2:
        raise unsupported(i)
    g.put(i.args[0], "u4", f"permuted_bytes({', '.join(g.get(x, 'u4') for x in i.args[1:])})")


@opcode("lop3")
def _lop3(g: Lines, i: Instruction, mods: list[str]) -> None:
    """Any function of three bits: bit 4 a + 2 b + c of the table is its value for a, b, c."""
    table = int(i.args[4], 0)
    names = [g.get(x, "u4") for x in i.args[1:4]]
    terms = [
        " & ".join(x if row >> (2 - j) & 1 else f"~{x}" for j, x in enumerate(names))
        for row in range(8)
        if table >> row & 1
    ]
    g.put(i.args[0], "u4", " | ".join(f"({x})" for x in terms) or g.program.constant(0, "u4"))


@opcode("shf")
def _shf(g: Lines, i: Instruction, mods: list[str]) -> None:
    low, high, by = (g.get(x, "u4") for x in i.args[1:])
    g.put(i.args[0], "u4", f"funnel_shift({low}, {high}, {by}, {mods[1] == 'l'}, {mods[2] == 'wrap'})")


@opcode("popc", "clz", "brev")
def _bits(g: Lines, i: Instruction, mods: list[str]) -> None:
    t = TYPES[mods[-1]]
    g.put(i.args[0], t if mods[0] == "brev" else "u4", f"{mods[0]}_({g.get(i.args[1], t)})")
