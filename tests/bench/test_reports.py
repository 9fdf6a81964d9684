"""The pages and pictures that are made from records."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest
import torch

from bench.estimate import bounds
from bench.measuring import records
from bench.measuring.records import Run
from bench.measuring.step import put_rate
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from bench.providers.provider import OURS
from bench.reporting import report
from bench.reporting.sweeps import AXES, sweeps
from bench.training import scale as training
from bench.training.runner import row_of
from bench.training.variations import VARIATIONS
from bench.works.presets import works_of
from bench.works.work import DIRECTIONS
from tests.bench.fakes import ABOUT, CEILINGS, EVERY_OP, fake_run, record

pytestmark = pytest.mark.once


@functools.cache
def measured() -> Run:
    """A run as on a GPU: every op over sizes; one provider has a reason and no times."""
    rs = []
    for work in (*works_of("models"), *works_of("sweeps")):
        for direction in work.directions:
            floor = max(work.bytes(direction) / 1e9, work.flops(direction) / 1e11)
            for i, name in enumerate((OURS, "eager", "liger", "flash-attn-2")):
                r = record(work.op, direction, floor * (1.1 + i), name, shape=work.shape, sizes=work.sizes,
                           method="graph", error=1e-3 * (i + 1), gpu="Fake GPU", memory=2**20)  # fmt: skip
                if name == "liger":
                    r.ms, r.reason = None, "not installed (pip install <liger> & more)"
                else:
                    put_rate(r, work, CEILINGS)
                rs.append(r)
    for scale in training.scales():
        for v in VARIATIONS:
            r = row_of(scale, v.name, ABOUT)
            r.ms, r.memory = 10.0, 2**30
            training.put_rate(r, scale, CEILINGS)
            rs.append(r)
    return fake_run(*records.with_ratios(rs), providers={OURS: {"rope": "yes"}})


def test_a_report_of_measurements_has_all_pictures_and_rows(tmp_path):
    pytest.importorskip("matplotlib")
    made = measured()
    written = {path.name for path in report.write(made, tmp_path)}
    speeds = {f"speed-{op}.png" for op in AXES}
    assert written == speeds | {"models.png", "training.png", "error.png", "report.html", "records.json"}
    page = (tmp_path / "report.html").read_text()
    assert "llama_kernels on Fake GPU" in page and "ESTIMATES" not in page
    assert page.count("data:image/png;base64,") == 12 and 'src="http' not in page  # the page loads nothing
    assert "not installed (pip install &lt;liger&gt; &amp; more)" in page
    assert page.count("<tr class=") >= len(made.records)
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size > 5000


def test_a_report_without_matplotlib_has_everything_but_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    made = measured()
    assert [path.name for path in report.write(made, tmp_path)] == ["records.json", "report.html"]
    assert len(records.read(tmp_path / "records.json").records) == len(made.records)
    page = (tmp_path / "report.html").read_text()
    assert "pip install matplotlib" in page and "data:image" not in page and page.count("<tr class=") > 100


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_report_can_be_made_of_one_direction(tmp_path, direction):
    pytest.importorskip("matplotlib")
    made = measured()
    works = [w.op for w in works_of("models")]
    rs = [r for r in made.records if r.direction == direction and r.op in works and r.shape.startswith("Llama")]
    assert "report.html" in {path.name for path in report.write(made._replace(records=rs), tmp_path)}


def test_a_report_of_estimates_says_that_nothing_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    works = [dataclasses.replace(w, shape="Llama 3.1 8B", dtype=torch.bfloat16) for w in EVERY_OP]
    rs = bounds.estimates(works, [Ours(), Eager(), bounds.FLASH], ABOUT)
    host = [{"op": "rope", "forward": 20.0, "training": 60.0, "goal": 25.0},
            {"op": "decode", "forward": 30.0, "goal": 25.0}]  # fmt: skip
    kernel = {"target": "sm_90", "kernel": "k", "label": "D<64", "warps": 4, "registers": 9, "spill_bytes": 0,
              "shared_bytes": 0, "tensor_core": 3, "faults": ["spills"]}  # fmt: skip
    made = Run({"gpu": "none"}, {}, rs, {"host": host, "codegen": {"kernels": [kernel]}})
    written = {path.name for path in report.write(made, tmp_path)}
    assert written == {"saving.png", "roofline.png", "host.png", "report.html", "records.json"}
    page = (tmp_path / "report.html").read_text()
    assert "ESTIMATES" in page and "none was measured" in page and "D&lt;64" in page
    assert all(html in page for html in ("datasheet", "machine code for sm_90"))


def test_sweeps_are_rows_that_differ_in_one_size():
    found = sweeps(measured().records)
    assert {key[0] for key in found} == set(AXES)
    norm = found["rms_norm", "forward", "bfloat16", ""]
    assert norm.keys() == {OURS, "eager", "flash-attn-2"}
    sizes = [n for n, _ in norm[OURS]]
    assert sizes == sorted(sizes) and {64, 4096, 262144} <= set(sizes)
    assert next(r for n, r in norm[OURS] if n == 4096).sizes["M"] == 2**15  # not the work with few rows of that length
    assert any("Hq=32, Hkv=8, D=128" in key[3] for key in found if key[0] == "attention")
