"""Subprocesses with a time limit each, their output in a file, that leave no process behind.

A job is a process group of its own, which is killed as one. A child that left the group, for a session of its own, is
known by a variable in its environment.
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
# Output at once, for who is killed; and the compiled kernels, whatever the shell says.
_ENV = {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
_MARK = "LLAMA_KERNELS_GPU_CHECK_JOB"
_numbers = itertools.count()


class Job(NamedTuple):
    """One command. `seconds`: its limit. `env`: variables beside those of this process."""

    name: str
    command: tuple[str, ...]
    seconds: float
    env: Mapping[str, str] = {}


class Ended(NamedTuple):
    """code: None where the job was killed, at its limit or (`cut`) because time was over for all jobs."""

    job: Job
    code: int | None
    seconds: float
    cut: bool = False


def run_all(
    jobs: Iterable[Job], folder: Path, workers: int, over: Callable[[], bool] = lambda: False
) -> Iterator[Ended]:
    """Run `jobs` in the repository, at most `workers` at once, and yield each as it ends. Output: `folder`/NAME.txt.

    over: asked all the time; once it is true no job starts, and those that run are killed. Whatever a job has started
    is killed when it ends, and so are all running jobs if the caller stops iterating.
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
        # The leader is waited for after its group was killed. Until then no other process can get its process ID.
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return Ended(self.job, self.kill(), seconds)
        if over or seconds > self.job.seconds:
            self.kill()
            return Ended(self.job, None, seconds, cut=seconds <= self.job.seconds)
        return None

    def kill(self) -> int:
        """End the whole group and who left it; the exit code of its leader."""
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
    """Processes with this in their environment. One that has ended and was not waited for has none."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found
