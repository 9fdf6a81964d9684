"""Each check of the machine: what it finds, and that it is silent where the error is mended."""

from __future__ import annotations

import re

import numpy as np
import pytest

from .global_memory import Fault
from .ptx_text import launch
from .races import ClockRaces
from .report import Checks
from .shared_memory import Shared

# Each of 64 threads has its own four bytes at %r2; %r3 are those of a thread of the other warp.
OWN = """
shl.b32 %r2, %r0, 2; add.s32 %r2, %r2, %r1; xor.b32 %r3, %r2, 128;
mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd9, %rd0;
"""


def findings(body: str, threads: int = 64, target: str = "sm_90", **options) -> list[str]:
    x = np.arange(threads, dtype="u4")
    return list(launch(OWN + body, x, threads=threads, target=target, **options).findings)


# --- global memory ---------------------------------------------------------------------------------------------------

LOAD = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd9, %rd0; ld.global.b32 %r5, [%rd9+{}];"


def test_a_tensor_ends_where_it_ends_though_another_follows():
    """Two tensors without a gap between them: an access of one must not reach into the other."""
    both = np.zeros(64, "u4")
    launch(LOAD.format(0), both[:32], both[32:])
    with pytest.raises(Fault, match="out of bounds: 4 bytes at byte 128 of array 0, which has 128 bytes; thread 31"):
        launch(LOAD.format(4), both[:32], both[32:])
    with pytest.raises(Fault, match="out of bounds: 4 bytes at 4 bytes before array 0"):
        launch(LOAD.format(-4), both[32:], both[:32])


def test_an_address_of_no_tensor():
    with pytest.raises(Fault, match="which is no address of a tensor"):
        launch("mov.b64 %rd9, 4096; ld.global.b32 %r5, [%rd9];", np.zeros(4, "u4"))


@pytest.mark.parametrize("access", ["ld.global.v2.b32 {%r5, %r6}, [%rd0+4];", "st.global.b64 [%rd0+12], %rd0;"])
def test_misaligned_in_global_memory(access):
    with pytest.raises(Fault, match="misaligned"):
        launch(access, np.zeros(8, "u8"))


def test_what_lies_between_the_rows_of_a_tensor_is_not_its_own():
    x = np.zeros(32, "u4")
    with pytest.raises(Fault, match="4 bytes at 4 of array 0: between the tensor's elements; thread 1 "):
        launch(LOAD.format(0), x, owned=np.arange(32) % 2 == 0)


# --- shared memory ---------------------------------------------------------------------------------------------------


def test_bounds_and_alignment_of_shared_memory():
    with pytest.raises(Fault, match="out of bounds: 4 bytes at byte 1024 of shared memory, which has 1024 bytes"):
        launch("st.shared.b32 [%r1+1024], %r0;", np.zeros(1))
    with pytest.raises(Fault, match="misaligned: 4 bytes at byte 2 of shared memory"):
        launch("st.shared.b32 [%r1+2], %r0;", np.zeros(1))


def test_shared_memory_that_nothing_has_written():
    assert "nothing has written" in findings("ld.shared.b32 %r5, [%r2]; add.s32 %r5, %r5, 1;")[0]
    assert not findings("st.shared.b32 [%r2], %r0; ld.shared.b32 %r5, [%r2]; add.s32 %r5, %r5, 1;")


def test_elements_of_a_vector_that_nobody_reads_need_not_be_written():
    body = "mad.lo.u32 %r2, %r0, 8, %r1; st.shared.b32 [%r2], %r0;"
    body += "ld.shared.v2.b32 {{%r5, %r6}}, [%r2]; add.s32 %r7, {}, 1;"
    assert not findings(body.format("%r5"))
    assert "nothing has written" in findings(body.format("%r6"))[0]


PASS_ON = "st.shared.b32 [%r2], %r0; {} ld.shared.b32 %r5, [%r3];"
OVERWRITE = "st.shared.b32 [%r2], %r0; bar.sync 0; ld.shared.b32 %r5, [%r3]; {} st.shared.b32 [%r2], %r5;"


@pytest.mark.parametrize("body", [PASS_ON, OVERWRITE], ids=["read after write", "write after read"])
def test_a_race_between_warps(body):
    assert "race" in findings(body.format(""))[0]
    assert not findings(body.format("bar.sync 0;"))


def test_warps_may_store_one_value_twice_but_not_two_values():
    assert not findings("mov.b32 %r5, 7; st.shared.b32 [%r1], %r5; bar.sync 0; ld.shared.b32 %r6, [%r1];")
    assert findings("st.shared.b32 [%r1], %r0;")


