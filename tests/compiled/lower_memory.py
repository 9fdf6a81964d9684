"""Loads, stores, atomics, asynchronous copies, mbarriers and fences: each becomes a call of the machine."""

from __future__ import annotations

from typing import Any

from .emit import Lines, opcode, unsupported
from .parse import Instruction, Memory
from .registers import TYPES


def vector(x: Any) -> list[str]:
    return x if isinstance(x, list) else [x]


@opcode("ld", "ldu")
def _ld(g: Lines, i: Instruction, mods: list[str]) -> None:
    t, to, source = TYPES[mods[-1]], vector(i.args[0]), i.args[1]
    if "param" in mods:
        return g.put(to[0], t, f"m.param({source.base!r}, {source.offset}, {t})")
    if "cluster" in mods or "local" in mods or "acquire" in mods:
        raise unsupported(i)
    space = "shared" if "shared" in mods else "global"
    address = g.address(source, "u4" if space == "shared" else "u8")
    call = f"{g.k}, {address}, {t}, {len(to)}, {g.mask}"
    if space == "global":
        return g.put_all(to, t, f"m.load_global({call})")
    # The compiler also loads, with what it needs, bytes that nothing has written and nobody reads.
    used = tuple(i for i, x in enumerate(to) if x in g.program.used)
    return g.put_all(to, t, f"m.load_shared({call}, {used})")


@opcode("st")
def _st(g: Lines, i: Instruction, mods: list[str]) -> None:
    if "cluster" in mods or "local" in mods or "release" in mods or "async" in mods:
        raise unsupported(i)
    space = "shared" if "shared" in mods else "global"
    address = g.address(i.args[0], "u4" if space == "shared" else "u8")
    g.say(f"m.store_{space}({g.k}, {address}, {g.get_all(vector(i.args[1]), TYPES[mods[-1]])}, {g.mask})")


_ATOMIC = ("add", "min", "max", "and", "or", "xor", "exch", "cas")


@opcode("atom", "red")
def _atomic(g: Lines, i: Instruction, mods: list[str]) -> None:
    args = list(i.args)
    to = None if mods[0] == "red" else vector(args.pop(0))
    how = next(x for x in _ATOMIC if x in mods)
    if "shared" in mods or mods[-1] in ("bf16", "f16", "bf16x2", "f16x2"):
        raise unsupported(i)
    t = TYPES[mods[-1]]
    values = [g.get_all(vector(x), t) for x in args[1:]]  # cas: what it compares with, then the new value
    call = f"m.atomic({g.k}, {g.address(args[0], 'u8')}, [{', '.join(values)}], {how!r}, {g.mask})"
    g.say(call) if to is None else g.put_all(to, t, call)


@opcode("cp")
def _copy(g: Lines, i: Instruction, mods: list[str]) -> None:
    if "bulk" in mods:
        return _bulk(g, i, mods)
    if mods[1] != "async" or "mbarrier" in mods:
        raise unsupported(i)
    if mods[2] == "commit_group":
        return g.say(f"m.commit_copies({g.mask})")
    if mods[2] in ("wait_group", "wait_all"):
        return g.say(f"m.wait_copies({int(i.args[0]) if i.args else 0}, {mods[2] == 'wait_all'}, {g.mask})")
    to, source = g.address(i.args[0], "u4"), g.address(i.args[1], "u8")
    size = int(i.args[2], 0)
    given = g.get(i.args[3], "u4") if len(i.args) > 3 else g.program.constant(size, "u4")
    return g.say(f"m.copy_async({g.k}, {to}, {source}, {size}, {given}, {g.mask})")


def _bulk(g: Lines, i: Instruction, mods: list[str]) -> None:
    """Copies of the tensor memory accelerator (TMA), by tensor descriptors."""
    if "commit_group" in mods:
        return g.say(f"m.commit_bulk({g.mask})")
    if "wait_group" in mods:
        return g.say(f"m.wait_bulk({int(i.args[0])}, {g.mask})")
    if "prefetch" in mods or {"multicast", "im2col", "gather4", "cta_group"} & set(mods) or "tensor" not in mods:
        raise unsupported(i)
    if "cache_hint" in mods:
        raise unsupported(i)
    tensor = next(x for x in i.args if isinstance(x, Memory) and x.at)
    where = f"{g.address(tensor, 'u8')}, {g.get_all(list(tensor.at), 'i4')}"
    if i.args[0] is tensor:
        how = mods[mods.index("bulk_group") - 1] if mods[1] == "reduce" else "store"
        return g.say(f"m.bulk_store({g.k}, {where}, {g.address(i.args[1], 'u4')}, {how!r}, {g.mask})")
    to, barrier = g.address(i.args[0], "u4"), g.address(i.args[2], "u4")
    return g.say(f"m.bulk_load({g.k}, {to}, {where}, {barrier}, {g.mask})")


@opcode("mbarrier")
def _mbarrier(g: Lines, i: Instruction, mods: list[str]) -> None:
    if mods[1] == "init":
        return g.say(f"m.barrier_init({g.k}, {g.address(i.args[0], 'u4')}, {g.get(i.args[1], 'u4')}, {g.mask})")
    if mods[1] == "inval":
        return g.say(f"m.barrier_inval({g.k}, {g.address(i.args[0], 'u4')}, {g.mask})")
    if mods[1] == "arrive" and i.args[0] == "_" and "cluster" not in mods:
        count = g.get(i.args[2], "u4") if len(i.args) > 2 else g.program.constant(1, "u4")
        expect = "expect_tx" in mods
        return g.say(f"m.barrier_arrive({g.k}, {g.address(i.args[1], 'u4')}, {count}, {expect}, {g.mask})")
    if mods[1] in ("try_wait", "test_wait") and "parity" in mods:
        call = f"m.barrier_over({g.k}, {g.address(i.args[1], 'u4')}, {g.get(i.args[2], 'u4')}, {g.mask})"
        return g.put(i.args[0], "p", call)
    raise unsupported(i)


@opcode("fence")
def _fence(g: Lines, i: Instruction, mods: list[str]) -> None:
    """Of all fences only that between the threads and the asynchronous units can change a result here."""
    if "proxy" in mods:
        if "async" not in mods:
            raise unsupported(i)
        g.say(f"m.fence_proxy({g.mask})")
    elif "mbarrier_init" in mods:
        g.say(f"m.fence_barrier_init({g.mask})")
