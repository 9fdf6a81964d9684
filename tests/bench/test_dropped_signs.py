"""The compile gate finds a minimum of three integers in which ptxas drops a minus. The programs are written by hand."""

from __future__ import annotations

import pytest
import triton
import triton.language as tl
from triton.compiler import ASTSource

from bench.codegen import dropped_signs
from bench.codegen.compiling import TARGETS
from tests.support.environment import compiles

pytestmark = pytest.mark.once

NESTED = "min.s32 %r6, %r4, %r5; min.s32 %r8, %r6, %r7;"


def at_risk(code: str) -> list[str]:
    return dropped_signs.at_risk("\n".join(f"\t{each.strip()};" for each in code.split(";") if each.strip()))


# For sm_90, ptxas 12.8 keeps the sign in the second group of programs, and drops it in the first.
@pytest.mark.corpus(87)
@pytest.mark.parametrize(
    "code",
    [
        f"neg.s32 %r4, %r2; {NESTED}",
        f"abs.s32 %r4, %r2; {NESTED}",
        f"sub.s32 %r4, 0, %r2; {NESTED}",
        "neg.s32 %r4, %r2; min.s32 %r6, %r5, %r4; min.s32 %r8, %r7, %r6;",
        "neg.s32 %r4, %r2; max.s32 %r6, %r4, %r5; max.s32 %r8, %r6, %r7;",
        "neg.s32 %r4, %r2; min.s32 %r6, %r4, %r5; min.relu.s32 %r8, %r6, %r7;",
        "neg.s32 %r4, %r2; mov.u32 %r3, %r4; min.s32 %r6, %r3, %r5; mov.b32 %r9, %r6; min.s32 %r8, %r9, %r7;",
        f"neg.s32 %r3, %r2; mov.u32 %r4, %r3; mov.u32 %r4, %r1; {NESTED}",  # the negated value on one path
        "neg.s32 %r4, %r2; @%p1 min.s32 %r6, %r4, %r5; min.s32 %r8, %r6, %r7;",
    ],
)
def test_a_sign_in_the_inner_of_two_minima_is_found(code):
    (found,) = at_risk(code)
    assert found.endswith(("%r5;", "%r4;"))
    (fault,) = dropped_signs.faults(code.replace(";", ";\n"))
    assert fault.startswith(dropped_signs.DROPPED_SIGN) and "1 of them" in fault


@pytest.mark.parametrize(
    "code",
    [
        NESTED,
        "neg.s32 %r4, %r2; min.s32 %r8, %r4, %r5;",
        "neg.s32 %r4, %r2; max.s32 %r6, %r4, %r5; min.s32 %r8, %r6, %r7;",
        "neg.s32 %r4, %r2; min.s32 %r6, %r5, %r7; min.s32 %r8, %r6, %r4;",
        f"not.b32 %r4, %r2; {NESTED}",
        f"and.b32 %r4, %r2, 2147483647; {NESTED}",
        f"sub.s32 %r4, %r9, %r2; {NESTED}",
        "neg.s32 %r4, %r2; min.u32 %r6, %r4, %r5; min.u32 %r8, %r6, %r7;",
        "neg.f32 %f4, %f2; min.f32 %f6, %f4, %f5; min.f32 %f8, %f6, %f7;",
        "mov.u32 %r4, %r5; mov.u32 %r5, %r4; min.s32 %r6, %r4, %r5; min.s32 %r8, %r6, %r7;",  # copies in a circle
    ],
)
def test_other_minima_are_not(code):
    assert not at_risk(code) and not dropped_signs.faults(code.replace(";", ";\n"))


def _negated(x_ptr, n):
    i = tl.arange(0, 128)
    tl.store(x_ptr + i, tl.minimum(tl.minimum(-n, tl.load(x_ptr + i)), i + 64))


def _less_2_31(x_ptr, n):
    i = tl.arange(0, 128)
    tl.store(x_ptr + i, tl.minimum(tl.minimum(n & 0x7FFFFFFF, tl.load(x_ptr + i)), i + 64))


@pytest.mark.corpus(87)
@compiles
@pytest.mark.parametrize("function, found", [(_negated, True), (_less_2_31, False)])
def test_what_triton_makes_of_a_kernel(function, found):
    """On an H100 the first gives min(n, ...), the second is right."""
    source = ASTSource(fn=triton.jit(function), signature={"x_ptr": "*i32", "n": "i32"})
    ptx = triton.compile(source, target=TARGETS["sm_90"]).asm["ptx"]
    assert bool(dropped_signs.faults(ptx)) == found
