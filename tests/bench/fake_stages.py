"""Stages and jobs made up for the tests of bench.gpu_check, and how they are waited for."""

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
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def wrote(path: Path) -> bool:
    """Whether a process has written into `path`."""
    return path.exists() and path.stat().st_size > 0


class HurriedTime:
    """In the place of the module `time`: an hour passes at the moment when `happened` is true."""

    sleep = staticmethod(time.sleep)

    def __init__(self, happened: Callable[[], bool]) -> None:
        self.happened = happened

    def monotonic(self) -> float:
        return 3600.0 * self.happened()


# --- the whole command -----------------------------------------------------------------------------------------------


def pretend(replace: Callable[[Any, str, Any], None], about: dict[str, str], described: list[list[Any]]) -> None:
    """A GPU for `python -m bench.gpu_check`, and these stages: name, minutes, [job, seconds, arguments of python -c].

    replace: setattr, or pytest's monkeypatch.setattr.
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
