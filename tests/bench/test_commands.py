"""The commands of `python -m bench`, run in this process if possible."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys

import pytest
import torch

pytest.importorskip("rich", reason="the bench's commands print with rich")

from bench.commands import session
from bench.commands.arguments import main, parser
from bench.measuring import records
from bench.providers.ours import Ours
from bench.providers.provider import OURS
from bench.reporting import report
from bench.works import presets
from tests.bench.fakes import EVERY_OP, NORM, ROPE, FakeClock, fake_run, record, tiny_model
from tests.support.environment import DEVICE, compiles
from tests.support.ops import OPS
from tests.support.processes import output_of

once = pytest.mark.once


@once
def test_compare_exits_with_1_on_a_regression(tmp_path, capsys):
    runs = {"a": (1.0, "Fake GPU"), "noise": (1.03, "Fake GPU"), "slow": (1.1, "Fake GPU"), "other": (1.0, "X")}
    for name, (ms, gpu) in runs.items():
        records.write(fake_run(record(ms=ms), gpu=gpu), tmp_path / f"{name}.json")

    def code(a, b, *more):
        return main(["compare", str(tmp_path / f"{a}.json"), str(tmp_path / f"{b}.json"), *more])

    assert code("a", "noise") == 0 and "1 rows in both, 0 regressions" in capsys.readouterr().out
    assert code("a", "slow") == 1 and "10.0% slower" in capsys.readouterr().out
    assert code("a", "slow", "--threshold", "15") == 0
    assert code("a", "other") == 2 and "two machines" in capsys.readouterr().out
    assert code("a", "nothing") == 2


@once
def test_report_merges_several_files(tmp_path):
    pytest.importorskip("matplotlib")
    first = record(shape="S", percent=50.0, error=1e-3, rate=1.0, ceiling=2.0, unit="GB/s")
    second = record(shape="S", ms=2.0), record(shape="S", ms=8.0, provider="peer")
    records.write(fake_run(first), tmp_path / "a.json")
    records.write(fake_run(*second), tmp_path / "b.json")
    assert main(["report", *(str(tmp_path / f"{name}.json") for name in "ab"), "--out", str(tmp_path / "out")]) == 0
    merged = records.read(tmp_path / "out" / "records.json").records
    assert [(r.provider, r.ms, r.ratio) for r in merged] == [(OURS, 2.0, 4.0), ("peer", 8.0, 0.25)]
    assert main(["report", str(tmp_path / "none.json")]) == 2


@once
def test_a_run_with_a_fake_clock_measures_every_op_and_writes_a_report(tmp_path, monkeypatch):
    """The code that measures a GPU, from arguments to report, on CPU tensors."""
    pytest.importorskip("matplotlib")
    small = [dataclasses.replace(w, dtype=torch.bfloat16) for w in EVERY_OP]
    monkeypatch.setattr(session, "VARIATIONS", [v for v in session.VARIATIONS if not v.compiled])  # takes minutes

    def measured(*more):
        options = ["--out", str(tmp_path), "--seconds", "0.01", "--providers", OURS, "eager", "sdpa", *more]
        args, layer = parser().parse_args(["run", *options]), tiny_model(False, 1)
        return session.measure(args, small, [layer], DEVICE, FakeClock())

    made = measured("--directions", "forward")
    assert {r.op for r in made.records} == {*(w.op for w in EVERY_OP), "decoder_layer"}
    assert all(r.ms == 2.0 for r in made.records if r.provider == OURS)
    assert (tmp_path / "report.html") in report.write(made, tmp_path)
    late = measured("--minutes", "1e-9")
    assert late.records and all(r.reason == "not run: out of time" for r in late.records)


def test_parity_exits_with_1_where_an_op_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(presets, "small", lambda dtypes: iter([NORM, ROPE]))
    options = ["--in-process", "--out", str(tmp_path)]
    assert main(["parity", *options, "--json", str(tmp_path / "p.json")]) == 0
    assert "right in 2 pieces of work" in capsys.readouterr().out
    assert {r.op for r in records.read(tmp_path / "p.json").records} == {"rms_norm", "rope"}
    monkeypatch.setattr(Ours, "rope", lambda *_: lambda q, k: (q, k))
    assert main(["parity", *options]) == 1
    assert "WRONG" in capsys.readouterr().out


@once
def test_help_names_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("bench", run_name="__main__")
    out = capsys.readouterr().out
    assert all(command in out for command in ("run", "parity", "compare", "report", "providers"))


@once
@compiles
def test_host_time_of_every_op_is_measured_without_a_gpu(tmp_path):
    output_of("-m", "bench.host", "--json", str(tmp_path / "host.json"))
    rows = json.loads((tmp_path / "host.json").read_text())
    assert [row["op"] for row in rows] == [*OPS, "decode"]
    assert all(("training" in row) == bool(row["op"] in OPS and OPS[row["op"]].differentiable) for row in rows)
    assert all(1 < row["forward"] < 5000 for row in rows)
