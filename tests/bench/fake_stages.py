"""Small stages and jobs for the tests of bench.gpu_check, and functions that wait for them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.gpu_check import __main__ as gpu_check
from bench.gpu_check import run
from bench.gpu_check.process import Job
from bench.gpu_check.stages import Machine, Missing, Stage
from bench.gpu_check.state import Outcome
from bench.measuring import machine, records

ABOUT = {"torch": "2.13.0", "triton": "3.6.0", "python": "3.11.7", "gpu": "Imitated GPU", "driver": "1.0",
         "commit": "abc1234", "date": "2026-01-02T03:04:05+00:00"}  # fmt: skip
HOPPER = Machine(True, "/usr/bin/compute-sanitizer", 16)


def python(name: str, code: str, *args: object, seconds: float = 20.0, env: dict[str, str] | None = None) -> Job:
    return Job(name, (sys.executable, "-c", code, *map(str, args)), seconds, env or {})


def stage(name: str, *jobs: Job, minutes: float = 1.0, workers: int = 1) -> Stage:
    return Stage(name, minutes, lambda _: list(jobs), ("bench",), workers)


def carry_out(
    made: Stage, folder: Path, about: dict[str, str] = ABOUT, over: Callable[[], bool] = lambda: False
) -> Outcome:
    with mock.patch.object(run, "_kernels_on_disk", lambda: 0):  # other tests compile meanwhile
        return run.carry_out(made, folder, about, 2, over, lambda _: None)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not true within {seconds:.0f} seconds"
        time.sleep(0.02)
    return found


def wrote(path: Path) -> bool:
    """Whether a process has written into `path`."""
    return path.exists() and path.stat().st_size > 0


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that has ended and was not waited for (a zombie) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def is_dead(pid_file: Path) -> Callable[[], bool]:
    """A function that returns whether the process whose ID is in `pid_file` has ended."""
    return lambda: not is_alive(int(pid_file.read_text()))


# Hangs, and so does its child. Writes the process ID of the child into a file.
HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("now it hangs", flush=True)
time.sleep(600)
"""
# Adds a line to a file, then executes its second argument.
COUNTS = "import sys; open(sys.argv[1], 'a').write('run\\n'); exec(sys.argv[2])"


def runs(path: Path) -> int:
    """How often a command of COUNTS has run."""
    return len(path.read_text().splitlines()) if path.exists() else 0


class HurriedTime:
    """Replaces the module `time`: the time is 0, and an hour once `happened` returns True."""

    sleep = staticmethod(time.sleep)

    def __init__(self, happened: Callable[[], bool]) -> None:
        self.happened = happened

    def monotonic(self) -> float:
        return 3600.0 * self.happened()


# --- the whole command -----------------------------------------------------------------------------------------------


def pretend(replace: Callable[[Any, str, Any], None], about: dict[str, str], described: list[list[Any]]) -> None:
    """Let `python -m bench.gpu_check` see a GPU and these stages.

    Args:
        replace: setattr, or pytest's monkeypatch.setattr.
        about: what machine.describe returns.
        described: a list for each stage: name, minutes, *[job, seconds, arguments of python -c]; or name, why missing.
    """

    def made(described_stage: list[Any]) -> Stage | Missing:
        name, minutes, *jobs = described_stage
        if not jobs:
            return Missing(name, minutes)
        return stage(name, *(python(job, *code, seconds=seconds) for job, seconds, code in jobs), minutes=minutes)

    replace(gpu_check, "stages", lambda machine: list(map(made, described)))
    replace(gpu_check, "arch_of", lambda device: "sm_90")
    replace(torch.cuda, "is_available", lambda: True)
    replace(torch.cuda, "current_device", lambda: 0)
    replace(machine, "describe", lambda device: about)
    replace(records, "latest", lambda gpu: None)


if __name__ == "__main__":  # python -m tests.bench.fake_stages ABOUT STAGES OPTIONS...
    pretend(setattr, json.loads(sys.argv[1]), json.loads(sys.argv[2]))
    sys.exit(gpu_check.main(sys.argv[3:]))