NAMED = """
setp.lt.u32 %p1, %r0, 32;
@%p1 bra low;
{high}
bra.uni done;
low:
{low}
done:
"""


def test_a_named_barrier_orders_those_who_meet_there():
    """96 threads; the first two warps meet at barrier 1, the third stays away."""
    meet, write, read = "bar.sync 1, 64;", "st.shared.b32 [%r2], %r0;", "ld.shared.b32 %r5, [%r3];"
    body = "setp.ge.u32 %p2, %r0, 64; @%p2 bra away;" + write + "{}" + read + "away: bar.sync 0;"
    assert not findings(body.format(meet), threads=96)
    assert "race" in findings(body.format("") + "bar.sync 1, 96;", threads=96)[0]


def test_warps_that_may_meet_others_at_a_named_barrier():
    """Warps 0 and 1 meet at a barrier, then warps 1 and 2: in another schedule, warp 0 could meet warp 2."""
    body = """
    setp.lt.u32 %p1, %r0, 32; @%p1 bra first; setp.ge.u32 %p2, %r0, 64; @%p2 bra last;
    bar.sync 1, 64; {} bar.sync {}, 64; bra.uni done;
    first: bar.sync 1, 64; {} bra.uni done;
    last: {} bar.sync {}, 64;
    done:
    """
    with pytest.raises(Fault, match="96 threads at barrier 1 for 64"):
        findings(body.format("", 1, "", "", 1), threads=96)
    assert not findings(body.format("", 2, "", "", 2), threads=96)
    meet = "bar.sync 3, 96;"  # in between
    assert not findings(body.format(meet, 1, meet, meet, 1), threads=96)
    clocks = ClockRaces(Shared(ctas=1, warps=3, size=16))  # of a schedule in which the last warp comes later
    assert clocks.barrier(1, np.array([0, 1])) is None
    assert clocks.barrier(1, np.array([1, 2])) == "warp 2 may meet warps [0, 1] at barrier 1"
    assert clocks.barrier(0, np.array([0, 1, 2])) is clocks.barrier(1, np.array([0, 2])) is None


def test_stores_of_equal_values_are_writes_if_asked():
    body = "mov.b32 %r5, 7; st.shared.b32 [%r1], %r5; bar.sync 0; ld.shared.b32 %r6, [%r1];"
    assert not findings(body, checks=Checks(clocks=True))
    assert "race" in findings(body, checks=Checks(clocks=True, equal_stores=True))[0]


def test_a_store_of_an_equal_value_comes_after_the_reads_of_the_one_before():
    """Warps 1 and 0 store 7, without an order between them, over what warp 2 reads before it meets warp 0."""
    body = """
    st.shared.b32 [%r1], %r1; bar.sync 0; mov.b32 %r5, 7;
    setp.lt.u32 %p1, %r0, 32; @%p1 bra first; setp.ge.u32 %p2, %r0, 64; @%p2 bra last;
    bar.sync {}; st.shared.b32 [%r1], %r5; bra.uni done;
    last: ld.shared.b32 %r6, [%r1]; add.s32 %r6, %r6, 1; bar.sync {}; bra.uni done;
    first: bar.sync {}; st.shared.b32 [%r1], %r5;
    done:
    """
    alone, together = ("3, 32", "1, 64", "1, 64"), ("1, 96", "1, 96", "1, 96")
    assert not findings(body.format(*together), threads=96, checks=Checks(clocks=True))
    assert "race" in findings(body.format(*alone), threads=96)[0]


# --- mbarriers -------------------------------------------------------------------------------------------------------

