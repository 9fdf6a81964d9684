"""A program without findings gives the same results in every schedule: random programs, random schedules."""

from __future__ import annotations

import random

import numpy as np

from .global_memory import Fault
from .ptx_text import launch
from .report import Checks

WARPS, PLACES, MBARRIERS = 3, 3, 2


def program(draw: random.Random) -> str:
    """Loads, stores and synchronisation of three warps, in an order in which no warp waits for ever.

    Each warp adds up what it loads, with weights that tell the order of the loads apart.
    """
    phases, weights = [0] * MBARRIERS, iter(range(1, 99))
    code: list[list[str]] = [[] for _ in range(WARPS)]
    for step in range(draw.randint(6, 14)):
        one, other = draw.sample(range(WARPS), 2)
        place = f"[%r1+{128 * draw.randrange(PLACES)}]"
        kind = draw.choice(("store", "load", "meet", "hand over", "hand over", "all meet"))
        if kind == "store":
            code[one].append(f"mov.b32 %r5, {draw.choice((7, 7, step + 10))}; st.shared.b32 {place}, %r5;")
        elif kind == "load":
            code[one].append(f"ld.shared.b32 %r5, {place}; mad.lo.u32 %r6, %r5, {next(weights)}, %r6;")
        elif kind == "meet":
            number = draw.choice((1, 1 + one + other))  # one for each pair of warps, or one that all pairs share
            for warp in (one, other):
                code[warp].append(f"bar.sync {number}, 64;")
        elif kind == "hand over":
            i = draw.randrange(MBARRIERS)
            at, label = f"[%r1+{512 + 8 * i}]", f"wait_{step}"
            code[one].append(f"@%p0 mbarrier.arrive.shared::cta.b64 _, {at}, 1;")
            code[other].append(
                f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %p3, {at}, {phases[i] % 2}; @!%p3 bra.uni {label};"
            )
            phases[i] += 1
        else:
            for each in code:
                each.append("bar.sync 0;")
    return f"""
    mov.b32 %r6, 0; and.b32 %r7, %r0, 31; setp.eq.u32 %p0, %r7, 0; setp.eq.u32 %p4, %r0, 0;
    st.shared.b32 [%r1], %r6; st.shared.b32 [%r1+128], %r6; st.shared.b32 [%r1+256], %r6;
    {"".join(f"@%p4 mbarrier.init.shared::cta.b64 [%r1+{512 + 8 * i}], 1;" for i in range(MBARRIERS))}
    bar.sync 0; setp.lt.u32 %p1, %r0, 32; @%p1 bra warp_0; setp.lt.u32 %p1, %r0, 64; @%p1 bra warp_1;
    {" ".join(code[2])} bra.uni done;
    warp_1: {" ".join(code[1])} bra.uni done;
    warp_0: {" ".join(code[0])}
    done: mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd9, %rd0; st.global.b32 [%rd9], %r6;
    """


def run(text: str, seed: int | None) -> tuple[list[int] | None, bool]:
    """What each warp has added up, or None where it hangs; and whether anything was found."""
    out = np.zeros(32 * WARPS, "u4")
    try:
        found = launch(text, out, threads=len(out), checks=Checks(seed=seed, clocks=True)).findings
    except Fault:
        return None, True
    return out[::32].tolist(), bool(found)


def test_a_program_without_findings_gives_the_same_results_in_every_schedule():
    draw, clean, changing = random.Random(0), 0, 0
    for _ in range(120):
        text = program(draw)
        expected, found = run(text, None)
        if not found:
            clean += 1
            assert all(run(text, seed) == (expected, False) for seed in range(6)), text
        else:
            changing += len({str(run(text, seed)[0]) for seed in range(6)}) > 1
    assert clean >= 20 and changing >= 20, (clean, changing)
