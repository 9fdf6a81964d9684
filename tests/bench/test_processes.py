"""A run that ends early can be resumed from its records, and a lost process is replaced by a new one.

The providers, clocks and GPU faults here are artificial; tests/bench/test_gpu.py has a real fault.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the bench's commands print with rich")

from bench.commands import session, without_gpu
from bench.commands.arguments import main, parser
from bench.measuring import machine, processes, records
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from llama_kernels.core.language import INTERPRETED
from tests.bench.child import supervised
from tests.bench.fakes import (
    ADD,
    CEILINGS,
    NORM,
    ROPE,
    Bad,
    FailingClock,
    FakeClock,
    fail,
    fake_run,
    norm_provider,
    norm_row,
    reasons,
)
from tests.support.environment import DEVICE

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.once


# --- records after each piece of work --------------------------------------------------------------------------------


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure(works, clock, *options): a run of `eager` and `bad` on a CPU, with its records in tmp_path."""
    monkeypatch.setattr(session, "PROVIDERS", (Eager(), Bad(lambda: None)))

    def measure(works, clock, *options):
        args = parser().parse_args(["run", "--out", str(tmp_path), "--seconds", "0.01", *options])
        return session.measure(args, works, [], "cpu", clock)

    return measure


def test_records_are_on_disk_after_each_piece_of_work(measure, tmp_path, monkeypatch):
    counts, write = [], records.write
    monkeypatch.setattr(records, "write", lambda run, path: (write(run, path), counts.append(len(run.records))))
    run = measure([NORM, ADD, ROPE], FakeClock())
    assert counts == [0, 6, 9, 12] and len(records.read(tmp_path / "records.json").records) == 12
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert session.status_of(run) is None


def test_peers_that_are_not_installed_take_one_line(measure, monkeypatch, capsys):
    missing = (norm_provider(fail(AssertionError()), "one"), norm_provider(fail(AssertionError()), "two"))
    for provider in missing:
        provider.module, provider.package = "no_such_module_anywhere", "no-such-package"
    monkeypatch.setattr(session, "PROVIDERS", (Eager(), *missing))
    run = measure([NORM, ADD], FakeClock())
    said = capsys.readouterr().out
    assert said.count("not installed") == 1 and "not installed: one, two (" in said
    assert reasons(run.records, "two") == {"not installed (pip install no-such-package)"}


def test_the_progress_bar_names_each_step(measure, monkeypatch):
    shown, name_of = [], session._in_short
    monkeypatch.setattr(session, "_in_short", lambda step: shown.append(name_of(step)))
    measure([NORM], None, "--providers", "eager")
    assert shown == ["rms_norm, norm: bench, inputs", "rms_norm, norm: eager, numbers and memory"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    records.replace_text(path, "old")

    class Killed(BaseException):
        pass

    monkeypatch.setattr(Path, "write_text", lambda self, text: (self.open("w").write(text[:1]), fail(Killed())()))
    with pytest.raises(Killed):
        records.replace_text(path, "new")
    assert path.read_text() == "old"


def test_an_interrupted_run_keeps_its_records_and_can_be_resumed(measure, tmp_path, capsys):
    clock = FailingClock(7, KeyboardInterrupt())  # six samplers of rms_norm, and one of add_rms_norm
    stopped = measure([NORM, ADD, ROPE], clock)
    assert session.status_of(stopped) == processes.INTERRUPTED
    kept = records.read(tmp_path / "records.json")
    assert kept.extra["stopped"] == "interrupted" and {r.op for r in kept.records} == {"rms_norm"}
    assert "--resume continues" in capsys.readouterr().out

    class Other(FakeClock):
        def ceilings(self):
            raise AssertionError("the ceilings of the first process are kept")

    clock = Other(3.0)
    whole = measure([NORM, ADD, ROPE], clock, "--resume")
    assert {r.op: r.ms for r in whole.records if r.provider == "eager"} == {
        "rms_norm": 2.0, "add_rms_norm": 3.0, "rope": 3.0}  # fmt: skip
    assert len(clock.calls) == 6 and whole.ceilings == CEILINGS and "stopped" not in whole.extra
    assert records.read(tmp_path / "records.json").extra == {}


def test_a_resumed_run_measures_what_was_not_run(measure):
    measure([NORM, ADD], FakeClock(), "--minutes", "1e-9")
    again = measure([NORM, ADD], FakeClock(), "--resume")
    assert len(again.records) == 9 and all(r.ms == 2.0 for r in again.records)


def test_a_resumed_run_measures_new_providers(measure):
    measure([NORM, ADD], FakeClock(), "--directions", "forward", "--providers", "eager")
    clock = FakeClock(3.0)
    again = measure([NORM, ADD], clock, "--directions", "forward", "--resume")
    assert [(r.op, r.provider, r.ms) for r in again.records] == [
        ("add_rms_norm", "eager", 2.0), ("rms_norm", "eager", 3.0), ("rms_norm", "bad", 3.0)]  # fmt: skip


def test_a_run_does_not_resume_from_records_of_another_machine(measure, tmp_path):
    measure([NORM], FakeClock())
    whole = json.loads((tmp_path / "records.json").read_text())
    whole["machine"]["gpu"] = "Another GPU"
    (tmp_path / "records.json").write_text(json.dumps(whole))
    said = r"--resume: .*records.json was measured with gpu 'Another GPU', and this is 'none'"
    with pytest.raises(ValueError, match=said):
        measure([NORM], FakeClock(), "--resume")
    assert measure([NORM], FakeClock()).records  # without --resume, all is measured again


def test_parity_can_be_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.works.presets.small", lambda dtypes: iter([NORM, ROPE]))
    options = ["parity", "--device", "cpu", "--out", str(tmp_path), "--providers", "llama_kernels"]
    assert main(options) == 0 and len(records.read(tmp_path / "records.json").records) == 6
    monkeypatch.setattr(Ours, "rope", lambda *_: lambda q, k: (q, k))
    assert main([*options, "--resume"]) == 0  # it was right before
    assert main(options) == 1
    (tmp_path / "journal.json").write_text("{")
    assert main([*options, "--resume"]) == 2 and "not a journal of the bench" in capsys.readouterr().out


# --- a CPU where there is a GPU --------------------------------------------------------------------------------------


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
    monkeypatch.setattr("bench.measuring.timing.Gpu", FakeClock)
    monkeypatch.setattr("bench.commands.run.measure", lambda *_: made)
    monkeypatch.setattr(records, "folder", fail(AssertionError("a run that was interrupted is not kept")))
    assert main(["run", "--device", "cuda", "--in-process", "--save", "--out", str(tmp_path)]) == status
    assert (tmp_path / "report.html").exists() == (status == processes.INTERRUPTED)


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


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, patience, reason",
    [
        ("segfault", 10, "the process ended by SIGSEGV"),
        ("lost", 10, "RuntimeError: the kernel failed; then CUDA error: an illegal memory access was encountered"),
        ("hang", 0.05, "the process did not finish within 0.05 minutes"),
    ],
    ids=["segfault", "lost", "hang"],
)
def test_a_run_continues_in_a_new_process(tmp_path, fault, patience, reason):
    status, said = supervised(tmp_path, fault, patience)
    run = records.read(tmp_path / "records.json")
    assert status == 0 and len(said) == 1 and "continuing in a new process" in said[0]
    assert reasons(run.records) == {f"left out: {reason}, in the step 'numbers and memory'"}
    others = [r for r in run.records if r.provider == "eager"]
    assert [r.op for r in others] == ["add_rms_norm"] * 3 + ["rms_norm"] * 3 + ["rope"] * 3
    assert all(r.ms == 2.0 for r in others) and "stopped" not in run.extra


