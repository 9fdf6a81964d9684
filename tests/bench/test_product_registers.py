"""The compile gate finds instructions that use a register of an asynchronous product before the wait for it.

The listings are written by hand, but for the last one.
"""

from __future__ import annotations

import pytest

from bench.codegen import product_registers

SCORES = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0"  # writes R24 to R55
VALUES = "HGMMA.64x32x16.F32.BF16 R64, R80, gdesc[UR4].tnspB, R64, gsb0"  # reads R80 to R83, writes R64 to R79
WAIT, ONE_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
BACK, ON = "@!P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_2)"
EARLY = "FADD R83, R1, R2"  # writes what VALUES reads


def early(*code: str) -> list[str]:
    lines = (x if x.startswith(".") else f"        /*{16 * at:04x}*/    {x} ;" for at, x in enumerate((*code, "EXIT")))
    return product_registers.early("\n".join(lines))


@pytest.mark.parametrize(
    "instruction, wrong",
    [
        (EARLY, True),
        ("FADD R84, R80, R83", False),  # the product reads them too
        ("FADD R84, R1, R2", False),
        ("FADD R79, R1, R2", True),
        ("FADD R63, R1, R2", False),
        ("FADD R1, R2, R64", True),
        ("FADD R1, R2, |R79|", True),
        ("@P2 FADD R83, R1, R2", True),
        ("@!PT LDS R83, [RZ]", False),  # never runs
        ("LDS R79, [R1]", True),
        ("LDS.64 R63, [R1]", True),
        ("LDG.E R60, desc[UR4][R2.64]", False),
        ("LDG.E.128 R61, desc[UR4][R2.64]", True),
        ("LDSM.16.M88.4 R61, [R1]", True),
        ("LDSM.16.MT88.2 R62, [R1]", False),
        ("CS2R R62, SRZ", False),
        ("CS2R R63, SRZ", True),
        ("CS2R.32 R63, SR_CLOCKLO", False),
        ("IMAD.WIDE R63, R1, 0x2, R2", True),
        ("IMAD.WIDE.U32 R63, P0, R1, 0x2, R2", True),
        ("IMAD R63, R1, 0x2, R2", False),
        ("DADD R63, R2, R4", True),
        ("F2F.F64.F32 R63, R1", True),
        ("F2F.F32.F64 R63, R2", False),
        ("SHF.L.U64.HI R63, R1, 0x2, R2", False),
        ("HMMA.16816.F32.BF16 R61, R4, R8, R12", True),
        ("SHFL.BFLY PT, R83, R1, 0x2, 0x1f", True),
        ("LOP3.LUT P0, R83, R1, R2, RZ, 0xc0, !PT", True),
        ("ISETP.GE.AND P0, PT, R83, R1, PT", False),  # writes predicates alone
        ("ISETP.GE.AND P0, PT, R79, R1, PT", True),
        ("R2UR UR64, R1", False),
        ("R2UR UR4, R64", True),
        ("UIADD3 UR83, UR4, 0x2, URZ", False),
        ("IMAD.U32 R1, RZ, RZ, UR64", False),
        ("STS.128 [R1], R80", False),
        ("STS.128 [R1], R61", True),
        ("STG.E desc[UR4][R2.64], R63", False),
        ("STG.E desc[UR4][R63.64], R1", True),
        ("LDGSTS.E.BYPASS.128 [R83], desc[UR4][R2.64]", False),
    ],
)
def test_each_register_of_an_instruction_is_read_from_its_text(instruction, wrong):
    assert (
        early(VALUES, instruction, WAIT)
        == [instruction.split(" ", 1)[1] if "@" in instruction else instruction] * wrong
    )
    assert not early(VALUES, WAIT, instruction)


def test_products_with_the_same_results_follow_each_other():
    assert not early(*[VALUES.replace(", gsb0", "")] * 3, VALUES, WAIT)
    assert not early("WARPGROUP.ARRIVE", VALUES, VALUES.replace("R80", "R84"), WAIT, EARLY)


def test_a_product_may_not_read_what_another_is_yet_to_write():
    reads = VALUES.replace("R80", "R24")
    assert early(SCORES, reads, WAIT) == [reads]
    assert not early(SCORES, WAIT, reads, WAIT)


def test_results_in_half_precision_take_half_the_registers():
    half = VALUES.replace("F32.BF16", "F16")
    assert early(VALUES, "FADD R72, R1, R2", WAIT) and not early(half, "FADD R72, R1, R2", WAIT)
    assert early(half, "FADD R71, R1, R2", WAIT) and early(half, EARLY, WAIT)


