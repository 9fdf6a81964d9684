"""Reads PTX text: one kernel, its parameters, registers, shared arrays and instructions.

Only what Triton's compiler writes is read: one `.entry`, virtual registers, and inline assembly in braces. Anything
else raises a SyntaxError or a NotImplementedError that quotes it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclasses.dataclass(frozen=True)
class Memory:
    """A memory operand, [base + offset], or [base, {at}] for an element of a tensor descriptor.

    base is a register, or the name of a shared array or of a parameter.
    """

    base: str
    offset: int = 0
    at: tuple[str, ...] = ()


@dataclasses.dataclass
class Instruction:
    """One PTX instruction and the line of the kernel's source that it was compiled from."""

    op: str
    args: list[Any]  # str (a register, literal or name), Memory, or a list of str for a vector
    guard: str | None = None  # the predicate p of @p
    negated: bool = False  # @!p
    where: str = ""  # file:line

    @functools.cached_property
    def mods(self) -> list[str]:
        """The opcode and its modifiers: ["ld", "global", "b32"]."""
        return self.op.replace("::", ".").split(".")

    def __str__(self) -> str:
        def show(x: Any) -> str:
            if isinstance(x, Memory):
                return f"[{x.base}+{x.offset}]"
            return "{" + ", ".join(x) + "}" if isinstance(x, list) else x

        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        args = ", ".join(map(show, self.args))
        return f"{guard}{self.op} {args if len(args) < 120 else args[:117] + '...'}  ({self.where})"


@dataclasses.dataclass
class Entry:
    """A kernel as it is written in PTX."""

    name: str
    target: str  # sm_80
    threads: int  # of a thread block
    params: list[tuple[str, str, int]]  # name, type (u64, f32, b8), bytes
    registers: dict[str, str]  # name, or prefix of a range -> b16, b32, b64, pred
    shared: dict[str, int]  # name -> bytes; 0 for the extern array
    code: list[Instruction | str]  # a str is a label
    tables: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # lists of labels, for brx

    def width(self, register: str) -> str:
        found = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if found is None:
            raise SyntaxError(f"register {register} is not declared")
        return found


def parse(text: str) -> Entry:
    """The first kernel of a PTX file."""
    target = re.search(r"^\.target\s+(\w+)", text, re.M)
    found = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*([^{]*)\{", text, re.S)
    if target is None or found is None:
        raise SyntaxError("PTX without a .target or without an .entry")
    params = [_parameter(p) for p in found[2].split(",") if p.strip()]
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", found[3])
    if threads is None:
        raise SyntaxError(f"{found[1]}: wanted .reqntid or .maxntid, the threads of a thread block")
    shared = {name: int(size or 0) for name, size in re.findall(r"\.shared[^;]*?\.b8\s+([\w$]+)\[(\d*)\]", text)}
    entry = Entry(found[1], target[1], int(threads[1]), params, {}, shared, [])
    _body(text[found.end() :], entry)
    return entry


def _parameter(text: str) -> tuple[str, str, int]:
    words = text.split()
    kind = words[1].lstrip(".")
    if kind == "align":  # .param .align 64 .b8 name[128]
        name, size = re.fullmatch(r"([\w$]+)\[(\d+)\]", words[-1]).groups()
        return name, "b8", int(size)
    return words[-1], kind, BYTES[kind[1:]]


_LOC = re.compile(r"\.loc\s+\d+\s+\d+\s+\d+[^\n]*?//\s*([^\s:]+:\d+)[^\n]*")
_COMMENT = re.compile(r"//[^\n]*")
_TOKEN = re.compile(r"\s*(?:(\{)|(\})|([\w$]+):(?!:)|(\.loc\b[^\n]*)|(\.section\b)|([^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);)")


def _body(text: str, entry: Entry) -> None:
    """Fill in the registers and the code, up to the brace that closes the entry."""
    text = _COMMENT.sub("", _LOC.sub(r".loc \1", text))
    at, where = 0, ""
    scopes: list[tuple[int, list[str]]] = []  # of each open brace: where its code begins, the names declared in it
    closed = 0
    while found := _TOKEN.match(text, at):
        at = found.end()
        opens, closes, label, loc, section, statement = found.groups()
        if opens:
            scopes.append((len(entry.code), []))
        elif closes:
            if not scopes:
                return
            begin, names = scopes.pop()
            closed += 1
            _rename(entry, begin, {name: f"{name}__{closed}" for name in names})
        elif label:
            entry.code.append(label)
            if scopes:
                scopes[-1][1].append(label)
        elif loc:
            where = loc.split()[1] if ":" in loc else where
        elif section:
            raise SyntaxError("a .section inside the entry")
        elif statement.strip():
            _statement(statement.strip(), where, entry, scopes)
    raise SyntaxError(f"cannot read: {text[at : at + 80]!r}")


def _statement(text: str, where: str, entry: Entry, scopes: list[tuple[int, list[str]]]) -> None:
    if text.startswith(".reg"):
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            ranged = re.match(r"\s*([\w$%]+)<\d+>", name)
            name = ranged[1] if ranged else name.strip()
            entry.registers[name] = re.sub(r"^[usf](?=\d)", "b", kind.lstrip("."))
            if scopes:
                scopes[-1][1].append(name)
        return
    if text.startswith(".branchtargets"):
        entry.tables[entry.code[-1]] = [x.strip() for x in text.split(None, 1)[1].split(",")]
        return
    if text.startswith("."):
        if text.startswith((".local", ".param", ".call")):
            raise NotImplementedError(f"{text}  ({where})")
        return
    guard = re.match(r"@(!?)([\w$%]+)\s+", text)
    rest = text[guard.end() :] if guard else text
    op, _, args = rest.partition(" ") if re.match(r"\S+ ", rest) else rest.partition("\t")
    predicate, negated = (guard[2], bool(guard[1])) if guard else (None, False)
    entry.code.append(Instruction(op.strip(), _operands(args), predicate, negated, where))


def _operands(text: str) -> list[Any]:
    out: list[Any] = []
    for part in re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,{}\[\]\s|]+(?:\|[^,\s]+)?", text):
        if part[0] == "{":
            out.append([x.strip() for x in part[1:-1].split(",")])
        elif part[0] == "[":
            place, _, at = part[1:-1].partition("{")
            base, _, offset = place.strip(" ,").partition("+")
            coordinates = tuple(x.strip() for x in at.rstrip("} ").split(",")) if at else ()
            out.append(Memory(base.strip(), int(offset.strip() or "0", 0), coordinates))
        else:
            out.append(part)
    return out


def _rename(entry: Entry, begin: int, names: dict[str, str]) -> None:
    """Give what was declared inside braces a name of its own, in the code from `begin` on."""

    def new(x: Any) -> Any:
        if isinstance(x, Memory):
            return Memory(names.get(x.base, x.base), x.offset, tuple(names.get(y, y) for y in x.at))
        return [new(each) for each in x] if isinstance(x, list) else names.get(x, x)

    for name, to in names.items():
        if name in entry.registers:
            entry.registers[to] = entry.registers[name]
    for i in range(begin, len(entry.code)):
        each = entry.code[i]
        if isinstance(each, str):
            entry.code[i] = names.get(each, each)
        else:
            each.args, each.guard = new(each.args), names.get(each.guard, each.guard)