# Thread 0 makes the mbarrier at byte 512. Warp 0 writes, then arrives there with one thread; warp 1 waits, then reads.
HAND_OVER = """
setp.eq.u32 %p0, %r0, 0;
@%p0 mbarrier.init.shared::cta.b64 [%r1+512], 1;
{init}
setp.lt.u32 %p1, %r0, 32;
@%p1 bra writer;
{{
.reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1+512], {parity};
@!complete bra.uni waitLoop;
}}
ld.shared.b32 %r5, [%r3];
bra.uni done;
writer:
{before}
@%p0 mbarrier.arrive.shared::cta.b64 _, [%r1+512], {count};
{after}
done:
"""
RIGHT = {"init": "bar.sync 0;", "before": "st.shared.b32 [%r2], %r0;", "after": "", "parity": 0, "count": 1}


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_wait_for_an_mbarrier_orders(seed):
    assert not findings(HAND_OVER.format(**RIGHT), checks=Checks(seed=seed))
    late = {**RIGHT, "before": "", "after": "st.shared.b32 [%r2], %r0;"}
    found = findings(HAND_OVER.format(**late), checks=Checks(seed=seed))
    assert any("race" in each or "nothing has written" in each for each in found)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_wait_for_an_mbarrier_orders_a_write_after_a_read(seed):
    """Warp 0 reads what warp 1 wrote before, arrives, and warp 1 writes anew."""
    init, read = "st.shared.b32 [%r2], %r0; bar.sync 0;", "ld.shared.b32 %r5, [%r3]; add.s32 %r5, %r5, 1;"
    text = HAND_OVER.replace("ld.shared.b32 %r5, [%r3];\nbra", "st.shared.b32 [%r2], %r1;\nbra")
    assert not findings(text.format(**{**RIGHT, "init": init, "before": read}), checks=Checks(seed=seed))
    found = findings(text.format(**{**RIGHT, "init": init, "before": "", "after": read}), checks=Checks(seed=seed))
    assert len(found) == 1 and "race" in found[0]


def test_an_mbarrier_is_made_before_it_is_used():
    assert any("race" in each for each in findings(HAND_OVER.format(**{**RIGHT, "init": ""})))
    with pytest.raises(Fault, match="no mbarrier was initialised at byte 512"):
        findings(HAND_OVER.format(**RIGHT).replace("@%p0 mbarrier.init", "@!%p0 bra over; over: @%p5 mbarrier.init"))


# Two phases of an mbarrier, on which warp 0 arrives; warp 1 waits for both of them, or for the second alone.
PHASES = """
setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared::cta.b64 [%r1+512], 1; bar.sync 0;
setp.lt.u32 %p1, %r0, 32; @%p1 bra writer;
{first} {meet}
again: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1+512], 1; @!%p3 bra.uni again;
bra.uni done;
writer:
@%p0 mbarrier.arrive.shared::cta.b64 _, [%r1+512], 1; {meet}
@%p0 mbarrier.arrive.shared::cta.b64 _, [%r1+512], 1;
done:
"""
FIRST = (
    "{ .reg .pred over; before: mbarrier.try_wait.parity.shared::cta.b64 over, [%r1+512], 0; @!over bra.uni before; }"
)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_wait_names_one_phase_of_an_mbarrier(seed):
    """A wait for parity 1 is over before the first phase is, and the wait for parity 0 is not after the second."""
    checks = Checks(seed=seed)
    assert not findings(PHASES.format(first=FIRST, meet="bar.sync 1, 64;"), checks=checks)
    for first in ("", FIRST):
        try:
            found = findings(PHASES.format(first=first, meet=""), checks=checks)
        except Fault as fault:
            found = [str(fault)]
        assert re.search("may take an earlier phase|before warp 1 has waited|deadlock", found[0]), found


def test_a_phase_that_never_ends_is_a_deadlock():
    with pytest.raises(Fault, match="deadlock"):
        findings(HAND_OVER.format(**{**RIGHT, "parity": 0}).replace("[%r1+512], 1;", "[%r1+512], 2;", 1))


def test_an_arrival_too_many():
    with pytest.raises(Fault, match="more threads arrive"):
        findings(HAND_OVER.format(**{**RIGHT, "count": 2}))


def test_a_barrier_that_not_all_reach_is_a_deadlock():
    with pytest.raises(Fault, match="deadlock"):
        findings(NAMED.format(high="bar.sync 1, 64;", low="bar.sync 2, 64;"))


def test_part_of_a_warp():
    body = "setp.eq.u32 %p0, %r0, 0; @%p0 bra skip; shfl.sync.idx.b32 %r5, %r0, 0, 31, -1; skip:"
    with pytest.raises(Fault, match="part of a warp"):
        findings(body)


# --- asynchronous copies and products --------------------------------------------------------------------------------

COPY = """
cp.async.ca.shared.global [%r2], [%rd9], 4; cp.async.commit_group; {}
bar.sync 0; ld.shared.b32 %r5, [%r3]; add.s32 %r5, %r5, 1;
"""


