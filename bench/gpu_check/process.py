"""Runs subprocesses, each with a time limit and its output in a file. No process is left behind.

A job is a process group, which is killed as a whole. A child that left the group for another session is found by a
variable in its environment.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bench.gpu_check.state import ROOT

POLL = 0.05  # seconds
# Unbuffered output, so that a killed job has a log; and compiled kernels, whatever the environment says.
_ENV = {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
_MARK = "LLAMA_KERNELS_GPU_CHECK_JOB"
_numbers = itertools.count()


class Job(NamedTuple):
    """One command. `seconds`: its time limit. `env`: variables added to those of this process."""

    name: str
    command: tuple[str, ...]
    seconds: float
    env: Mapping[str, str] = {}


class Ended(NamedTuple):
    """A job that ended. `code` is None if it was killed: at its limit or, with `cut`, at the end of the whole run."""

    job: Job
    code: int | None
    seconds: float
    cut: bool = False


def run_all(
    jobs: Iterable[Job], folder: Path, workers: int, over: Callable[[], bool] = lambda: False
) -> Iterator[Ended]:
    """Run `jobs` in the repository, at most `workers` at once, and yield each as it ends. Output: `folder`/NAME.txt.

    Once `over` returns True, no job starts and the running ones are killed. Processes that a job has started are
    killed when it ends. If the caller stops iterating, all running jobs are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            while waiting and len(running) < workers and not over():
                running.append(_Running(waiting.pop(0), folder))
            if not running:
                return
            for each in list(running):
                if ended := each.ended(over()):
                    running.remove(each)
                    yield ended
            time.sleep(POLL)
    finally:
        for each in running:
            each.kill()


class _Running:
    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.start = job, time.monotonic()
        self.mark = f"{os.getpid()}.{next(_numbers)}"
        with open(folder / f"{job.name}.txt", "wb") as log:
            self.process = subprocess.Popen(
                job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=ROOT, env={**os.environ, **_ENV, _MARK: self.mark, **job.env},
            )  # fmt: skip

    def ended(self, over: bool) -> Ended | None:
        seconds = time.monotonic() - self.start
        # WNOWAIT: the leader keeps its process ID until `kill` has killed its group.
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return Ended(self.job, self.kill(), seconds)
        if over or seconds > self.job.seconds:
            self.kill()
            return Ended(self.job, None, seconds, cut=seconds <= self.job.seconds)
        return None

    def kill(self) -> int:
        """Kill the group and the children that left it. Returns the exit code of the leader."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        while found := _marked(f"{_MARK}={self.mark}"):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL)
        return code


def _marked(variable: str) -> list[int]:
    """The processes with `variable` in their environment. One that has ended has an empty environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found
