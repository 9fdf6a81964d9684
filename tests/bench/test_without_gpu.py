"""Runs without a GPU, runs that are not to use one, and the report of a run that was interrupted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("rich", reason="the bench's commands print with rich")

from bench.commands import without_gpu
from bench.commands.arguments import main
from bench.measuring import machine, processes, records
from llama_kernels.core.language import INTERPRETED
from tests.bench.fakes import NORM, ROPE, FakeClock, fail, fake_run, norm_row
from tests.support.environment import DEVICE

pytestmark = pytest.mark.once


def test_device_cpu_does_not_use_the_gpu(tmp_path, monkeypatch, capsys):
    """Every command with --device. On a machine without a GPU, torch claims that there is one, and any use fails."""

    def used():
        return torch.cuda.memory_stats().get("allocation.all.allocated", 0) if DEVICE == "cuda" else 0

    before = used()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "_smi", fail(AssertionError("the GPU is asked for")))
    monkeypatch.setattr("bench.works.presets.small", lambda dtypes: iter([NORM, ROPE]))
    options = ["--device", "cpu", "--out", str(tmp_path)]
    assert main(["parity", *options, "--providers", "llama_kernels", "eager"]) == 0
    assert main(["providers", "--device", "cpu"]) == 0 and "needs a GPU" in capsys.readouterr().out
    if INTERPRETED:
        assert main(["run", *options]) == 2  # an interpreter is not timed
        return
    part = without_gpu.Part([], {"host": [], "codegen": {"kernels": []}})
    monkeypatch.setattr(without_gpu, "run", lambda *_: iter([part]))
    monkeypatch.setattr("bench.reporting.report.write", lambda run, folder: [folder / "report.html"])
    assert main(["run", *options, "--ops", "rms_norm", "--shapes", "Llama 3.2 1B"]) == 0
    assert used() == before


@pytest.mark.skipif(INTERPRETED, reason="an interpreter is not timed")
def test_an_interrupted_run_without_a_gpu_leaves_a_report_of_what_was_known(tmp_path, monkeypatch, capsys):
    row = {"op": "rope", "forward": 20.0, "training": 60.0, "goal": 25.0}

    def parts(*_):
        yield without_gpu.Part([], {"host": [row]})
        assert records.read(tmp_path / "records.json").extra["host"] == [row]  # on disk before the next part
        raise KeyboardInterrupt

    monkeypatch.setattr(without_gpu, "run", parts)
    assert main(["run", "--device", "cpu", "--ops", "rms_norm", "--out", str(tmp_path)]) == processes.INTERRUPTED
    assert (tmp_path / "report.html").exists()
    assert records.read(tmp_path / "records.json").extra["stopped"] == "interrupted"
    said = capsys.readouterr().out
    assert "host time of rope: 20 us forward (goal 25), 60 us with its backward" in said and "stopped" in said


@pytest.mark.skipif(INTERPRETED, reason="an interpreter is not timed")
@pytest.mark.parametrize("stopped, status", [("interrupted", processes.INTERRUPTED), ("a fault", processes.LOST)])
def test_an_interrupted_run_on_a_gpu_leaves_a_report_and_a_lost_one_does_not(stopped, status, tmp_path, monkeypatch):
    made = fake_run(norm_row(4096, 97), stopped=stopped)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("bench.measuring.timing.GpuClock", FakeClock)
    monkeypatch.setattr("bench.commands.run.measure", lambda *_: made)
    monkeypatch.setattr(records, "folder", fail(AssertionError("a run that was interrupted is not kept")))
    assert main(["run", "--device", "cuda", "--in-process", "--save", "--out", str(tmp_path)]) == status
    assert (tmp_path / "report.html").exists() == (status == processes.INTERRUPTED)


_WRITER = """
import sys, time
from pathlib import Path
from bench.measuring import records
from tests.bench.fakes import fake_run, norm_row
made, file = [], Path(sys.argv[1])
for N in (64, 128):
    made.append(norm_row(N, 97))
    records.write(fake_run(*made), file)
    while not file.with_name(f"seen {N}").exists():
        time.sleep(0.01)
"""


def test_parity_is_shown_as_it_comes(tmp_path, monkeypatch):
    """The process goes on only after what it wrote was seen."""
    monkeypatch.setattr(without_gpu, "_LOOK", 0.05)
    file, seen = tmp_path / "records.json", []
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(file)], stderr=subprocess.PIPE, text=True)
    for part in without_gpu._as_it_comes(process, file):
        seen += [r.sizes["N"] for r in part.records]
        (tmp_path / f"seen {seen[-1]}").touch()
    assert seen == [64, 128] and process.returncode == 0


def test_bounds_are_shown_op_by_op(monkeypatch):
    parts = list(without_gpu._bounds([NORM, ROPE], machine.describe("cpu"), False))
    assert [{r.op for r in part.records} for part in parts] == [{"rms_norm"}, {"rope"}]
    assert without_gpu.parts([NORM, ROPE], True) > 2 + 1 + 2 * 10


def test_a_process_that_still_runs_is_ended():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], text=True)
    without_gpu._end(process)
    assert process.poll() is not None


def test_processes_of_a_run_without_a_gpu_see_no_gpu(monkeypatch):
    seen = {}
    monkeypatch.setattr(without_gpu.subprocess, "Popen", lambda command, env, **_: seen.update(env))
    without_gpu._start("bench.host")
    assert seen["CUDA_VISIBLE_DEVICES"] == seen["HIP_VISIBLE_DEVICES"] == ""


def test_a_process_that_writes_no_file_raises_an_error_with_its_output(tmp_path):
    started = without_gpu._start("bench.host", "--no-such-option")
    with pytest.raises(RuntimeError, match=r"-m bench.host failed:\n(.|\n)*unrecognized arguments: --no-such-option"):
        without_gpu._wait(started, tmp_path / "host.json")


def test_device_cuda_without_a_gpu_is_an_error_of_the_command(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["run", "--device", "cuda"])
    assert "argument --device: torch sees no GPU here" in capsys.readouterr().err