def test_a_copy_is_waited_for():
    assert not findings(COPY.format("cp.async.wait_group 0;"))
    assert any("yet to write" in each for each in findings(COPY.format("cp.async.wait_group 1;")))
    assert any("race" in each for each in findings(COPY.format("cp.async.wait_group 0;").replace("bar.sync 0;", "")))
    assert any("not waited for" in each for each in findings("cp.async.ca.shared.global [%r2], [%rd9], 4;"))


def test_a_copy_does_not_overwrite_a_copy():
    again = COPY.format("").replace("cp.async.commit_group;", "cp.async.ca.shared.global [%r2], [%rd9], 4;", 1)
    found = findings(again.replace("bar.sync 0;", "cp.async.wait_all; bar.sync 0;"))
    assert len(found) == 1 and "write of shared memory that an asynchronous copy is yet to write" in found[0]


def test_the_source_of_a_copy_has_bounds():
    with pytest.raises(Fault, match="out of bounds"):
        findings(COPY.format("").replace("[%rd9]", "[%rd9+4]"))


# A warp group: each thread stores 16 bytes of an 64 x 16 and of an 8 x 16 matrix, then D = A B, all of it zeros.
PRODUCT = """
shl.b32 %r2, %r0, 4; add.s32 %r2, %r2, %r1;
mov.b32 %r5, 0; mov.b32 %r6, 0f00000000; mov.b32 %r7, 0f00000000; mov.b32 %r8, 0f00000000; mov.b32 %r9, 0f00000000;
st.shared.v4.b32 [%r2], {{%r5, %r5, %r5, %r5}};
st.shared.v4.b32 [%r2+2048], {{%r5, %r5, %r5, %r5}};
{fence}
bar.sync 0;
shr.u32 %r10, %r1, 4; cvt.u64.u32 %rd5, %r10; mov.b64 %rd6, {fields};
or.b64 %rd5, %rd5, %rd6; add.s64 %rd7, %rd5, 128;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r6, %r7, %r8, %r9}}, %rd5, %rd7, 0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
{before}
{wait}
{after}
add.f32 %r11, %r6, %r7;
mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd9, %rd0; st.global.b32 [%rd9], %r11;
"""
FIELDS = (128 >> 4) << 16 | (256 >> 4) << 32  # bytes between columns of 8, and between rows of 8
WAIT, FENCE = "wgmma.wait_group.sync.aligned 0;", "fence.proxy.async.shared::cta;"


def _product(text: str = PRODUCT, **parts: str) -> tuple[np.ndarray, list[str]]:
    x = np.ones(128, "f4")
    given = {"fence": FENCE, "wait": WAIT, "before": "", "after": "", "fields": FIELDS, **parts}
    report = launch(text.format(**given), x, threads=128, shared=4096)
    return x, list(report.findings)


def test_a_product_is_waited_for():
    x, found = _product()
    assert not x.any() and not found
    assert np.isnan(_product(wait="")[0]).all()
    assert np.isnan(_product(wait=WAIT.replace("0;", "1;"))[0]).all()


def test_what_a_product_reads_is_not_overwritten():
    overwrite = "st.shared.v4.b32 [%r2], {%r5, %r5, %r5, %r5};"
    assert any("still being read" in each for each in _product(before=overwrite)[1])
    of_another_warp = "sub.s32 %r2, %r2, %r1; xor.b32 %r2, %r2, 1024; add.s32 %r2, %r2, %r1; add.s32 %r5, %r5, 1;"
    assert any("race" in each for each in _product(after=of_another_warp + overwrite)[1])
    assert not _product(after="bar.sync 0;" + of_another_warp + overwrite)[1]
    # The product may read until it is waited for, also after a barrier.
    assert any("race" in each for each in _product(before="bar.sync 0;", after=of_another_warp + overwrite)[1])


def test_registers_that_a_product_uses_are_fenced():
    without = PRODUCT.replace("wgmma.fence.sync.aligned;\n", "")
    assert any("no wgmma.fence" in each for each in _product(text=without)[1])
    # What was fenced may be moved; what is computed may not.
    again = "wgmma.fence.sync.aligned;\n{}"
    renamed = PRODUCT.replace("wgmma.fence.sync.aligned;\n", again.format("mov.b32 %r6, %r7;\n"))
    assert not _product(text=renamed)[1]
    computed = PRODUCT.replace("wgmma.fence.sync.aligned;\n", again.format("add.f32 %r6, %r7, %r8;\n"))
    assert any("no wgmma.fence" in each for each in _product(text=computed)[1])


def test_registers_of_a_product_under_way_are_not_written():
    assert any("under way" in each for each in _product(before="mov.b32 %r6, 0f00000000;")[1])
    assert not _product(after="mov.b32 %r6, 0f00000000;")[1]


