"""Writes the Python source of one basic block. The lower_*.py files register a function for each PTX opcode.

In the generated source `m` is the running machine, `M` the mask of the lanes that run the block (None: all of them).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .parse import Instruction, Memory
from .registers import SPECIAL, python_name, size_of

if TYPE_CHECKING:
    from .program import Program

OPCODES: dict[str, Callable[[Lines, Instruction, list[str]], None]] = {}


def opcode(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function that writes the Python of these opcodes."""

    def register(f: Callable[..., None]) -> Callable[..., None]:
        OPCODES.update(dict.fromkeys(names, f))
        return f

    return register


def unsupported(i: Instruction) -> NotImplementedError:
    return NotImplementedError(f"PTX instruction that is not supported: {i}")


class Lines:
    """The source of one block, as it grows."""

    def __init__(self, program: Program, keep: bool) -> None:
        self.program, self.keep = program, keep
        self.lines: list[str] = []
        self.written: set[str] = set()
        self.guard: str | None = None  # the predicate of the current instruction
        self.k = 0  # its index
        self._operand_writes: list[tuple[str, tuple[str, ...]]] = []

    def add(self, k: int, each: Instruction) -> None:
        self.k = k
        self.guard = None
        if each.guard:
            self.guard = ("~" if each.negated else "") + self.get(each.guard, "p")
        handler = OPCODES.get(each.mods[0])
        if handler is None:
            raise unsupported(each)
        if each.mods[0] in ("wgmma", "bra", "brx", "ret", "exit"):
            self.flush_operand_writes()
        else:
            self._note_operand_writes(k, each)
        try:
            handler(self, each, each.mods)
        except (IndexError, KeyError, ValueError, TypeError, StopIteration) as error:
            raise NotImplementedError(f"PTX instruction that is not supported: {each}: {error!r}") from error

    def _note_operand_writes(self, k: int, each: Instruction) -> None:
        """Writes of registers that a wgmma uses. A mov of registers, packed or not, makes no new value."""
        moved = tuple(self.program.reads[k]) if each.mods[0] == "mov" else ()
        self._operand_writes += [(to, moved) for to in sorted(self.program.writes[k] & self.program.operands)]

    def flush_operand_writes(self) -> None:
        """Tell the machine of the writes noted so far."""
        if self._operand_writes:
            name = f"operand_writes_{len(self.program.namespace)}"
            self.program.namespace[name] = tuple(self._operand_writes)
            self.say(f"m.write_operands({self.k}, {name}, M)")
            self._operand_writes.clear()

    def say(self, line: str) -> None:
        self.lines.append(line)

    @property
    def mask(self) -> str:
        """The lanes that execute the current instruction; None: all."""
        return f"both(M, {self.guard})" if self.guard else "M"

    # --- operands -------------------------------------------------------------------------------------------------

    def get(self, x: str, t: str) -> str:
        """An operand as an array of NumPy type `t`."""
        if SPECIAL.match(x):
            return f"m.specials[{x[1:]!r}].{'astype' if t == 'u8' else 'view'}({t})"
        if not x.startswith("%") and x not in self.program.storage:
            return self.program.constant(self._literal(x, t), t)
        have, name = self.program.storage[x], python_name(x)
        if have == t:
            return name
        if "p" in (have, t):
            raise TypeError(f"{x} is {have}, not {t}")
        if size_of(have) == size_of(t):
            return f"{name}.view({t})"
        if size_of(have) > size_of(t):
            return f"{name}.astype(u{size_of(t)}).view({t})"
        raise TypeError(f"{x} is {have}, too narrow for {t}")

    def get_all(self, xs: list[str], t: str) -> str:
        return "[" + ", ".join(self.get(x, t) for x in xs) + "]"

    def predicate(self, x: str) -> str:
        """A predicate operand, which may be negated: !p."""
        p = self.get(x.lstrip("!"), "p")
        return f"~{p}" if x[0] == "!" else p

    def _literal(self, x: str, t: str) -> Any:
        from .program import DESCRIPTORS

        if x in self.program.entry.shared:
            return self.program.shared_address(x)
        for i, (name, *_) in enumerate(self.program.entry.params):
            if x == name:
                return DESCRIPTORS + 4096 * i
        if re.match(r"0[fF][0-9A-Fa-f]{8}$", x):
            bits = int(x[2:], 16)
            return struct.unpack("<f", struct.pack("<I", bits))[0] if t == "f4" else bits
        if re.match(r"0[dD][0-9A-Fa-f]{16}$", x):
            return struct.unpack("<d", struct.pack("<Q", int(x[2:], 16)))[0]
        value = int(x.rstrip("U"), 0)
        if t == "p":
            return value != 0
        if t[0] == "f":
            raise ValueError(f"an integer literal {x} for a float")
        bits = 8 * size_of(t)
        value &= (1 << bits) - 1
        return value - (1 << bits) if t[0] == "i" and value >> (bits - 1) else value

    def address(self, x: Memory, t: str) -> str:
        base = self.get(x.base, t)
        return base if not x.offset else f"{base} + {self.program.constant(self._literal(str(x.offset), t), t)}"

    # --- results --------------------------------------------------------------------------------------------------

    def put(self, register: str, t: str, value: str) -> None:
        """Assign `value`, an array of type `t`, to a register, in the lanes that execute the instruction."""
        if register == "_":
            return self.say(value)
        have = self.program.storage[register]
        if have != t:
            if "p" in (have, t):
                raise TypeError(f"{register} is {have}, not {t}")
            if size_of(have) == size_of(t):
                value = f"({value}).view({have})"
            elif size_of(have) > size_of(t):
                value = f"({value}).astype({t[0]}{size_of(have)}).view({have})"
            else:
                raise TypeError(f"{register} is {have}, too narrow for {t}")
        name = python_name(register)
        self.written.add(register)
        kept = self.keep and register not in self.program.local
        if self.guard or kept:
            mask = f"both(M, {self.guard})" if self.guard and kept else self.guard or "M"
            value = f"where({mask}, {value}, {name})"
        return self.say(f"{name} = {value}")

    def put_all(self, registers: list[str], t: str, call: str) -> None:
        self.say(f"T = {call}")
        for i, register in enumerate(registers):
            self.put(register, t, f"T[{i}]")


def load_opcodes() -> None:
    """Import the files that register opcodes."""
    from . import lower_arithmetic, lower_convert, lower_memory, lower_warp  # noqa: F401