def test_the_exit_status_of_a_child_that_exits_by_itself_is_returned(tmp_path):
    status, said = supervised(tmp_path, "exit")
    assert (status, said) == (9, [])
    assert {r.op for r in records.read(tmp_path / "records.json").records} == {"add_rms_norm"}


def test_a_child_that_dies_outside_any_step_is_not_started_again(tmp_path):
    said: list[str] = []
    (tmp_path / "journal.json").write_text(json.dumps({"step": ["work", "bad", "sampling"], "incidents": []}))  # stale
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"]
    options = {"resume": True, "minutes": 1, "patience": 10, "say": said.append}
    assert processes.supervise(lambda *_: command, tmp_path, **options) == 128 + 6
    assert said == ["bench: the measuring process ended (SIGABRT) outside any step of a provider"]


def test_a_child_runs_the_same_command_in_one_process(tmp_path):
    options = ["--device", "cpu", "--ops", "rms_norm", "--dtypes", "fp32", "--providers", "llama_kernels"]
    command = [sys.executable, "-m", "bench.commands.child", "parity", *options, "--out", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as child:
        assert "right in 2 pieces of work" in child.stdout.read() and child.wait(timeout=60) == 0
    assert len(records.read(tmp_path / "records.json").records) == 6


def test_a_child_ends_with_its_parent():
    watch = "from bench.measuring.processes import end_with_parent; end_with_parent()"
    code = f"import time; {watch}; print('up', flush=True); time.sleep(99)"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **options) as child:
        assert child.stdout.readline() == "up\n"
        child.stdin.close()
        assert child.wait(timeout=30) == processes.INTERRUPTED


def test_runs_on_a_gpu_are_supervised(tmp_path, monkeypatch):
    seen = {}

    def supervise(command, folder, **options):
        seen.update(options, first=command(False, 1.5), second=command(True, 0.5), folder=folder)
        return 7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(processes, "supervise", supervise)
    argv = ["run", "--device", "cuda", "--ops", "rope", "--out", str(tmp_path)]
    assert main(argv) == 7
    assert seen["first"][1:] == ["-m", "bench.commands.child", *argv, "--minutes", "1.5"]
    assert seen["second"][-3:] == ["--minutes", "0.5", "--resume"] and seen["folder"] == tmp_path
    assert (seen["minutes"], seen["patience"], seen["resume"]) == (30, 10, False)
    assert main(["parity", "--device", "cuda", "--out", str(tmp_path)]) == 7
    assert seen["first"][-2:] == ["--minutes", "1.5"] and math.isinf(seen["minutes"])
