"""The page of bench.gpu_check, made from artificial outcomes and records."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench.gpu_check import page, state
from bench.gpu_check.stages import stages
from bench.gpu_check.state import FAILED, PASSED, UNFINISHED, Outcome
from bench.measuring import records
from bench.measuring.records import Run
from tests.bench.fake_stages import ABOUT, HOPPER
from tests.bench.fakes import HEADS, norm_row, record

pytestmark = pytest.mark.once


def a_full_run(folder: Path, wrong: bool = False) -> list[Outcome]:
    """Write the files that all stages leave, and return their outcomes: all good, or all `wrong`."""
    status, counts = FAILED if wrong else PASSED, {"passed": 1234, "kernels compiled": 99}
    outcomes = [Outcome(s.name, status, 61.0, f"{s.name} " * 30, counts, {}) for s in stages(HOPPER)]
    sizes = {**HEADS, "window": -1}
    rs = [norm_row(4096, 97), record("attention", "forward", 2.0, sizes=sizes, unit="TFLOP/s", rate=500.0),
          record("attention", "forward", 2.6, "sdpa-flash", sizes=sizes)]  # fmt: skip
    machine = {**ABOUT}
    records.write(Run(machine, {"copy": 3012.0, "bfloat16": 798.0}, rs, {}), folder / "speed" / "records.json")
    fast = [record("attention", "forward", 1.3, sizes=sizes, unit="TFLOP/s", rate=610.0)]
    records.write(Run(machine, {}, fast, {}), folder / "hopper-speed" / "records.json")
    checked = [record("rope", "forward", None, error=2e-3, reason="wrong numbers: q" * 20 if wrong else None)]
    records.write(Run(machine, {}, checked, {}), folder / "parity" / "records.json")
    tile = "BLOCK_M 128, BLOCK_N 128, BLOCK_D 128, BLOCK_DV 128, 8 warps, 2 stages"
    plain = [[name, tile, name[:4]] for name in page._ATTENTION]
    layer = [[name, tile, "other" if wrong and name == "dq_kernel" else key] for name, _, key in plain]
    launched = {"bench: attention, Llama 3.1 8B, Qwen3 8B, bfloat16": plain, "patched layer: Llama 3.1 8B": layer}
    state.write_json({"launched": launched, "target": {"family": "sm_90"}}, folder / "compile" / "kernels.json")
    state.write_json([{"op": "rope", "forward": 40.0 if wrong else 15.0}], folder / "host" / "microseconds.json")
    state.write_json(machine, folder / "machine.json")
    return outcomes


@pytest.mark.parametrize("wrong", [False, True])
def test_the_page_shows_all_results_and_fits_a_terminal(wrong, tmp_path, monkeypatch):
    outcomes = a_full_run(tmp_path, wrong)
    before = Run({**ABOUT, "date": "2025-12-31"}, {}, [norm_row(4096, 97, ms=0.5 if wrong else 1.0)] * 9, {})
    records.write(before, tmp_path / "before.json")
    monkeypatch.setattr(records, "latest", lambda gpu: tmp_path / "before.json")
    (tmp_path / "hopper").mkdir()
    said = "llama_kernels: attention forward takes its portable kernel from here on, since the Hopper one failed. Boom"
    (tmp_path / "hopper" / "x.txt").write_text(said if wrong else "")
    found = page.Findings.of(tmp_path, outcomes)
    lines = page.page(found).splitlines()
    assert len(lines) <= page.LINES and max(map(len, lines)) <= page.COLUMNS
    text = "\n".join(lines)
    assert "next" in lines and lines[-1] != "next"
    assert "forward_kernel: BLOCK_M 128, BLOCK_N 128" in text
    if wrong:
        assert "WRONG: rope" in text and "OTHER kernels: dq_kernel" in text and "WORSE than 2025-12-31" in text
        assert "since the Hopper one failed. Boom" in text and "--only environment" in text
        assert [line for line in lines if "host, rope" in line and "MISSED" in line and "43.0" in line]
    else:
        assert "right in 1 pieces of work" in text and "the kernels of the plain causal call" in text
        assert "nothing is slower" in text and "bench --save" in text
        assert [line for line in lines if "sdpa-flash" in line and "met" in line and "1.30x" in line]
        assert [line for line in lines if "600 TFLOP/s" in line and "met" in line and "610" in line]
        assert [line for line in lines if "95% of the copy" in line and "met" in line and "97%" in line]


def test_a_page_that_is_too_long_keeps_the_next_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LINES", 20)
    lines = page.page(page.Findings.of(tmp_path, a_full_run(tmp_path))).splitlines()
    assert len(lines) == 20 and "bench --save" in "".join(lines[-3:])


def test_a_run_cut_short_has_a_page(tmp_path):
    state.write_json(ABOUT, tmp_path / "machine.json")
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "records.json").write_text('{"schema": 1, "rec')  # as after an incomplete write
    outcomes = [Outcome("environment", PASSED, 1.0, "", {}, {}), Outcome("compile", UNFINISHED, 9.0, "", {}, {})]
    text = page.page(page.Findings.of(tmp_path, outcomes))
    assert "not measured" in text and "continues with compile" in text and "not looked for" in text
    assert "no run in" in page.page(page.Findings.of(tmp_path / "nothing", []))


@pytest.mark.parametrize("ms, spread, reason, said", [
    (1.04, 0.01, None, []),
    (1.20, 0.01, None, ["rms_norm forward, rows of 4096: 20.0% slower, 1.0000 -> 1.2000 ms"]),
    (1.20, 0.30, None, []),
    (0.50, 0.01, None, []),
    (None, None, "wrong numbers: y", ["rms_norm forward, rows of 4096: took 1.0000 ms, now: wrong numbers: y"]),
    (None, None, "not run: out of time", []),
])  # fmt: skip
def test_a_row_is_slower_if_it_exceeds_the_spread(ms, spread, reason, said):
    before = Run({}, {}, [norm_row(4096, 97), norm_row(8192, 97)], {})
    after = Run({}, {}, [dataclasses.replace(norm_row(4096, 97), ms=ms, spread=spread, reason=reason)], {})
    assert list(page.changes(before, after)) == said
