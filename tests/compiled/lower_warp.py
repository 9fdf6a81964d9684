"""What a warp does together: shuffles, votes, matrix loads, tensor cores; and control flow."""

from __future__ import annotations

import re

from .emit import Lines, opcode, unsupported
from .lower_memory import vector
from .parse import Instruction
from .registers import TYPES


@opcode("bar", "barrier", "membar", "griddepcontrol", "setmaxnreg", "discard", "prefetch", "nanosleep")
def _nothing(g: Lines, i: Instruction, mods: list[str]) -> None:
    """The scheduler runs barriers; warps run in lockstep; the others change no result."""


@opcode("shfl")
def _shfl(g: Lines, i: Instruction, mods: list[str]) -> None:
    if "|" in i.args[0]:
        raise unsupported(i)
    t = g.program.storage.get(i.args[1], "u4")
    by, clamp = g.get(i.args[2], "u4"), g.get(i.args[3], "u4")
    g.put(i.args[0], t, f"m.shuffle({g.k}, {g.get(i.args[1], t)}, {mods[2]!r}, {by}, {clamp}, {g.mask})")


@opcode("redux")
def _redux(g: Lines, i: Instruction, mods: list[str]) -> None:
    t = TYPES[mods[-1]]
    if "abs" in mods or t == "f4":
        raise unsupported(i)
    g.put(i.args[0], t, f"m.reduce({g.k}, {g.get(i.args[1], t)}, {mods[2]!r}, {g.mask})")


@opcode("vote")
def _vote(g: Lines, i: Instruction, mods: list[str]) -> None:
    if mods[2] not in ("all", "any", "ballot"):
        raise unsupported(i)
    call = f"m.vote({g.k}, {g.predicate(i.args[1])}, {mods[2]!r}, {g.mask})"
    g.put(i.args[0], "u4" if "ballot" in mods else "p", call)


@opcode("elect")
def _elect(g: Lines, i: Instruction, mods: list[str]) -> None:
    lane, chosen = i.args[0].split("|")
    g.put(chosen, "p", f"m.elect({g.k}, {g.mask})")
    if lane != "_":
        g.put(lane, "u4", g.program.constant(0, "u4"))


@opcode("ldmatrix")
def _ldmatrix(g: Lines, i: Instruction, mods: list[str]) -> None:
    if "b16" not in mods or "m8n8" not in mods:
        raise unsupported(i)
    to = vector(i.args[0])
    g.put_all(to, "u4", f"m.load_matrix({g.k}, {g.address(i.args[1], 'u4')}, {len(to)}, {'trans' in mods}, {g.mask})")


@opcode("stmatrix")
def _stmatrix(g: Lines, i: Instruction, mods: list[str]) -> None:
    if "b16" not in mods or "m8n8" not in mods:
        raise unsupported(i)
    values = g.get_all(vector(i.args[1]), "u4")
    g.say(f"m.store_matrix({g.k}, {g.address(i.args[0], 'u4')}, {values}, {'trans' in mods}, {g.mask})")


def _operand_type(i: Instruction, mods: list[str]) -> tuple[str, int]:
    """The type of a product's operands, and k."""
    shape = next(x for x in mods if re.match(r"m\d+n\d+k\d+$", x))
    rest = mods[mods.index(shape) + 1 :]
    kind = next((x for x in rest if x in ("bf16", "f16", "tf32")), None)
    if kind is None or "f32" not in rest or ("wgmma" not in mods and rest[-1] != "f32") or "sp" in mods:
        raise unsupported(i)
    return kind, int(shape.partition("k")[2])


@opcode("mma")
def _mma(g: Lines, i: Instruction, mods: list[str]) -> None:
    kind, _ = _operand_type(i, mods)
    if "m16n8" not in i.op or "row.col" not in i.op:
        raise unsupported(i)
    a, b = (g.get_all(args, "u4") for args in i.args[1:3])
    g.put_all(i.args[0], "f4", f"m.mma({g.k}, {kind!r}, {a}, {b}, {g.get_all(i.args[3], 'f4')}, {g.mask})")


@opcode("wgmma")
def _wgmma(g: Lines, i: Instruction, mods: list[str]) -> None:
    if mods[1] == "fence":
        return g.say(f"m.fence_products({g.k}, {g.mask})")
    if mods[1] == "commit_group":
        return g.say(f"m.commit_products({g.k}, {g.mask})")
    if mods[1] == "wait_group":
        return g.say(f"m.wait_products({g.k}, {int(i.args[0])}, {g.mask})")
    kind, k = _operand_type(i, mods)
    d, a, b, scale_d, *rest = i.args
    signs, transposed = [int(x) for x in rest[:2]], [int(x) for x in rest[2:]]
    if signs != [1, 1]:
        raise unsupported(i)
    if isinstance(a, list):
        first, turned = g.get_all(a, "u4"), (0, *(transposed or [0]))
    else:
        first, turned = g.get(a, "u8"), tuple(transposed or (0, 0))
    kept = g.get(scale_d, "p")
    read = a if isinstance(a, list) else []
    g.say(f"m.use_operands({g.k}, {sorted({*d, *read})}, {sorted(g.program.moved_into(read))}, {g.mask})")
    operands = f"{first}, {g.get(b, 'u8')}, {g.get_all(d, 'f4')}, {kept}, {turned}"
    return g.put_all(d, "f4", f"m.product({g.k}, {kind!r}, {k}, {operands}, {g.mask})")


# --- control flow ----------------------------------------------------------------------------------------------------


@opcode("bra")
def _bra(g: Lines, i: Instruction, mods: list[str]) -> None:
    g.say(f"return {g.guard}" if g.guard else "return True_")


@opcode("brx")
def _brx(g: Lines, i: Instruction, mods: list[str]) -> None:
    g.say(f"return {g.get(i.args[0], 'u4')}")


@opcode("ret", "exit")
def _ret(g: Lines, i: Instruction, mods: list[str]) -> None:
    g.say(f"return m.leave({g.guard})" if g.guard else "return m.leave(True_)")


@opcode("trap")
def _trap(g: Lines, i: Instruction, mods: list[str]) -> None:
    g.say(f"m.trap({g.k}, {g.mask})")
