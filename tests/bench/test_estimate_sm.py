"""The model of one SM: control fields of machine code, loops, issue, pipes, products and barriers."""

from __future__ import annotations

import pytest

from bench.estimate.sm import code, machine
from bench.estimate.sm.code import NONE, Instruction
from bench.estimate.sm.pipes import Sm, product_cycles

pytestmark = pytest.mark.once
SM = Sm.of("sm_90")


def instruction(text: str, stall: int = 1, write: int = NONE, wait: int = 0) -> Instruction:
    return Instruction(text, "", stall, write, NONE, wait)


def printed(*lines: tuple[str, int]) -> str:
    """As nvdisasm prints instructions with their bits; each with its control field, or a label with 0."""
    out = []
    for text, control in lines:
        if text.startswith(".L_x"):
            out.append(text)
        else:
            out += [f"        /*0000*/  {text} ;  /* 0x0000000000000001 */", f"  /* 0x{control << 41:016x} */"]
    return "\n".join(out)


def step(*bodies: list[Instruction], programs: int = 1) -> float:
    return machine.run([list(bodies)] * programs, SM).step


def test_control_fields_are_read_from_the_bits_of_an_instruction():
    control = 5 | 2 << 5 | NONE << 8 | 0b100100 << 11  # stall 5, writes scoreboard 2, waits for 2 and 5
    read = code.parsed(printed(("@!P0 MUFU.EX2 R1, R2", control), (".L_x_3:", 0), ("EXIT", 1)))
    assert read.instructions[0] == Instruction("MUFU.EX2 R1, R2", "@!P0", 5, 2, NONE, 0b100100)
    assert read.labels == {"L_x_3": 1} and read.instructions[1].op == "EXIT"


def test_a_repeated_test_of_an_mbarrier_is_no_loop():
    sums = [("FADD R1, R2, R3", 1)] * 3
    loop = [(".L_x_1:", 0), ("HGMMA.64x8x16 R0, gdesc[UR4], R0", 1), *sums, ("@P0 BRA `(.L_x_1)", 1)]
    spin = [(".L_x_2:", 0), ("SYNCS.PHASECHK P1, [UR5+0x10], R3", 1), ("@!P1 BRA `(.L_x_2)", 1)]
    tail = [("SYNCS.PHASECHK P1, [UR5+0x10], R3", 1), ("BRA `(.L_x_1)", 1)]  # out of line, back into the loop
    found = code.loops(code.parsed(printed(*spin, *loop, *tail)), "HGMMA")
    assert [len(body) for body in found] == [5]


def test_the_issue_slot_is_shared_by_warps():
    body = [instruction("NOP")] * 100  # no pipe limits it
    assert step(body) == pytest.approx(100, abs=1)
    assert step(body, body) == pytest.approx(200, abs=2)
    assert step(body, programs=3) == pytest.approx(300, abs=3)


def test_a_stall_is_waited_for():
    assert step([instruction("FFMA R1, R2, R3, R4", stall=4)] * 50) == pytest.approx(200, abs=4)


def test_a_slow_pipe_limits_and_is_named():
    found = machine.run([[[instruction("MUFU.EX2 R1, R2")] * 50]], SM)
    assert found.step == pytest.approx(50 * SM.mufu, rel=0.02) and found.limit == "mufu"


def test_a_scoreboard_is_waited_for():
    loads = [instruction("LDS R1, [R2]", write=0), instruction("FADD R1, R1, R1", wait=0b1)]
    free = [loads[0], loads[1]._replace(wait=0)]
    assert step(loads) >= SM.shared_latency > step(free)


def products(n: int, waits: bool = True) -> list[Instruction]:
    """One group of n products of 64 x 128 x 16, and the wait for it."""
    texts = ["HGMMA.64x128x16.F32 R24, gdesc[UR4], R24"] * (n - 1)
    texts += ["HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0"]
    return [instruction(t) for t in texts] + ([instruction("WARPGROUP.DEPBAR.LE gsb0, 0x0")] if waits else [])


def test_products_run_on_tensor_cores_while_the_warp_goes_on():
    assert product_cycles(products(1)[0].text, SM) == 64  # 2 * 64 * 128 * 16 / 4096
    softmax = [instruction("FADD R1, R2, R3")] * 300
    alone = step(products(4))
    assert alone >= 4 * 64 + SM.product_latency
    behind = step(products(4) + softmax)  # after the wait: both times add up
    under = step(products(4)[:-1] + softmax + products(4)[-1:])
    assert behind == pytest.approx(alone + 300, rel=0.05) and under < 0.75 * behind


def test_two_warp_groups_fill_the_tensor_cores_that_one_leaves_idle():
    body = products(8) + [instruction("FADD R1, R2, R3", stall=2)] * 200
    one, two = machine.run([[body]], SM), machine.run([[body, body]], SM)
    assert two.step < 1.3 * one.step and two.busy["tensor"] == pytest.approx(2 * one.busy["tensor"])


def test_groups_that_take_turns_do_not_multiply_at_the_same_time():
    """As in FlashAttention-3: a group waits at its own barrier and arrives at that of the other."""
    pause = [instruction("FADD R1, R2, R3", stall=4)] * 20
    turns = [instruction("BAR.SYNC.DEFER_BLOCKING R9, 0x100"), *pause, instruction("BAR.ARV R9, 0x100")]
    assert step(turns, turns) >= 2 * step(pause)  # one after the other
    assert step(pause, pause) < 1.1 * step(pause)


def test_a_barrier_of_a_program_joins_its_warp_groups_and_no_others():
    barrier = instruction("BAR.SYNC.DEFER_BLOCKING 0x0")
    slow = [instruction("FADD R1, R2, R3", stall=10)] * 20 + [barrier]
    fast = [instruction("FADD R1, R2, R3")] * 20 + [barrier]
    joined = machine.run([[slow, fast]], SM)
    assert joined.lost["barrier"] > 50 and joined.step >= 200
    assert machine.run([[fast], [slow]], SM).lost.get("barrier", 0.0) < 50


def test_warps_that_wait_for_one_another_are_an_error():
    waits = [instruction(f"SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5+0x{n}], R3") for n in (10, 20)]
    arrives = [instruction(f"SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR5+0x{n}], RZ") for n in (10, 20)]
    machine.run([[[waits[0], arrives[1]], [waits[1], arrives[0]]]], SM)  # the first group passes at once
    with pytest.raises(RuntimeError, match="wait for one another"):
        machine.run([[[waits[1], waits[0], arrives[1]], [waits[1], waits[1], arrives[0]]]], SM)


def test_only_families_with_constants_have_a_model():
    with pytest.raises(ValueError, match=r"sm_100; there are sm_90, sm_80"):
        Sm.of("sm_100")
