"""A measuring process that is lost is replaced by a new one.

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

from bench.commands.arguments import main
from bench.measuring import processes, records
from tests.bench.child import supervised
from tests.bench.fakes import reasons

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.once


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