def test_a_wait_may_leave_the_last_groups_running():
    assert not early(VALUES, SCORES, ONE_LEFT, EARLY)
    assert early(SCORES, VALUES, ONE_LEFT, EARLY) == [EARLY]
    assert not early(SCORES, VALUES, ONE_LEFT, "FADD R1, R24, R55")
    first = VALUES.replace(", gsb0", "")  # of a group of two
    assert early(first, SCORES, ONE_LEFT, EARLY) == [EARLY]
    assert not early(first, SCORES, SCORES, ONE_LEFT, EARLY)
    assert not early(VALUES, *[SCORES] * 12, ONE_LEFT.replace("0x1", "0x7"), EARLY)
    assert early(VALUES, *[SCORES] * 12, EARLY) == [EARLY]


def test_a_product_at_the_end_of_a_loop_runs_at_its_beginning():
    assert early(".L_x_1:", EARLY, WAIT, VALUES, BACK, WAIT) == [EARLY]
    assert not early(".L_x_1:", WAIT, EARLY, VALUES, BACK, WAIT)
    assert early(".L_x_1:", SCORES, ONE_LEFT, EARLY, VALUES, BACK, WAIT) == []
    assert early(".L_x_1:", ONE_LEFT, EARLY, SCORES, VALUES, BACK, WAIT) == [EARLY]
    # Two loops, and a product that runs from the first into the second.
    assert early(".L_x_1:", VALUES, BACK, ".L_x_2:", EARLY, WAIT, "@P0 BRA `(.L_x_2)") == [EARLY]


def test_a_branch_goes_where_it_goes():
    assert early(VALUES, ON, WAIT, ".L_x_2:", EARLY) == [EARLY]  # past the wait
    assert not early(VALUES, WAIT, ON, VALUES, "EXIT", ".L_x_2:", EARLY)
    assert not early(VALUES, "BRA `(.L_x_2)", EARLY, ".L_x_2:", WAIT)
    assert early(VALUES, "BRA P1, `(.L_x_2)", EARLY, ".L_x_2:", WAIT) == [EARLY]
    assert not early(VALUES, "BRX R2 -0x80", ".L_x_2:", EARLY)


# From a forward whose p was computed a step ahead (Triton 3.6.0, ptxas 12.8), which gave NaN on an H100.
ADDRESSES_OVER_P = """
.L_x_1:
        /*3370*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*3380*/                   FMUL R24, R24, R19.reuse ;
        /*3790*/                   WARPGROUP.ARRIVE ;
        /*37b0*/                   FMNMX R19, R88, R89, !PT ;
        /*37c0*/                   HGMMA.64x128x16.F32.BF16 R24, R132, gdesc[UR8].tnspB, R24 ;
        /*3960*/                   HGMMA.64x128x16.F32.BF16 R24, R128, gdesc[UR8].tnspB, R24 ;
        /*3970*/                   UIADD3.64 UR10, UR10, 0x100, URZ ;
        /*3980*/                   HGMMA.64x128x16.F32.BF16 R24, R124, gdesc[UR12].tnspB, R24 ;
        /*3990*/                   VIADD R131, R3, UR6 ;
        /*39a0*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0 ;
        /*39b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*39c0*/              @!PT LDS RZ, [RZ] ;
        /*39f0*/                   LDGSTS.E.BYPASS.128 [R131], desc[UR40][R170.64], !P5 ;
        /*3a30*/                   LDGDEPBAR ;
        /*3a40*/                   IMAD.MOV.U32 R120, RZ, RZ, R168 ;
        /*3a50*/                   IMAD.MOV.U32 R121, RZ, RZ, R183 ;
        /*3a60*/                   IMAD.WIDE R122, R149, 0x2, R120 ;
        /*3a80*/                   LDGSTS.E.BYPASS.128 [R131+0xc000], desc[UR40][R122.64], !P5 ;
        /*3b30*/                   SHFL.BFLY PT, R123, R122, 0x2, 0x1f ;
        /*3cf0*/                   MUFU.EX2 R132, R132 ;
        /*44e0*/              @!P5 BRA `(.L_x_1) ;
        /*4500*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""


def test_addresses_in_the_registers_of_a_product_are_a_fault():
    found = product_registers.early(ADDRESSES_OVER_P)
    written = (
        "VIADD R131",
        "IMAD.MOV.U32 R120",
        "IMAD.MOV.U32 R121",
        "IMAD.WIDE R122",
        "SHFL.BFLY PT",
        "MUFU.EX2 R132",
    )
    assert tuple(x.split(",")[0] for x in found) == written
    assert product_registers.faults(ADDRESSES_OVER_P) == [
        "a register of a product is used before the wait for it: 6 instructions, the first VIADD R131, R3, UR6"
    ]
    waits = "gsb0 ;\n        /*39a8*/   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    assert product_registers.early(ADDRESSES_OVER_P.replace("gsb0 ;", waits)) == ["VIADD R131, R3, UR6"]
    assert not product_registers.faults("        /*0000*/                   FADD R1, R2, R3 ;")
