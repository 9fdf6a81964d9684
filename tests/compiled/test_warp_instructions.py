"""Memory, warp and tensor-core instructions against loops written from the PTX ISA, one thread or element at a time."""

from __future__ import annotations

import numpy as np
import pytest

from .global_memory import Fault
from .ptx_text import launch
from .report import Report

# %rd9: the address of the thread's own 4 bytes of array 0.
OWN = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd9, %rd0;"


def results(body: str, threads: int = 32, value: str = "%r5", **options) -> list[int]:
    """What each thread has in a register."""
    out = np.zeros(threads, "u4")
    launch(f"{OWN} {body} st.global.b32 [%rd9], {value};", out, threads=threads, **options)
    return out.tolist()


# --- control flow, special registers, memory -------------------------------------------------------------------------


def test_lanes_part_at_a_branch_and_meet_again():
    body = """
    setp.lt.u32 %p0, %r0, 5;
    mov.b32 %r5, 1;
    @%p0 bra low;
    mov.b32 %r5, 2;
    bra.uni done;
    low: add.s32 %r5, %r5, %r0;
    done: shfl.sync.idx.b32 %r5, %r5, 4, 31, -1;
    """
    assert results(body, 64) == [5] * 32 + [2] * 32


def test_a_loop_ends_for_each_lane_on_its_own():
    body = "mov.b32 %r5, 0; loop: add.s32 %r5, %r5, 3; setp.lt.u32 %p0, %r5, %r0; @%p0 bra loop;"
    assert results(body) == [max(3, -(-i // 3) * 3) for i in range(32)]


def test_a_table_of_branches_and_an_early_return():
    body = """
    rem.u32 %r6, %r0, 3; mov.b32 %r5, 9;
    targets: .branchtargets one, two, three;
    brx.idx %r6, targets;
    one: mov.b32 %r5, 1; bra.uni done;
    two: mov.b32 %r5, 2; bra.uni done;
    three: ret;
    done:
    """
    assert results(body) == [(1, 2, 0)[i % 3] for i in range(32)]


def test_a_guard_keeps_the_other_lanes():
    assert results("mov.b32 %r5, 7; setp.gt.u32 %p0, %r0, 9; @!%p0 mov.b32 %r5, 8; @%p0 add.s32 %r5, %r5, %r0;") == [
        8 if i <= 9 else 7 + i for i in range(32)
    ]


def test_trap_and_exit():
    with pytest.raises(Fault, match="trap"):
        results("setp.eq.u32 %p0, %r0, 3; @%p0 trap; mov.b32 %r5, 1;")
    assert results("setp.eq.u32 %p0, %r0, 3; mov.b32 %r5, 1; @%p0 exit;") == [int(i != 3) for i in range(32)]


@pytest.mark.parametrize("nothing", [
    "membar.cta;", "griddepcontrol.wait;", "setmaxnreg.inc.sync.aligned.u32 240;", "discard.global.L2 [%rd0], 128;",
    "prefetch.global.L2 [%rd0];", "nanosleep.u32 20;", "barrier.sync 0;",
])  # fmt: skip
def test_instructions_that_change_no_result(nothing):
    assert results(f"add.s32 %r5, %r0, 7; {nothing}") == [i + 7 for i in range(32)]


def test_special_registers():
    body = "mov.u32 %r5, %ctaid.x; mov.u32 %r6, %nctaid.x; mad.lo.u32 %r5, %r5, 100, %r6; mov.u32 %r7, %ntid.x;"
    out = np.zeros(6 * 64, "u4")
    address = (
        "mov.u32 %r9, %ctaid.x; mad.lo.u32 %r9, %r9, 64, %r0; mul.wide.u32 %rd9, %r9, 4; add.s64 %rd9, %rd9, %rd0;"
    )
    launch(f"{body} add.s32 %r5, %r5, %r7; {address} st.global.b32 [%rd9], %r5;", out, threads=64, grid=6)
    assert out.reshape(6, 64).tolist() == [[100 * cta + 6 + 64] * 64 for cta in range(6)]
    assert results("mov.u32 %r5, %laneid; mov.u32 %r6, %warpid; mad.lo.u32 %r5, %r6, 100, %r5;", 64) == [
        i // 32 * 100 + i % 32 for i in range(64)
    ]


def test_vectors_of_every_width():
    x, out = np.arange(256, dtype="u1"), np.zeros(256, "u1")
    body = """
    mul.wide.u32 %rd8, %r0, 8; add.s64 %rd9, %rd0, %rd8; add.s64 %rd10, %rd1, %rd8;
    ldu.global.v4.b16 {%h1, %h2, %h3, %h4}, [%rd9];
    mad.lo.u32 %r2, %r0, 8, %r1;
    st.shared.v2.b16 [%r2], {%h2, %h1};
    st.shared.b16 [%r2+4], %h4;
    st.shared.b8 [%r2+6], %h3;
    ld.shared.b8 %h5, [%r2+6];
    ld.shared.v2.b16 {%h6, %h7}, [%r2];
    ld.shared.b16 %h8, [%r2+4];
    st.global.v4.b16 [%rd10], {%h6, %h7, %h8, %h5};
    """
    launch(body, x, out)
    rows = x.view("u2").reshape(32, 4)
    assert (out.view("u2").reshape(32, 4) == np.stack([rows[:, 1], rows[:, 0], rows[:, 3], rows[:, 2] & 255], 1)).all()


@pytest.mark.parametrize("op, type_, expected", [
    ("add", "u32", lambda old, xs: old + sum(xs)), ("max", "u32", lambda old, xs: max(old, *xs)),
    ("min", "u32", lambda old, xs: min(old, *xs)), ("or", "b32", lambda old, xs: old | 31),
    ("and", "b32", lambda old, xs: 0), ("xor", "b32", lambda old, xs: old ^ 0),
])  # fmt: skip
def test_atomics(op, type_, expected):
    x = np.array([5], "u4")
    launch(f"red.global.{op}.{type_} [%rd0], %r0;", x)
    assert x[0] == expected(5, range(32))


def test_atomics_return_what_was_there():
    x, out = np.array([5], "u4"), np.zeros(32, "u4")
    store = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd9, %rd1; st.global.b32 [%rd9], %r5;"
    launch("atom.global.exch.b32 %r5, [%rd0], %r0;" + store, x, out)
    assert out.tolist() == [5, *range(31)] and x[0] == 31
    launch("mov.b32 %r6, 31; atom.global.cas.b32 %r5, [%rd0], %r6, %r0;" + store, x, out)
    assert out.tolist() == [31, *[0] * 31] and x[0] == 0
    y = np.array([0.5], "f4")
    launch("mov.b32 %r5, 0f3E800000; red.global.add.f32 [%rd0], %r5;", y)
    assert y[0] == 0.5 + 32 * 0.25


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(size):
    """Even threads copy; odd ones, of which no byte is given, fill with zeros."""
    x, out = np.random.default_rng(0).integers(0, 256, 32 * size, "u1"), np.zeros(32 * size, "u1")
    body = f"""
    mul.wide.u32 %rd8, %r0, {size}; add.s64 %rd9, %rd0, %rd8; add.s64 %rd10, %rd1, %rd8;
    mad.lo.u32 %r2, %r0, {size}, %r1;
    and.b32 %r3, %r0, 1; setp.eq.u32 %p0, %r3, 0; selp.b32 %r3, {size}, 0, %p0;
    cp.async.{"cg" if size == 16 else "ca"}.shared.global [%r2], [%rd9], {size}, %r3;
    cp.async.wait_all;
    """ + "".join(f"ld.shared.b32 %r5, [%r2+{i}]; st.global.b32 [%rd10+{i}], %r5;" for i in range(0, size, 4))
    launch(body, x, out)
    rows = x.reshape(32, size).copy()
    rows[1::2] = 0
    assert (out.reshape(32, size) == rows).all()


# --- warps -----------------------------------------------------------------------------------------------------------


def _shuffled(how: str, i: int, by: int, clamp: int) -> int:
    """The pseudocode of shfl.sync."""
    segment, last = clamp >> 8 & 31, clamp & 31
    most = (i & segment) | (last & ~segment)
    if how == "up":
        return i - by if i - by >= most else i
    j = {"down": i + by, "bfly": i ^ by, "idx": (i & segment) | (by & ~segment & 31)}[how]
    return j if j <= most else i


@pytest.mark.parametrize("how", ["up", "down", "bfly", "idx"])
def test_shuffles(how):
    for by in (0, 1, 5, 16, 31):
        for clamp in (0, 31, 0x1C1F, 0x181F, 0x1800):
            got = results(f"add.s32 %r5, %r0, 100; shfl.sync.{how}.b32 %r5, %r5, {by}, {clamp}, -1;", 64)
            assert got == [100 + i // 32 * 32 + _shuffled(how, i % 32, by, clamp) for i in range(64)], (by, clamp)
    got = results("add.s32 %r5, %r0, 100; shr.u32 %r6, %r0, 1; shfl.sync.idx.b32 %r5, %r5, %r6, 31, -1;")
    assert got == [100 + i // 2 for i in range(32)]


def test_votes_and_reductions():
    third = "rem.u32 %r6, %r0, 3; setp.eq.u32 %p0, %r6, 0;"
    mask = sum(1 << i for i in range(32) if i % 3 == 0)
    assert results(third + "vote.sync.ballot.b32 %r5, %p0, -1;") == [mask] * 32
    assert results(third + "vote.sync.ballot.b32 %r5, !%p0, -1;") == [mask ^ 0xFFFFFFFF] * 32
    first = "setp.lt.u32 %p0, %r0, 32; {} selp.b32 %r5, 1, 0, %p1;"
    assert results(first.format("vote.sync.all.pred %p1, %p0, -1;"), 64) == [1] * 32 + [0] * 32
    assert results(third + "vote.sync.any.pred %p1, %p0, -1; selp.b32 %r5, 1, 0, %p1;") == [1] * 32
    assert results("redux.sync.add.s32 %r5, %r0, -1;", 64) == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    assert results("redux.sync.max.u32 %r5, %r0, -1;", 64) == [31] * 32 + [63] * 32
    assert results("elect.sync %r6|%p1, -1; selp.b32 %r5, 1, 0, %p1;", 64) == ([1] + [0] * 31) * 2


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Row j of matrix i is at the address that lane 8 i + j holds: here the rows lie in reverse order."""
    out = np.zeros((count, 32), "u4")
    registers = "{" + ", ".join(f"%r{20 + i}" for i in range(count)) + "}"
    body = f"""
    and.b32 %r2, %r0, {8 * count - 1}; sub.s32 %r2, {8 * count - 1}, %r2; mad.lo.u32 %r2, %r2, 16, %r1;
    """ + "".join(
        f"mad.lo.u32 %r4, %r0, 2, {64 * i}; shl.b32 %r5, %r4, 16; add.s32 %r5, %r5, 65536; or.b32 %r5, %r5, %r4;"
        f"mad.lo.u32 %r6, %r0, 4, %r1; st.shared.b32 [%r6+{128 * i}], %r5;"
        for i in range(count)
    )
    load = f"bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {registers}, [%r2];"
    store = "".join(f"{OWN} st.global.b32 [%rd9+{128 * i}], %r{20 + i};" for i in range(count))
    launch(body + load + store, out)
    memory = np.arange(64 * count).reshape(8 * count, 8)  # 16-bit elements by row
    for i in range(count):
        for lane in range(32):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                row, column = (column, row) if transposed else (row, column)
                want = memory[8 * count - 1 - (8 * i + row), column]
                assert out[i, lane] >> 16 * half & 0xFFFF == want, (i, lane, half)
    # stmatrix puts them back where ldmatrix took them from.
    again = np.zeros((count, 32), "u4")
    back = f"stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r2], {registers};"
    clear = "".join(f"mad.lo.u32 %r6, %r0, 4, %r1; st.shared.b32 [%r6+{128 * i}], 0;" for i in range(count))
    read = "".join(
        f"ld.shared.b32 %r7, [%r6+{128 * i}]; {OWN} st.global.b32 [%rd9+{128 * i}], %r7;" for i in range(count)
    )
    launch(body + load + clear + back + read, again)
    assert (again.view("u2").reshape(-1) == memory.reshape(-1)).all()


# --- tensor cores ----------------------------------------------------------------------------------------------------


def _bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Small integers, exact in every type, as the registers hold them."""
    if kind == "f16":
        return x.astype("f2").view("u2").astype("u4")
    if kind == "bf16":
        return x.astype("f4").view("u4") >> 16
    return x.astype("f4").view("u4")


def _packed(matrix: np.ndarray, kind: str, at) -> int:
    """A register: one element (tf32), or two beside each other in k."""
    if kind == "tf32":
        return int(matrix[at(0)])
    return int(matrix[at(0)]) | int(matrix[at(1)]) << 16


@pytest.mark.parametrize("kind, k", [("f16", 16), ("bf16", 16), ("f16", 8), ("tf32", 8), ("tf32", 4)])
def test_mma(kind, k):
    """The fragments as the ISA's tables have them: groupID = lane / 4, threadID_in_group = lane % 4."""
    chance = np.random.default_rng(0)
    A, B, C = (chance.integers(-8, 8, shape).astype("f4") for shape in ((16, k), (k, 8), (16, 8)))
    a_bits, b_bits = _bits(A, kind), _bits(B, kind)
    per = 1 if kind == "tf32" else 2
    a_count, b_count = 16 * k // 32 // per, 8 * k // 32 // per
    given = np.zeros((32, 12), "u4")
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(a_count):
            row, column = g + 8 * (i % 2), per * t + 4 * per * (i // 2)
            given[lane, i] = _packed(a_bits, kind, lambda e, r=row, c=column: (r, c + e))
        for i in range(b_count):
            given[lane, 4 + i] = _packed(b_bits, kind, lambda e, r=per * t + 4 * per * i, c=g: (r + e, c))
        for i in range(4):
            given[lane, 8 + i] = C[g + 8 * (i // 2), 2 * t + i % 2 : 2 * t + i % 2 + 1].view("u4")[0]
    out = np.zeros((32, 4), "f4")
    loads = "mul.wide.u32 %rd9, %r0, 48; add.s64 %rd9, %rd9, %rd0;"
    loads += "".join(f"ld.global.b32 %r{20 + i}, [%rd9+{4 * i}];" for i in range(12))
    a, b, c = (", ".join(f"%r{20 + first + i}" for i in range(n)) for first, n in ((0, a_count), (4, b_count), (8, 4)))
    body = f"""
    {loads}
    mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%r40, %r41, %r42, %r43}}, {{{a}}}, {{{b}}}, {{{c}}};
    mul.wide.u32 %rd9, %r0, 16; add.s64 %rd9, %rd9, %rd1; st.global.v4.b32 [%rd9], {{%r40, %r41, %r42, %r43}};
    """
    launch(body, given, out)
    D = A @ B + C
    for lane in range(32):
        g, t = lane // 4, lane % 4
        assert out[lane].tolist() == [D[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)], lane


def _k_major(matrix: np.ndarray, memory: np.ndarray, start: int) -> int:
    """Rows of 64 16-bit elements, 128 bytes, whose 16-byte chunks are exchanged by the row's number: the 128-byte
    swizzle. The descriptor: start, 1, bytes between 8 rows, swizzle mode 1."""
    for r in range(matrix.shape[0]):
        for c in range(matrix.shape[1]):
            chunk = (c // 8) ^ (r % 8)
            memory[(start + 128 * r + 16 * chunk + 2 * (c % 8)) // 2] = matrix[r, c]
    return start >> 4 | 1 << 16 | (1024 >> 4) << 32 | 1 << 62


def _mn_major(matrix: np.ndarray, memory: np.ndarray, start: int) -> int:
    """The transpose: rows of 64 elements along m or n, 8 rows along k in a block of 1024 bytes."""
    for mn in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            chunk = (mn % 64 // 8) ^ (k % 8)
            byte = start + mn // 64 * 2048 + k // 8 * 1024 + k % 8 * 128 + 16 * chunk + 2 * (mn % 8)
            memory[byte // 2] = matrix[mn, k]
    return start >> 4 | (2048 >> 4) << 16 | (1024 >> 4) << 32 | 1 << 62


def _plain(matrix: np.ndarray, memory: np.ndarray, start: int) -> int:
    """Without a swizzle: blocks of 8 rows of 16 bytes; 128 bytes to the next columns, 1024 to the next 8 rows."""
    for r in range(matrix.shape[0]):
        for c in range(matrix.shape[1]):
            memory[(start + r // 8 * 1024 + r % 8 * 16 + c // 8 * 128 + c % 8 * 2) // 2] = matrix[r, c]
    return start >> 4 | (128 >> 4) << 16 | (1024 >> 4) << 32


LAYOUTS = {"k-major": (_k_major, 0), "mn-major": (_mn_major, 1), "no swizzle": (_plain, 0)}


@pytest.mark.parametrize("from_registers", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wgmma(kind, layout, from_registers):
    chance = np.random.default_rng(0)
    A, B, C = (chance.integers(-8, 8, shape).astype("f4") for shape in ((64, 16), (64, 16), (64, 64)))
    put, turned = LAYOUTS[layout]
    memory = np.zeros(32768 // 2, "u2")
    base = 1024  # shared memory begins there
    descriptors = np.array([put(_bits(A, kind), memory, 0), put(_bits(B, kind), memory, 16384)], "u8") + (base >> 4)
    registers = np.zeros((128, 36), "u4")
    for thread in range(128):
        g, t, warp = thread % 32 // 4, thread % 4, thread // 32
        for i in range(4):
            row, column = 16 * warp + g + 8 * (i % 2), 2 * t + 8 * (i // 2)
            registers[thread, i] = _packed(_bits(A, kind), kind, lambda e, r=row, c=column: (r, c + e))
        for i in range(32):
            row, column = 16 * warp + g + 8 * (i % 4 // 2), i // 4 * 8 + 2 * t + i % 2
            registers[thread, 4 + i] = C[row, column : column + 1].view("u4")[0]
    out = np.zeros((128, 32), "f4")
    fill = "".join(
        f"ld.global.b32 %r3, [%rd8+{512 * i}]; st.shared.b32 [%r2+{512 * i}], %r3;" for i in range(32768 // 512)
    )
    d = ", ".join(f"%r{24 + i}" for i in range(32))
    a = "{%r20, %r21, %r22, %r23}" if from_registers else "%rd5"
    turns = f"{turned}" if from_registers else f"{turned}, {turned}"
    body = f"""
    mul.wide.u32 %rd8, %r0, 4; add.s64 %rd8, %rd8, %rd0; mad.lo.u32 %r2, %r0, 4, %r1; {fill}
    fence.proxy.async; bar.sync 0;
    mul.wide.u32 %rd9, %r0, 144; add.s64 %rd9, %rd9, %rd2;
    {"".join(f"ld.global.b32 %r{20 + i}, [%rd9+{4 * i}];" for i in range(36))}
    ld.global.b64 %rd5, [%rd1]; ld.global.b64 %rd6, [%rd1+8];
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind} {{{d}}}, {a}, %rd6, 1, 1, 1, {turns};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %rd9, %r0, 128; add.s64 %rd9, %rd9, %rd3;
    {"".join(f"st.global.b32 [%rd9+{4 * i}], %r{24 + i};" for i in range(32))}
    """
    report = launch(body, memory, descriptors, registers, out, threads=128, shared=32768)
    D = A @ B.T + C
    for thread in range(128):
        g, t, warp = thread % 32 // 4, thread % 4, thread // 32
        want = [D[16 * warp + g + 8 * (i % 4 // 2), i // 4 * 8 + 2 * t + i % 2] for i in range(32)]
        assert out[thread].tolist() == want, thread
    assert not report.findings


# --- the tensor memory accelerator -----------------------------------------------------------------------------------


BOX = """
setp.eq.u32 %p0, %r0, 0; mov.b32 %r2, {row}; mov.b32 %r3, {column};
@%p0 mbarrier.init.shared::cta.b64 [%r1+8192], 1;
fence.mbarrier_init.release.cluster;
bar.sync 0;
@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r1+8192], {bytes};
mov.b64 %rd5, k_param_1; mov.b32 %r7, k_param_2; cvt.u64.u32 %rd6, %r7;
@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd5, {{%r3, %r2}}], [%r1+8192];
{{ .reg .pred complete;
waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1+8192], 0;
@!complete bra.uni waitLoop;
}}
shl.b32 %r4, %r0, 1; add.s32 %r6, %r4, %r1; mul.wide.u32 %rd8, %r4, 1; add.s64 %rd8, %rd8, %rd0;
{read}
@%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd6, {{%r3, %r2}}], [%r1];
@%p0 cp.async.bulk.commit_group;
@%p0 cp.async.bulk.wait_group.read 0;
"""  # noqa: E501


def _copy_a_box(
    at: tuple[int, int], swizzle: int, width: int, drop: str = "", more: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Report]:
    """A box of 8 rows of a tensor (32, 64), to the same place of another: the tensor, the other, what was in shared
    memory, and the report. drop: a part of the line to leave out. more: bytes too many that are expected."""
    x = np.arange(32 * 64, dtype="u2").reshape(32, 64)
    out, seen = np.full_like(x, 7), np.zeros(8 * width, "u2")
    box = (32, 64), (64, 1), (8, width), 2, swizzle, "f2"
    read = "".join(f"ld.shared.b16 %h1, [%r6+{64 * i}]; st.global.b16 [%rd8+{64 * i}], %h1;" for i in range(width // 4))
    body = BOX.format(row=at[0], column=at[1], bytes=16 * width + more, read=read)
    if drop:
        assert drop in body
        body = "\n".join(line for line in body.splitlines() if drop not in line)
    return x, out, seen, launch(body, seen, x, out, shared=16384, boxes={1: box, 2: box})


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("at", [(0, 0), (3, 8), (-2, 0), (30, 24)])
def test_a_box_is_copied_in_and_out(swizzle, at):
    """A box of 8 rows of 16, 32, 64 or 128 bytes; what lies outside of the tensor is zeros, and is not written."""
    width = {0: 8, 1: 16, 2: 32, 3: 64}[swizzle]
    x, out, seen, report = _copy_a_box(at, swizzle, width)
    chunks = {0: 1, 1: 2, 2: 4, 3: 8}[swizzle]
    for i in range(8):
        for j in range(width):
            row, column = at[0] + i, at[1] + j
            inside = 0 <= row < 32 and 0 <= column < 64
            byte = 2 * (i * width + j)
            line = byte // 128  # of 128 bytes, whose number is mixed into its 16-byte chunks
            swizzled = byte ^ (line % chunks * 16)
            assert seen[swizzled // 2] == (x[row, column] if inside else 0), (i, j)
            if inside:
                assert out[row, column] == x[row, column]
    assert (out == 7).sum() >= out.size - 8 * width and not report.findings


@pytest.mark.parametrize("drop, said", [
    ("fence.mbarrier_init", "no fence.mbarrier_init or fence.proxy.async between"),
    ("bra.uni waitLoop", "read of shared memory that an asynchronous copy is yet to write"),
    ("cp.async.bulk.wait_group", "given up before a copy out of it is waited for"),
    ("cp.async.bulk.commit_group", "given up before a copy out of it is waited for"),
])  # fmt: skip
def test_copies_of_boxes_are_waited_for(drop, said):
    assert any(said in each for each in _copy_a_box((0, 0), 0, 8, drop)[3].findings)


def test_bytes_that_never_come_are_a_deadlock():
    with pytest.raises(Fault, match="deadlock"):
        _copy_a_box((0, 0), 0, 8, more=16)
