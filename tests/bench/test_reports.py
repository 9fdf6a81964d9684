"""The pages and pictures that are made from records."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.estimate import bounds
from bench.measuring import records
from bench.measuring.records import Run
from bench.measuring.step import put_rate
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from bench.providers.provider import OURS
from bench.providers.registry import PROVIDERS
from bench.reporting import pictures, report
from bench.reporting.drawing import COLORS, color_of
from bench.reporting.sweeps import AXES, sweeps
from bench.training import scale as training
from bench.training.runner import row_of
from bench.training.scale import TRAINING
from bench.training.variations import VARIATIONS
from bench.works.errors import UNIT
from bench.works.presets import OPS as EVERY_NAME
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
    absent = [r for r in made.records if r.provider == "liger"]
    assert "<p>Not installed: liger (pip install &lt;liger&gt; &amp; more).</p>" in page and ">liger<" not in page
    assert page.count("<tr class=") >= len(made.records) - len(absent)
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


# --- pictures that leave the page ------------------------------------------------------------------------------------


def drawn(run: Run) -> dict[str, Any]:
    """The figures by name."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = {name: figure for name, _, figure in pictures.figures(run)}
    pyplot.close("all")
    for figure in found.values():
        figure.canvas.draw()
        for text in (*figure.texts, *figure.legends):  # the title is one of the texts
            edges = text.get_window_extent()
            assert edges.x0 >= 0 and edges.x1 <= figure.bbox.width
    return found


def test_each_picture_says_what_it_shows_and_on_which_gpu_it_was_measured():
    made = measured()
    some = [r for r in made.records if r.op in ("rope", *TRAINING) or r.shape.startswith("Llama 3.2 1B")]
    found = {name: figure.get_suptitle() for name, figure in drawn(made._replace(records=some)).items()}
    assert found["speed-rope"].startswith(f"Measured on Fake GPU, rope: {OURS} is the fastest in ")
    assert found["models"].endswith("at 91 to 91% of the limit")
    assert (
        found["training"] == f"Training, measured on Fake GPU: patched by {OURS} +0% to +0% tokens a second over stock"
    )
    assert "0.59 for llama_kernels, 1.2 for eager" in found["error"]


def test_the_picture_of_errors_has_the_limit_and_room_for_its_title():
    pytest.importorskip("matplotlib")
    names = [p.name for p in PROVIDERS][:7]
    errors = [record("rope", "both", None, name, error=1e-3, gpu="none") for name in names]
    found = drawn(fake_run(*errors))["error"]
    assert "on the CPU, kernels in Triton's interpreter" in found.get_suptitle()
    (ax,) = found.axes
    assert ax.collections[0].get_label() == "limit: 2 x eager + 2"
    assert ax.collections[0].get_segments()[0][0][0] == pytest.approx(2 * 1e-3 / UNIT[torch.bfloat16] + 2)


def test_pictures_of_bounds_say_that_they_are_estimates_and_no_speedups():
    works = [dataclasses.replace(w, shape="Llama 3.1 8B", dtype=torch.bfloat16) for w in EVERY_OP]
    rs = bounds.estimates(works, [Ours(), Eager(), bounds.FLASH], ABOUT)
    found = drawn(Run({"gpu": "none"}, {}, rs, {}))
    assert found["saving"].get_suptitle().startswith("ESTIMATE, not a measured speedup: ")
    assert found["roofline"].get_suptitle().startswith("ESTIMATE")
    for figure in found.values():
        (ax,) = figure.axes
        assert "ESTIMATE" in {text.get_text() for text in ax.texts} and ax.get_xlabel()
    assert not found["saving"].axes[0].patches  # bars read as measured


def test_each_provider_has_a_colour_of_its_own_in_every_picture():
    names = {p.name for p in PROVIDERS}
    assert names | {v.name for v in VARIATIONS} <= COLORS.keys()
    assert len({color_of(name) for name in names}) == len(names)
    assert len({color_of(v.name) for v in VARIATIONS}) == len(VARIATIONS)
    assert color_of("added by a user") not in COLORS.values()


# --- the width of the page -------------------------------------------------------------------------------------------


def test_tables_and_pictures_scroll_in_themselves(tmp_path):
    page = report.page(measured(), [("one", "a caption", b"")])
    assert page.count("<table>") == page.count("<div class=wide><table>") > 10
    assert page.count("<img") == page.count("<div class=wide><img") == 1 and ".wide { overflow-x: auto }" in page


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FRAME = """<iframe id=frame src=report.html width={width} height=900></iframe><script>
window.onload = () => {{ const page = document.getElementById("frame").contentDocument.documentElement;
document.title = "page " + page.scrollWidth + " window " + page.clientWidth }}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine renders the page")
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_does_not_scroll_sideways(width, tmp_path):
    made = measured()
    made.extra["providers"] = {p.name: dict.fromkeys(EVERY_NAME, "yes") for p in PROVIDERS}
    page = report.page(made, []).replace("<details>", "<details open>")
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "frame.html").write_text(_FRAME.format(width=width))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--window-size=1400,1000",
    ]
    command = [CHROMIUM, *options, "--dump-dom", (tmp_path / "frame.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    found = re.search(r"page (\d+) window (\d+)", shown)
    assert found is not None, shown[-500:]
    assert int(found[1]) <= int(found[2]) <= width


def test_sweeps_are_rows_that_differ_in_one_size():
    found = sweeps(measured().records)
    assert {key[0] for key in found} == set(AXES)
    norm = found["rms_norm", "forward", "bfloat16", ""]
    assert norm.keys() == {OURS, "eager", "flash-attn-2"}
    sizes = [n for n, _ in norm[OURS]]
    assert sizes == sorted(sizes) and {64, 4096, 262144} <= set(sizes)
    assert next(r for n, r in norm[OURS] if n == 4096).sizes["M"] == 2**15  # not the work with few rows of that length
    assert any("Hq=32, Hkv=8, D=128" in key[3] for key in found if key[0] == "attention")
