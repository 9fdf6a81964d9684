"""Which registers an instruction reads and writes, and the names and types they have in the generated Python."""

from __future__ import annotations

import functools
import re

from .parse import Entry, Instruction, Memory

# PTX type -> NumPy type. "p" is a predicate. 16-bit floats are kept as bits.
TYPES = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "u2", "bf16": "u2", "b32": "u4",
    "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8", "pred": "p",
    "f16x2": "u4", "bf16x2": "u4",
}  # fmt: skip
NARROW_FLOATS = ("bf16", "f16", "bf16x2", "f16x2")
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid|clusterid\.[xyz]|cluster_ctarank)$")
_WRITE_NO_REGISTER = (
    "st", "red", "bra", "brx", "ret", "exit", "cp", "bar", "barrier", "fence", "stmatrix", "membar", "trap",
    "setmaxnreg",
)  # fmt: skip


def size_of(t: str) -> int:
    """Bytes of a NumPy type."""
    return 1 if t == "p" else int(t[1])


@functools.cache
def python_name(register: str) -> str:
    return "r_" + re.sub(r"\W", "_", register.lstrip("%"))


def named(each: Instruction, entry: Entry, first: int = 0) -> list[str]:
    """All registers in an instruction's guard, and in its operands from one on; an operand `a|b` is two of them."""
    out = [each.guard] if each.guard else []
    for x in each.args[first:]:
        for y in x if isinstance(x, list) else [x.base, *x.at] if isinstance(x, Memory) else x.split("|"):
            y = y.lstrip("!")
            if (y.startswith("%") or y in entry.registers) and not SPECIAL.match(y):
                out.append(y)
    return out


def written(each: Instruction) -> set[str]:
    if not each.args or each.mods[0] in _WRITE_NO_REGISTER or isinstance(each.args[0], Memory):
        return set()
    first = each.args[0]
    return set(first if isinstance(first, list) else first.split("|"))


def read(each: Instruction, entry: Entry) -> set[str]:
    first = 1 if written(each) and each.mods[0] != "wgmma" else 0  # what wgmma writes is also an operand
    return set(named(each, entry, first))
