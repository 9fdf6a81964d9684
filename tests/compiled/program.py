"""A kernel cut into basic blocks, each compiled to a Python function when it is first run.

A register is a NumPy array with one value a lane (thread), or of length 1 where all lanes hold the same value. It holds
unsigned bits, or float32 where its first writer makes float32; predicates are booleans. Arrays are never changed in
place, so `mov` only copies a reference. Each basic block becomes two functions: one for when all lanes run it, and one
that keeps the registers of the lanes that do not (their argument `M` is the mask of the lanes that do).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .arithmetic import FUNCTIONS
from .emit import Lines, unsupported
from .parse import Entry, Instruction
from .registers import named, python_name, read, size_of, written

SHARED_BASE = 1024  # shared address of a thread block's first byte: 0 is no address, and swizzles find their alignment
DESCRIPTORS = 2**31  # address of the first parameter, if it is a tensor descriptor; the next is 4096 further
_ENDS = ("bra", "brx", "ret", "exit", "trap")


@dataclasses.dataclass
class Block:
    """A basic block: instructions first to last - 1."""

    first: int
    last: int
    barrier: tuple[int, int] | None = None  # it begins with bar.sync: (number, threads); 0 threads: all of them
    target: int | None = None  # the block its branch goes to
    table: list[int] | None = None  # or the blocks that its brx goes to
    polls: bool = False  # it asks an mbarrier, and branches to itself until the phase is over


class Program:
    """What can be run of a kernel."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.code: list[Instruction] = []
        self.blocks: list[Block] = []
        self.namespace: dict[str, Any] = dict(FUNCTIONS)
        self._cut(entry.code)
        self.named = [named(each, entry) for each in self.code]  # registers of each instruction
        self.reads = [read(each, entry) for each in self.code]
        self.writes = [written(each) for each in self.code]
        self.used = set().union(*self.reads)
        self._moves: dict[str, set[str]] = {}  # register -> those that a mov reads for it
        for each, reads, writes in zip(self.code, self.reads, self.writes, strict=True):
            for x in writes if each.mods[0] == "mov" else ():
                self._moves.setdefault(x, set()).update(reads)
        self.operands = self._operands()  # registers that a wgmma reads or writes, and what is moved into them
        self.storage = self._storage()
        pending = self._pending()
        self.local = self._local() - pending
        self.pending_names = sorted(map(python_name, pending))
        self._functions: dict[tuple[int, bool], Any] = {}
        self.has_wgmma = any(i.op.startswith("wgmma.mma") for i in self.code)
        self.asynchronous = self.has_wgmma or any(i.op.startswith("cp.async.bulk") for i in self.code)
        # Warps wait for each other by other means than barriers of the whole thread block.
        self.specialised = any(i.op.startswith("mbarrier") for i in self.code) or any(
            b.barrier and b.barrier[1] not in (0, entry.threads) for b in self.blocks
        )

    def function(self, block: int, keep: bool) -> Callable[..., Any]:
        found = self._functions.get((block, keep))
        if found is None:
            name = f"block_{block}{'_keep' * keep}"
            exec(compile(self.source(block, keep), f"<{self.entry.name}.{name}>", "exec"), self.namespace)
            found = self._functions[block, keep] = self.namespace[name]
        return found

    def source(self, block: int, keep: bool) -> str:
        """The Python of a block."""
        lines = Lines(self, keep)
        for k in range(self.blocks[block].first, self.blocks[block].last):
            lines.add(k, self.code[k])
        lines.flush_operand_writes()
        shared = sorted(x for x in lines.written if x not in self.local)
        head = [f"def block_{block}{'_keep' * keep}(m, M):"]
        head += ["    global " + ", ".join(map(python_name, shared))] if shared else []
        return "\n".join(head + ["    " + line for line in lines.lines] + ["    pass"])

    def constant(self, value: Any, dtype: str) -> str:
        """The name of a constant array."""
        array = np.array([value], bool if dtype == "p" else dtype)
        name = f"c_{dtype}_{array.view('u1').tobytes().hex()}"
        self.namespace[name] = array
        return name

    def shared_address(self, name: str) -> int:
        """The extern array lies behind the static ones."""
        sizes = {x: -(-size // 128) * 128 for x, size in self.entry.shared.items()}
        before = [x for x in sizes if sizes[x] and (not sizes[name] or list(sizes).index(x) < list(sizes).index(name))]
        return SHARED_BASE + sum(sizes[x] for x in before)

    def static_shared(self) -> int:
        return sum(-(-n // 128) * 128 for n in self.entry.shared.values())

    def poisoned(self) -> dict[str, np.ndarray]:
        """Registers before anything has written them: NaN."""
        values = {t: np.full(size_of(t), 0xFF, "u1").view(t) for t in ("u1", "u2", "u4", "u8", "f4")}
        values["p"] = np.array([False])
        return {python_name(x): values[t] for x, t in self.storage.items()}

    # --- basic blocks ---------------------------------------------------------------------------------------------

    def _cut(self, code: list[Instruction | str]) -> None:
        labels: dict[str, int] = {}  # name -> index in self.code
        starts = {0}
        for each in code:
            if isinstance(each, str):
                if not each.startswith(("$L__tmp", "$L__func")):
                    labels[each] = len(self.code)
                    starts.add(len(self.code))
                continue
            if _is_barrier(each):
                starts.add(len(self.code))
            self.code.append(each)
            if each.mods[0] in _ENDS:
                starts.add(len(self.code))
        cuts = sorted(starts | {len(self.code)})
        self.blocks = [Block(a, b) for a, b in itertools.pairwise(cuts)]
        at = {b.first: i for i, b in enumerate(self.blocks)}
        for i, b in enumerate(self.blocks):
            first, last = self.code[b.first], self.code[b.last - 1]
            if _is_barrier(first):
                if "sync" not in first.mods or first.guard:
                    raise unsupported(first)
                b.barrier = (int(first.args[0]), int(first.args[1]) if len(first.args) > 1 else 0)
            if last.mods[0] == "bra":
                b.target = at.get(labels[last.args[0]], len(self.blocks))
                b.polls = b.target == i and first.op.startswith("mbarrier")
            if last.mods[0] == "brx":
                b.table = [at[labels[x]] for x in self.entry.tables[last.args[1]]]

    # --- registers ------------------------------------------------------------------------------------------------

    def _pending(self) -> set[str]:
        """Registers that may hold a result which a wgmma has not yet written: its results, and copies of them."""
        found = {x for each in self.code if each.op.startswith("wgmma.mma") for x in each.args[0]}
        moves = [each.args for each in self.code if each.mods[0] == "mov" and isinstance(each.args[0], str)]
        while found and (more := {to for to, x in moves if isinstance(x, str) and x in found} - found):
            found |= more
        return found

    def _operands(self) -> set[str]:
        """Registers that a wgmma reads or writes, and those that are moved into them."""
        products = [each.args for each in self.code if each.op.startswith("wgmma.mma")]
        found = {x for args in products for part in args[:2] if isinstance(part, list) for x in part}
        return found | self.moved_into(found)

    def moved_into(self, registers: Iterable[str]) -> set[str]:
        """The registers whose values are moved into these, directly or by way of others."""
        found: set[str] = set()
        open_ = set(registers)
        while open_:
            open_ = set().union(*(self._moves.get(x, ()) for x in open_)) - found
            found |= open_
        return found

    def _storage(self) -> dict[str, str]:
        """The NumPy type of each register: bits, or float32 where an instruction makes it float32."""
        found: dict[str, str] = {}
        for k, each in enumerate(self.code):
            mods = each.mods
            floating = mods[-1] == "f32" or mods[0] in ("mma", "wgmma")
            if mods[0] == "cvt":
                floating = mods[-2] == "f32"
            made = self.writes[k] if floating else set()
            for x in self.named[k]:
                bits = {"pred": "p", "b16": "u2", "b32": "u4", "b64": "u8", "b8": "u1"}[self.entry.width(x)]
                if x not in found or (x in made and bits == "u4"):
                    found[x] = "f4" if x in made and bits == "u4" else bits
        return found

    def _local(self) -> set[str]:
        """Registers that only one block uses, and writes before it reads them."""
        blocks: dict[str, set[int]] = {}
        read_first: set[str] = set()
        for i, b in enumerate(self.blocks):
            for k in range(b.first, b.last):
                for x in self.named[k]:
                    if i not in blocks.setdefault(x, set()):
                        blocks[x].add(i)
                        if x not in self.writes[k] or self.code[k].guard or x in self.reads[k]:
                            read_first.add(x)
        return {x for x, where in blocks.items() if len(where) == 1 and x not in read_first}


def _is_barrier(each: Instruction) -> bool:
    return each.mods[0] in ("bar", "barrier") and "warp" not in each.mods
