"""The registers of Hopper's asynchronous products, in the machine code: none may be used too early.

A product (HGMMA) reads its first operand from registers, or from shared memory, and writes its results into registers
while later instructions run, until a wait for it (WARPGROUP.DEPBAR). ptxas keeps these registers, but not always: where
the operand was a copy of a value, and the next such value was computed before the wait, it merged the copy with the
value, and wrote that and even addresses over what the product was still reading.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

USED_EARLY = "a register of a product is used before the wait for it"  # a fault

_MOST_GROUPS = 8  # older groups that may still run count as one


class _Instruction(NamedTuple):
    text: str
    guarded: bool


class _Group(NamedTuple):
    """The registers of products that are waited for together: bit n is register n."""

    operands: int = 0
    results: int = 0

    def with_(self, other: _Group) -> _Group:
        return _Group(self.operands | other.operands, self.results | other.results)


# The groups that may still run: first the one that the next product joins, then the others, the latest first.
_Groups = tuple[_Group, ...]
_NONE: _Groups = (_Group(),)


def early(text: str) -> list[str]:
    """From the output of nvdisasm: the instructions that use a register of a product before the wait, in their order.

    Such an instruction writes a register that the product may yet read, or reads or writes one that it may yet write.
    All paths count, those around a loop too.
    """
    if not re.search(r"\b[A-Z]GMMA", text):
        return []
    code, labels = _read(text)
    blocks = _blocks(code, labels)
    before: dict[int, _Groups] = dict.fromkeys(blocks, _NONE)
    found: set[int] = set()
    changed = list(blocks)
    while changed:
        first = changed.pop(0)
        last, following = blocks[first]
        groups = before[first]
        for at in range(first, last):
            groups, wrong = _step(code[at].text, groups)
            if wrong:
                found.add(at)
        for block in following:
            joined = _join(before[block], groups)
            if joined != before[block]:
                before[block] = joined
                if block not in changed:
                    changed.append(block)
    return [code[at].text for at in sorted(found)]


def faults(text: str) -> list[str]:
    """The fault of a kernel, if it has it: how many such instructions, and the first."""
    found = early(text)
    return [f"{USED_EARLY}: {len(found)} instructions, the first {found[0]}"] if found else []


# --- the order of instructions ---------------------------------------------------------------------------------------


def _read(text: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions that run, and for each label the index of the next one."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;", line):
            if found[1] not in ("!PT", "!UPT"):
                code.append(_Instruction(found[2], found[1] is not None))
        elif label := re.match(r"\s*\.(L_\w+):", line):
            labels[label[1]] = len(code)
    return code, labels


def _blocks(code: list[_Instruction], labels: dict[str, int]) -> dict[int, tuple[int, list[int]]]:
    """The basic blocks: index of the first instruction -> index after the last one, and the blocks that may follow.

    Where an indirect branch or a call goes is not known: no product is taken to run there.
    """
    ends = {at: _targets(each, labels) for at, each in enumerate(code) if re.match(r"BRA|BRX|JM|EXIT|RET", each.text)}
    starts = sorted({0, *labels.values(), *(at + 1 for at in ends)} - {len(code)})
    blocks = {}
    for first, after in zip(starts, [*starts[1:], len(code)], strict=True):
        jumps, falls_through = ends.get(after - 1, ([], True))
        blocks[first] = (after, [x for x in (*jumps, *[after] * falls_through) if x < len(code)])
    return blocks


def _targets(branch: _Instruction, labels: dict[str, int]) -> tuple[list[int], bool]:
    """Where a branch may go, and whether the instruction after it may be next."""
    target = re.search(r"`\(\.(\w+)\)", branch.text)
    jumps = [labels[target[1]]] if target and target[1] in labels else []
    always = not branch.guarded and re.match(r"BRA `|BRX|JM|EXIT|RET", branch.text)
    return jumps, not always


def _join(one: _Groups, other: _Groups) -> _Groups:
    longest = max(len(one), len(other))
    one, other = (x + (_Group(),) * (longest - len(x)) for x in (one, other))
    return tuple(x.with_(y) for x, y in zip(one, other, strict=True))


# --- what an instruction does ----------------------------------------------------------------------------------------


def _step(text: str, groups: _Groups) -> tuple[_Groups, bool]:
    """The groups that may run after an instruction, and whether it uses one of their registers too early."""
    if wait := re.match(r"WARPGROUP\.DEPBAR\S*\s+gsb0,\s*0x(\w+)", text):
        return groups[: 1 + int(wait[1], 16)], False
    if product := _product(text):
        running = functools.reduce(_Group.with_, groups)
        # Products add to the same results in their order.
        wrong = product.operands & running.results or product.results & running.operands
        groups = (groups[0].with_(product), *groups[1:])
        if "gsb0" in text:  # the last of its group
            groups = (_Group(), *groups)
            oldest = functools.reduce(_Group.with_, groups[_MOST_GROUPS:], _Group())
            groups = (*groups[:_MOST_GROUPS], oldest) if len(groups) > _MOST_GROUPS else groups
        return groups, bool(wrong)
    if groups == _NONE:
        return groups, False
    running = functools.reduce(_Group.with_, groups)
    written, read = _registers(text)
    return groups, bool(written & (running.operands | running.results) or read & running.results)


@functools.lru_cache(maxsize=1024)
def _product(text: str) -> _Group | None:
    """The registers of a product: four for the first operand; of the results one for each float32 or two float16."""
    found = re.match(r"[A-Z]GMMA\.64x(\d+)x\d+\.(\w+)\S*\s+R(\d+), (?:R(\d+))?", text)
    if not found:
        return None
    results = int(found[1]) // (4 if found[2] == "F16" else 2)
    return _Group(_bits(found[4], 4) if found[4] else 0, _bits(found[3], results))


def _bits(first: str | int, count: int) -> int:
    return ((1 << count) - 1) << int(first)


_WRITES_NONE = re.compile(
    r"ST|RED\b|RED\.|BAR\b|BRA|BRX|JM|CALL|RET|EXIT|LDGSTS|LDGDEPBAR|DEPBAR|NOP|WARP|MEMBAR|FENCE|CCTL|ERRBAR|YIELD|"
    r"NANOSLEEP|BSSY|BSYNC|BREAK|U[A-Z]|R2UR|R2P|R2B|S2UR|ELECT|BPT|KILL|[A-Z]SETP|FCHK"
)
_DESTINATION = re.compile(r"\S+\s+(?:!?U?P\w\s*,\s*)*R(\d+)")


@functools.lru_cache(maxsize=65536)
def _registers(text: str) -> tuple[int, int]:
    """The registers that an instruction writes, and those that it reads."""
    name, _, arguments = text.partition(" ")
    written, destination = 0, None
    if not _WRITES_NONE.match(name):
        destination = _DESTINATION.match(text)
        written = _bits(destination[1], _width(name)) if destination else 0
    read, last = 0, None
    for last in re.finditer(r"\bR(\d+)(\.64)?", text[destination.end() :] if destination else arguments):
        read |= _bits(last[1], 2 if last[2] else 1)
    if last and re.match(r"ST|RED|ATOM", name):  # the last register holds what is stored
        read |= _bits(last[1], _width(name))
    return written, read


def _width(name: str) -> int:
    """The number of registers that a value of an instruction takes."""
    if name.startswith(("LD", "ST", "ATOM", "RED")):
        if matrices := re.match(r"(?:LDSM|STSM)\.\w+\.\w+\.(\d)", name):
            return int(matrices[1])
        return 4 if ".128" in name else 2 if re.search(r"\.(64|F64|U64|S64)", name) else 1
    if name.startswith("CS2R"):
        return 1 if ".32" in name else 2
    if re.match(r"HMMA|IMMA|QMMA", name):
        return 2 if re.match(r"HMMA\.\d+\.F16", name) else 4
    if re.match(r"D(ADD|MUL|FMA|MNMX)|IMAD\.WIDE|(F2F|I2F)\.F64|F2I\.([A-Z]+\.)*[US]64", name):
        return 2
    return 1
