"""Comparisons, selections, moves and conversions."""

from __future__ import annotations

import re

from .emit import Lines, opcode, unsupported
from .parse import Instruction
from .registers import TYPES, size_of

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
            "hs": ">="}  # fmt: skip
_ROUND = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
_BOOLEAN = {"and": "&", "or": "|", "xor": "^"}


@opcode("setp")
def _setp(g: Lines, i: Instruction, mods: list[str]) -> None:
    if "|" in i.args[0]:
        raise unsupported(i)
    t, how = TYPES[mods[-1]], mods[1]
    a, b = g.get(i.args[1], t), g.get(i.args[2], t)
    if mods[-1] in ("bf16", "f16"):
        a, b, t = f"widen({a}, {mods[-1]!r})", f"widen({b}, {mods[-1]!r})", "f4"
    if "ftz" in mods:
        a, b = f"ftz({a})", f"ftz({b})"
    if how in ("num", "nan"):
        value = f"({a} == {a}) & ({b} == {b})" if how == "num" else f"({a} != {a}) | ({b} != {b})"
    elif t[0] == "f" and how == "ne":  # false where an operand is NaN
        value = f"({a} != {b}) & ({a} == {a}) & ({b} == {b})"
    elif t[0] == "f" and how[-1] == "u":  # true where an operand is NaN
        value = f"({a} {_COMPARE[how[:-1]]} {b}) | ({a} != {a}) | ({b} != {b})"
    else:
        value = f"{a} {_COMPARE[how]} {b}"
    if len(i.args) == 4:
        value = f"({value}) {_BOOLEAN[mods[2]]} {g.predicate(i.args[3])}"
    g.put(i.args[0], "p", value)


@opcode("selp")
def _selp(g: Lines, i: Instruction, mods: list[str]) -> None:
    t = TYPES[mods[-1]]
    g.put(i.args[0], t, f"where({g.predicate(i.args[3])}, {g.get(i.args[1], t)}, {g.get(i.args[2], t)})")


@opcode("mov")
def _mov(g: Lines, i: Instruction, mods: list[str]) -> None:
    to, source = i.args
    t = TYPES[mods[-1]]
    if isinstance(to, list):
        part = f"u{size_of(t) // len(to)}"
        g.say(f"T = split({g.get(source, t)}, {part}, {len(to)})")
        for j, x in enumerate(to):
            g.put(x, part, f"T[{j}]")
    elif isinstance(source, list):
        part = f"u{size_of(t) // len(source)}"
        g.put(to, t, f"merged([{', '.join(g.get(x, part) for x in source)}], {t})")
    else:
        if t == "u4" and "f4" in (g.program.storage[to], g.program.storage.get(source)):
            t = g.program.storage[to] if re.match("%|0[fF]", source) else t
        g.put(to, t, g.get(source, t))


@opcode("cvta")
def _cvta(g: Lines, i: Instruction, mods: list[str]) -> None:
    if "shared" in mods:
        raise unsupported(i)
    g.put(i.args[0], "u8", g.get(i.args[1], "u8"))


@opcode("cvt")
def _cvt(g: Lines, i: Instruction, mods: list[str]) -> None:
    to, source = mods[-2], mods[-1]
    if "satfinite" in mods:
        raise unsupported(i)
    if to in ("bf16x2", "f16x2"):
        return _two_narrow(g, i, mods, to[:-2])
    if to == "tf32":
        if "rna" not in mods:
            raise unsupported(i)
        return g.put(i.args[0], "f4", f"rounded_tf32({g.get(i.args[1], 'f4')})")
    x = g.get(i.args[1], TYPES[source])
    x = f"widen({x}, {source!r})" if source in ("f16", "bf16") else x
    floats = ("f16", "bf16", "f32", "f64")
    if source in floats and to in floats:
        return _float_to_float(g, i, mods, x)
    if source in floats:
        x = f"ftz({x})" if "ftz" in mods else x
        how = next(_ROUND[name] for name in mods if name in _ROUND)
        return g.put(i.args[0], TYPES[to], f"to_integer({how}({x}), {TYPES[to]})")
    if "sat" in mods:
        raise unsupported(i)
    if to in ("f16", "bf16"):
        return g.put(i.args[0], "u2", f"narrow({x}.astype(f8), {to!r})")
    if to in floats:
        if "rn" not in mods:
            raise unsupported(i)
        return g.put(i.args[0], TYPES[to], f"{x}.astype({TYPES[to]})")
    kind = TYPES[source][0]  # the source's sign decides what fills the new bits
    return g.put(i.args[0], TYPES[to], f"{x}.astype({kind}{size_of(TYPES[to])}).view({TYPES[to]})")


def _two_narrow(g: Lines, i: Instruction, mods: list[str], one: str) -> None:
    """Two float32 into one register, the first operand into the high half."""
    if "relu" in mods or "rn" not in mods:
        raise unsupported(i)
    high, low = (g.get(x, "f4") for x in i.args[1:])
    g.put(i.args[0], "u4", f"joined(narrow({low}, {one!r}), narrow({high}, {one!r}))")


def _float_to_float(g: Lines, i: Instruction, mods: list[str], x: str) -> None:
    to = mods[-2]
    x = f"ftz({x})" if "ftz" in mods and mods[-1] == "f32" else x
    if to in ("f16", "bf16"):
        if "rn" not in mods or "sat" in mods:
            raise unsupported(i)
        return g.put(i.args[0], "u2", f"narrow({x}, {to!r})")
    if {"rz", "rm", "rp"} & set(mods):
        raise unsupported(i)
    for name, how in _ROUND.items():
        x = f"{how}({x})" if name in mods else x
    value = f"({x}).astype({TYPES[to]})"
    return g.put(i.args[0], TYPES[to], f"saturated({value})" if "sat" in mods else value)
