"""bench.reporting.goals on artificial records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from bench.measuring.records import Record
from bench.reporting import goals
from bench.works.presets import works_of
from tests.bench.fakes import HEADS, norm_row, record

pytestmark = pytest.mark.once


def standing(
    work: str, direction: str, quantity: str, portable: list[Record], hopper: Sequence[Record] = ()
) -> goals.Standing:
    (found,) = [s for s in goals.standings(portable, hopper)
                if (s.goal.work, s.goal.direction, s.goal.quantity) == (work, direction, quantity)]  # fmt: skip
    return found


def test_a_share_of_the_copy_bandwidth_is_that_of_the_slowest_shape():
    rs = [norm_row(2048, 97), norm_row(4096, 96), norm_row(131072, 50), norm_row(1024, 50), norm_row(64, 93)]
    rows = standing("RMSNorm, rows of 2k to 65k", "forward", goals.COPY, rs)
    assert rows.value == 0.96 and rows.met
    assert standing("RMSNorm, rows of 64 and 128", "forward", goals.COPY, rs).value == 0.93
    slower = [*rs, norm_row(8192, 94)]
    assert standing("RMSNorm, rows of 2k to 65k", "forward", goals.COPY, slower).met is False
    others = [norm_row(8192, 1, provider="liger"), dataclasses.replace(norm_row(8192, 1), dtype="float32"),
              dataclasses.replace(norm_row(8192, 1), estimate=True)]  # fmt: skip
    assert standing("RMSNorm, rows of 2k to 65k", "forward", goals.COPY, rs + others).value == 0.96


def test_a_ratio_compares_times_of_the_same_work():
    work = "attention, D=128, 4k to 16k"
    sizes = {**HEADS, "window": -1}
    ours = record("attention", "forward", 2.0, sizes=sizes)
    flash = record("attention", "forward", 2.6, "sdpa-flash", sizes=sizes)
    other = record("attention", "forward", 9.9, "sdpa-flash", sizes={**sizes, "S": 8192})
    found = standing(work, "forward", goals.RATIO, [other, ours, flash])
    assert found.value == pytest.approx(1.3) and found.met
    absent = dataclasses.replace(flash, ms=None, reason="needs a newer GPU")
    assert standing(work, "forward", goals.RATIO, [ours, absent])[1:] == (None, "needs a newer GPU")
    assert standing(work, "forward", goals.RATIO, [ours])[1:] == (None, "no record of it")
    windowed = [dataclasses.replace(r, sizes={**sizes, "window": 1023}) for r in (ours, flash)]
    assert standing(work, "forward", goals.RATIO, windowed).value is None


def test_hopper_goals_use_the_records_of_the_hopper_run():
    sizes = {**HEADS, "window": -1}
    portable = record("attention", "forward", 2.0, sizes=sizes, unit="TFLOP/s", rate=450.0)
    hopper = dataclasses.replace(portable, ms=1.4, rate=640.0)
    cudnn = record("attention", "forward", 1.5, "sdpa-cudnn", sizes=sizes)
    work = "the same, Hopper kernels"
    assert standing(work, "forward", goals.RATE, [portable], [hopper, cudnn]).value == 640
    assert standing(work, "forward", goals.RATIO, [portable], [hopper, cudnn]).value == pytest.approx(1.5 / 1.4)
    assert standing(work, "forward", goals.RATE, [portable, cudnn]).why == "no record"


def test_packed_documents_are_compared_with_equal_ones():
    packed = record("attention_varlen", "forward", 2.0, shape="packed documents", sizes={}, unit="TFLOP/s", rate=400.0)
    equal = dataclasses.replace(packed, shape="equal documents", rate=430.0)
    work = "packed, unequal over equal documents"
    assert standing(work, "forward", goals.SHARE, [packed, equal]).value == pytest.approx(400 / 430)
    assert standing(work, "forward", goals.SHARE, [packed]).why == "no record of equal documents"


def test_rows_that_are_wrong_or_were_not_run_have_no_value():
    late = dataclasses.replace(norm_row(4096, 0), ms=None, percent=None, reason="not run: out of time")
    wrong = dataclasses.replace(late, reason="wrong numbers: y is off by 1.0e+00, allowed 1.0e-02")
    work = ("RMSNorm, rows of 2k to 65k", "forward", goals.COPY)
    assert standing(*work, [norm_row(2048, 97), late]).value == 0.97
    assert standing(*work, [late]).why == "not run: out of time"
    assert standing(*work, [norm_row(2048, 97), wrong]).why.startswith("wrong numbers")


def test_each_goal_picks_some_work_of_the_bench():
    """After a size or an op was renamed, a goal would have no records, without an error."""
    missing = []
    for goal in goals.GOALS:
        sizes = [{"S": 4096, "Hq": 32, "Hkv": 8, "D": 128} | w.sizes for w in works_of("all") if w.op == goal.op]
        rs = [record(goal.op, goal.direction, 1.0, sizes=each) for each in sizes]
        if not any(map(goal.picks, rs)):
            missing.append(str(goal))
    assert not missing
