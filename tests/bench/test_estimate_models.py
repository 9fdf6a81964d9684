"""The models of whole kernels, and the published figures and constants that they stand on."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from bench.estimate import attention, constants, errors, memory, packed, published, tiles
from bench.estimate.kernels import Kernel
from bench.estimate.result import LIMITS, Estimate, together
from bench.estimate.sm.code import NONE, Code, Instruction
from bench.estimate.tiles import Shape
from bench.works.attention import AttentionVarlen

pytestmark = pytest.mark.once
H100, A100 = constants.gpus()["H100"], constants.gpus()["A100"]


def kernel(texts: list[str], labels: dict[str, int] | None = None, name: str = "k", **changes) -> Kernel:
    code = Code([Instruction(text, "", 1, NONE, NONE, 0) for text in texts], labels or {})
    made = Kernel(name, "sm_90", (1320,), 4, 32, 0, 0, {}, code)
    return dataclasses.replace(made, **changes)


# --- memory-bound kernels --------------------------------------------------------------------------------------------

COPY = ["LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "EXIT"]
LOOP = [*COPY[:2], "BRA `(.L_x_0)", "EXIT"]


def test_a_copy_is_bound_by_dram_at_the_speed_of_a_copy():
    made = memory.estimate(H100, kernel(COPY, grid=(2**20,)), 3.03e9)
    assert made.limit == "dram" and made.seconds == pytest.approx(1e-3, rel=0.02)


def test_few_programs_that_wait_for_each_row_are_bound_by_latency():
    loop = kernel(LOOP, {"L_x_0": 0}, grid=(132,))
    waits = memory.estimate(H100, loop, 1e6, memory.Walk(trips=100, steps=100))
    ahead = memory.estimate(H100, loop, 1e6, memory.Walk(trips=100, steps=100, ahead=4))
    assert waits.limit == "latency" and ahead.seconds < 0.5 * waits.seconds


def test_the_trips_of_a_loop_follow_from_what_it_stores():
    loop = kernel(LOOP, {"L_x_0": 0}, grid=(10,))
    a_trip = 10 * 128 * 16  # programs, threads, bytes
    assert memory.fitting_trips(loop, read=0, written=7 * a_trip) == pytest.approx(7, rel=0.01)
    assert memory.fitting_trips(kernel(COPY), read=1e9, written=1e9) == 1


def test_registers_that_spill_out_of_the_l1_cost_dram():
    spilling = [*COPY[:2], *["STL.128 [R1], R4"] * 8, *["LDL.128 R4, [R1]"] * 8, "EXIT"]
    few, many = (memory.estimate(H100, kernel(spilling, grid=(2**16,), warps=32, spill=n), 1e8) for n in (8, 512))
    assert many.seconds > 2 * few.seconds


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("M, N", [(128, 64), (64, 128), (128, 176)])
def test_tiles_visit_every_block_that_a_row_sees(M, N, causal):
    shape = Shape(1, 512, 4, 2, 64, causal)
    blocks = [
        (m, n) for m in range(0, 512, M) for n in range(0, 512, N) if not causal or n < min(m + M, 512)
    ]  # fmt: skip
    assert tiles.steps(tiles.of_rows(shape, M, N, heads=1)) == len(blocks)
    full = [(m, n) for m, n in blocks if n + N <= (m + 1 if causal else 512)]
    assert sum(t.plain for t in tiles.of_rows(shape, M, N, 1)) == len(full) or (M, N) == (64, 128)
    assert tiles.steps(tiles.of_keys(shape, 64, 128, heads=1, group=2)) == 2 * sum(
        1 for n in range(0, 512, 128) for m in range(0, 512, 64) if not causal or m + 64 > n
    )


@pytest.mark.parametrize("left", [None, 0, 40, 200])
@pytest.mark.parametrize("M, N", [(128, 64), (64, 128), (64, 32)])
def test_tiles_of_few_rows_and_of_windows_visit_what_a_row_sees(M, N, left):
    """Counted pair by pair; of a part of the keys too."""
    Sq, Sk = 190, 512
    own, j = torch.arange(Sk - Sq, Sk)[:, None], torch.arange(Sk)[None, :]
    see = (j <= own) & (j >= own - (Sk if left is None else left))

    def counted(see: torch.Tensor, M: int, N: int) -> tuple[int, int]:
        blocks = [rows.split(N, 1) for rows in see.split(M)]
        return sum(b.any().item() for row in blocks for b in row), sum(b.all().item() for row in blocks for b in row)

    found = tiles.of_seen_keys(Sq, Sk, left, M, N, heads=1)
    assert (tiles.steps(found), sum(t.plain for t in found)) == counted(see, M, N)
    part = tiles.of_seen_keys(Sq, Sk, left, M, N, heads=1, first=256, keys=128)
    assert tiles.steps(part) == counted(see[:, 256:384], M, N)[0]
    if left is not None:
        i, square = torch.arange(512), tiles.of_rows_that_see(512, left, N, M, heads=1, group=2)
        see = (i[None, :] >= i[:, None]) & (i[None, :] <= i[:, None] + left)  # keys by rows
        assert (tiles.steps(square), sum(t.plain for t in square)) == tuple(2 * n for n in counted(see, M, N))


def test_programs_start_as_sms_come_free():
    assert tiles.cycles([(3.0, 1), (1.0, 3)], slots=2) == 3.0  # 3 beside 1 + 1 + 1
    assert tiles.cycles([(1.0, 133)], slots=132) == 2.0  # one program too many


# --- attention -------------------------------------------------------------------------------------------------------


def attention_kernel(softmax: int) -> Kernel:
    product = "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24"
    body = [*[product] * 15, product + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", *["FADD R1, R2, R3"] * softmax]
    texts = [*body, "BRA `(.L_x_0)", "EXIT"]
    sizes = {"BLOCK_M": 128, "BLOCK_N": 128}
    return kernel(texts, {"L_x_0": 0}, "_forward", warps=8, registers=200, shared=160 * 1024, constants=sizes)


def test_attention_without_a_softmax_is_bound_by_tensor_cores():
    shape = Shape(4, 8192, 32, 8, 128, causal=False)
    fast, slow = (attention.forward(H100, attention_kernel(n), shape) for n in (0, 3000))
    assert fast.limit == "tensor" and slow.limit in ("issue", "latency") and slow.seconds > 2 * fast.seconds
    assert shape.flops / fast.seconds / 1e12 < 989


def test_time_grows_with_batch_and_with_the_square_of_the_length():
    one = attention_kernel(200)
    base, batch, long = (
        attention.forward(H100, one, Shape(B, S, 32, 8, 128)).seconds for B, S in ((4, 4096), (8, 4096), (4, 8192))
    )
    assert batch / base == pytest.approx(2, rel=0.05) and long / base == pytest.approx(4, rel=0.1)


def test_the_clock_falls_with_the_load_of_the_tensor_cores():
    full = 4096 * H100.sms * 1e6  # FLOPs of 1e6 cycles at the full rate
    clocks = [attention.clock_under(H100, share * full, 1e6) for share in (0.0, 0.4, 0.7, 1.0)]
    assert clocks[:2] == [H100.clock] * 2 and clocks[1] > clocks[2] > clocks[3] == H100.loaded_clock


def test_programs_without_work_add_to_the_time_and_bind_where_they_are_most():
    one, shape = attention_kernel(200), Shape(1, 4096, 32, 8, 128)
    work = tiles.of_rows(shape, 128, 128, heads=32)
    full, some, many = (
        attention.kernel_estimate(H100, one, work, flops=shape.flops, l2_bytes=0, kind="packed", empty=n)
        for n in (0, 20_000, 2_000_000)
    )
    assert full.empty == 0 and full.seconds < some.seconds < many.seconds
    # The clock rises a little, since the tensor cores do less.
    assert 0.5 * some.empty < some.seconds - full.seconds <= some.empty
    assert some.limit != "empty" and many.limit == "empty"


def test_documents_have_the_tiles_of_their_own_lengths():
    work = AttentionVarlen(shape="", lengths=(300, 128, 1), Hq=4, Hkv=2, D=64)
    found = [t for n in work.lengths for t in tiles.of_rows(Shape(1, n, 4, 2, 64), 128, 64, heads=4)]
    assert sum(t.count for t in found) == (3 + 1 + 1) * 4
    launched = kernel([], grid=(3 * 3 * 2,))  # of one key head: tiles of the longest, documents, query heads
    assert packed.empty_programs(launched, live=5 * 4, heads=2) == 36 - 20


def test_a_kernel_without_products_is_refused():
    with pytest.raises(ValueError, match="no loop around products"):
        attention.steps_of(kernel(COPY), 1)


# --- results and data ------------------------------------------------------------------------------------------------


def test_calls_one_after_another_add_up_and_the_largest_names_the_limit():
    made = together({"a": Estimate(1.0, "dram", 0.04), "b": Estimate(3.0, "tensor", 0.1)})
    assert (made.seconds, made.limit, made.error) == (4.0, "tensor", 0.1) and made.parts == (("a", 1.0), ("b", 3.0))
    assert (made.low, made.high) == pytest.approx((3.6, 4.4))


def test_every_constant_has_a_value_and_a_source():
    def rows(tree):
        yield from [tree] if "value" in tree else [row for branch in tree.values() for row in rows(branch)]

    found = list(rows(json.loads(constants.FILE.read_text())))
    assert len(found) > 50 and all(row["source"] and set(row) == {"value", "unit", "source"} for row in found)


def test_every_published_figure_has_a_source_and_a_unit():
    found = list(published.figures())
    assert len(found) > 100
    for f in found:
        assert f.source and f.unit in ("us", "GB/s", "TFLOP/s") and f.value > 0 and f.gpu in constants.gpus(), f
        assert re.match(r"(rms_norm|add_rms_norm|rope|attention) (forward|backward)$", f.what), f


def test_no_published_rate_exceeds_its_gpu():
    most = {"H100": 3350, "H200": 4800, "A100": 2039}  # GB/s, data sheets
    for f in published.figures():
        if f.unit == "TFLOP/s":
            assert f.value < (312 if f.gpu == "A100" else 989), f
        if f.unit == "GB/s":
            assert f.value < most[f.gpu], f


def test_an_estimate_states_the_error_of_its_kind():
    assert errors.error_of("no such kind", "sm_90") == errors.UNKNOWN
    known = errors.errors()
    assert known and all(0 < e.mean <= abs(e.worst) and e.points for e in known.values())
    for kind, family in {key[:2] for key in known}:
        both = [e for key, e in known.items() if key[:2] == (kind, family)]  # of peers' kernels and of ours
        assert min(e.mean for e in both) <= errors.error_of(kind, family)
        assert errors.error_of(kind, family) <= max(*(e.mean for e in both), 0.1)
        assert errors.error_of(kind, family) >= (0.1 if sum(e.points for e in both) < 10 else 0.04)
    assert set(LIMITS) >= {"dram", "tensor", "mufu", "issue", "latency", "empty"}