def test_a_register_whose_copy_a_product_reads_is_not_written():
    """ptxas merges the two: the next p was computed before the wait for the product of this one, and came into it."""
    text = PRODUCT.replace("%rd5, %rd7, 0, 1, 1, 0, 0;", "{{%r12, %r13, %r12, %r13}}, %rd7, 0, 1, 1, 0;")
    moves = "mov.b32 %r14, %r5; mov.b32 %r12, %r14; mov.b32 %r13, %r14;\n"
    text = text.replace("wgmma.fence", moves + "wgmma.fence")
    for written, wrong in (("%r14", True), ("%r5", True), ("%r11", False)):
        computed = f"add.s32 {written}, %r1, 1;"
        found = _product(text=text, before=computed)[1]
        assert [("reads a copy" in each, len(found)) for each in found] == [(True, 1)] * wrong
        assert not _product(text=text, after=computed)[1]
    assert not _product(text=text, before="mov.b32 %r14, %r5;")[1]  # makes no new value


def test_what_threads_store_is_fenced():
    assert any("fence.proxy.async" in each for each in _product(fence="")[1])


def test_what_is_copied_is_fenced_if_asked():
    copied = re.sub(r"st\.shared\.v4\.b32 (\[.*?\]), .*", r"cp.async.cg.shared.global \1, [%rd0], 16;", PRODUCT)
    copied = copied.replace("{fence}", "cp.async.wait_all; {fence}")
    for fence, fenced_copies, count in ((FENCE, True, 0), ("", False, 0), ("", True, 1)):
        text = copied.format(fence=fence, wait=WAIT, before="", after="", fields=FIELDS)
        checks = Checks(fenced_copies=fenced_copies)
        assert len(launch(text, np.ones(128, "f4"), threads=128, shared=4096, checks=checks).findings) == count


def test_a_fence_lies_between_a_store_and_an_asynchronous_read():
    """Of the warps that stored before the barrier, or of those that multiply behind it, but not of one warp there."""
    one_warp = "setp.ge.u32 %p1, %r0, 32; @%p1 bra over; fence.proxy.async.shared::cta; over:"
    for before, behind, count in ((FENCE, "", 0), ("", FENCE, 0), ("", "", 1), ("", one_warp, 1)):
        text = PRODUCT.replace("bar.sync 0;", "bar.sync 0; " + behind)
        text = text.format(fence=before, wait=WAIT, before="", after="", fields=FIELDS)
        found = launch(text, np.ones(128, "f4"), threads=128, shared=4096, checks=Checks(clocks=True)).findings
        assert sum("fence.proxy.async" in each for each in found) == count, (before, behind, found)


def test_an_instruction_that_is_not_supported_is_named():
    with pytest.raises(NotImplementedError, match=r"not supported: fancy\.op %r5"):
        launch("fancy.op %r5, %r0;", np.zeros(1))
    with pytest.raises(NotImplementedError, match=r"add\.cc"):
        launch("add.cc.u32 %r5, %r0, %r0;", np.zeros(1))
    with pytest.raises(NotImplementedError, match=r"not supported: bar\.arrive 1, 64"):
        launch("bar.arrive 1, 64;", np.zeros(1))


def test_an_instruction_that_is_not_supported_has_its_source_line():
    with pytest.raises(NotImplementedError, match=r"fancy\.op %r5  \(kernels\.py:12\)"):
        launch(".loc 1 12 5 // kernels.py:12:5\nfancy.op %r5;", np.zeros(1))


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride, passes", [(4, 1), (8, 2), (12, 1), (128, 32), (0, 1)])
def test_bank_conflicts(stride, passes):
    body = f"mad.lo.u32 %r2, %r0, {stride}, %r1; ld.shared.b32 %r5, [%r2];"
    counts = launch(body, np.zeros(1), shared=8192, checks=Checks(banks=True)).counts
    assert (counts["shared passes"], counts["shared passes without conflicts"]) == (passes, 1)


def test_instructions_and_bytes_are_counted():
    counts = launch(OWN + "ld.global.b32 %r5, [%rd9]; st.shared.b32 [%r2], %r5;", np.zeros(64, "u4"), threads=64).counts
    assert counts["global bytes read"] == counts["shared bytes written"] == 256
    assert counts["instructions"] == 2 * (2 + 1 + 5 + 2 + 1)  # two warps: two moves, a parameter, OWN, the body, ret
