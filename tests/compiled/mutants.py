"""How sensitive the machine is: compiled kernels with one synchronisation spoiled, on what the whole one ran on.

with running("sm_80") as log:
    log.launches = []
    kernel[grid](x, y, ...)
for result in survey(log.launches[0]):
    print(result)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .driver import Launched
from .global_memory import Fault
from .kernel import Kernel
from .parse import Entry, Instruction, parse
from .report import Checks, Report

# Why a mutant is right, where vector clocks find nothing either: then every schedule gives the same results (races.py).
ORDERED = "what it orders is ordered without it"
EQUAL_VALUES = "it orders only stores of the value that is there already"
_REDUNDANT = {
    "fence.proxy.async": "no store reaches an asynchronous read without another fence",
    "wgmma.fence": "another wgmma.fence follows the last write of each register that a product uses",
    "mbarrier.init": "nothing uses this mbarrier",
    "wait": "another wait comes before each use of what it waits for",
    "": ORDERED,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one mutant.

    seen: "fault", "reported" or "numbers" for what showed the error; "no" for a mutant that is right.
    said: the message, or why the mutant is right.
    runs: how often each warp ran the instruction, on average. Of a loop that ran once, what a second step needs is not
        seen.
    """

    kernel: str
    kind: str
    instruction: str
    runs: float
    seen: str
    said: str = ""


@dataclasses.dataclass(frozen=True)
class Mutant:
    kind: str
    index: int  # in Entry.code
    entry: Entry


def _is(each: Instruction | str, *prefixes: str) -> bool:
    return isinstance(each, Instruction) and each.op.startswith(prefixes)


def _is_barrier(each: Instruction | str) -> bool:
    return _is(each, "bar.sync", "barrier.sync")


def _touches_shared(each: Instruction) -> bool:
    """Whether an instruction reads or writes shared memory, or starts a copy or a product that does."""
    return each.op.startswith(("ldmatrix", "stmatrix", "cp.async.c", "cp.async.bulk.t", "wgmma.mma")) or (
        each.mods[0] in ("ld", "st") and "shared" in each.mods
    )


def _ends_block(each: Instruction | str) -> bool:
    return isinstance(each, str) or each.mods[0] in ("bra", "brx", "ret", "exit") or _is_barrier(each)


def _moved(code: list[Instruction | str], i: int, step: int) -> list[Instruction | str] | None:
    """The barrier at i on the other side of the next access of shared memory, in its own basic block."""
    j = i + step
    while 0 <= j < len(code) and not _ends_block(code[j]):
        if _touches_shared(code[j]):
            rest = code[:i] + code[i + 1 :]
            return [*rest[:j], code[i], *rest[j:]]
        j += step
    return None


def mutants(entry: Entry) -> Iterator[Mutant]:
    """Every synchronisation dropped, weakened or moved, one at a time."""
    code = entry.code

    def made(kind: str, i: int, changed: list[Instruction | str]) -> Mutant:
        return Mutant(kind, i, dataclasses.replace(entry, code=changed))

    def dropped(i: int, count: int = 1) -> list[Instruction | str]:
        return code[:i] + code[i + count :]

    def weaker(i: int) -> list[Instruction | str]:
        more = dataclasses.replace(code[i], args=[str(int(code[i].args[0]) + 1)])
        return [*code[:i], more, *code[i + 1 :]]

    for i, each in enumerate(code):
        if _is_barrier(each):
            yield made("barrier dropped", i, dropped(i))
            for step, how in ((1, "barrier after the next access"), (-1, "barrier before the last access")):
                if moved := _moved(code, i, step):
                    yield made(how, i, moved)
        elif _is(each, "cp.async.wait_group", "wgmma.wait_group", "cp.async.bulk.wait_group"):
            name = each.op.removesuffix(".read").removesuffix(".sync.aligned")
            yield made(f"{name} dropped", i, dropped(i))
            yield made(f"{name} waits for one less", i, weaker(i))
        elif _is(each, "fence.proxy.async"):
            yield made("fence.proxy.async dropped", i, dropped(i))
        elif _is(each, "wgmma.fence"):
            yield made("wgmma.fence dropped", i, dropped(i))
        elif _is(each, "fence.mbarrier_init"):
            yield made("fence.mbarrier_init dropped", i, dropped(i))
        elif _is(each, "mbarrier.try_wait", "mbarrier.test_wait"):
            yield made("mbarrier wait dropped", i, dropped(i, 2))  # and the branch that repeats it
        elif _is(each, "mbarrier.arrive"):
            yield made("mbarrier arrival dropped", i, dropped(i))
        elif _is(each, "mbarrier.init"):
            yield made("mbarrier.init dropped", i, dropped(i))


def _runs(kernel: Kernel, report: Report) -> dict[int, float]:
    """How often each warp ran an instruction, by the identity of the instruction."""
    blocks, warps = kernel.program.blocks, report.blocks[0]
    return {
        id(kernel.program.code[k]): n / warps
        for b, n in report.blocks.items()
        for k in range(blocks[b].first, blocks[b].last)
    }


def survey(
    launched: Launched, kinds: Iterable[str] | None = None, seeds: Iterable[int | None] = (None,)
) -> list[Result]:
    """What shows of each mutant of a launch, beyond what the kernel shows as it is.

    Only instructions that ran are changed. A mutant runs under one seed after another until something shows, at last
    with vector clocks. Those find what could show in any schedule: where they find nothing, the mutant is right.
    """
    given = [t.detach() for t in launched.tensors]
    before = [t.clone() for t in given]

    def run(kernel: Kernel, checks: Checks) -> tuple[list[torch.Tensor], Report]:
        for t, b in zip(given, before, strict=True):
            t.copy_(b)
        report = kernel.launch(launched.grid, launched.values, launched.regions, launched.shared, checks)
        return [t.clone().nan_to_num(7.5) for t in given], report

    def shown(kernel: Kernel, checks: Checks) -> tuple[str, str] | None:
        try:
            got, report = run(kernel, checks)
        except Fault as fault:
            return "fault", str(fault)
        if found := [each for each in report.findings if each not in known[checks]]:
            return "reported", found[0]
        return None if all(map(torch.equal, got, expected)) else ("numbers", "")

    def outcome(kernel: Kernel, kind: str) -> tuple[str, str]:
        for checks in (*schedules, *exact):
            if found := shown(kernel, checks):
                return found
        if kind.startswith("barrier"):
            return "no", EQUAL_VALUES if shown(kernel, strict) else ORDERED
        return "no", next(why for name, why in _REDUNDANT.items() if name in kind)

    entry = parse(Path(launched.ptx).read_text())
    whole = Kernel(entry)
    schedules = [Checks(seed=seed) for seed in seeds]
    exact = Checks(clocks=True), Checks(clocks=True, fenced_copies=True)
    strict = Checks(clocks=True, equal_stores=True)
    expected, report = run(whole, Checks())
    known = {checks: set(run(whole, checks)[1].findings) for checks in (*schedules, *exact, strict)}
    runs = _runs(whole, report)
    out = []
    for mutant in mutants(entry):
        instruction = entry.code[mutant.index]
        if id(instruction) in runs and (kinds is None or mutant.kind in kinds):
            seen, said = outcome(Kernel(mutant.entry), mutant.kind)
            out.append(Result(whole.name, mutant.kind, str(instruction), runs[id(instruction)], seen, said))
    run(whole, Checks())
    return out
