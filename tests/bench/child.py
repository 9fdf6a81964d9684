"""`python -m tests.bench.child FAULT run ...`: a measuring process whose provider `bad` fails as FAULT says."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from bench.commands import session
from bench.commands.arguments import parser
from bench.measuring import contain, processes, timing
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from tests.bench.fakes import ADD, NORM, ROPE, Bad, FakeClock


def lose_the_gpu() -> None:
    contain.gpu_fault = lambda device: "CUDA error: an illegal memory access was encountered"
    raise RuntimeError("the kernel failed")


def read_outside() -> None:
    torch.zeros(4, device="cuda")[torch.tensor([10**6], device="cuda")]


FAULTS = {
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "lost": lose_the_gpu,
    "hang": lambda: time.sleep(600),
    "exit": lambda: os._exit(9),
    "read outside": read_outside,
}


def supervised(folder: Path, fault: str, patience: float = 10) -> tuple[int, list[str]]:
    """The exit status of a supervised run into `folder`, and the lines that it printed."""
    said: list[str] = []

    def command(resume: bool, minutes: float) -> list[str]:
        options = ["--out", str(folder), "--minutes", str(minutes), "--seconds", "0.01", *["--resume"] * resume]
        return [sys.executable, "-m", "tests.bench.child", fault, "run", *options]

    status = processes.supervise(command, folder, resume=False, minutes=10, patience=patience, say=said.append)
    return status, said


def main(fault: str, *arguments: str) -> None:
    ours, device, clock = (), "cpu", FakeClock()
    if fault == "read outside":
        ours, device, clock = (Ours(),), "cuda", timing.GpuClock()
    session.PROVIDERS = (*ours, Eager(), Bad(FAULTS[fault]))
    run = session.measure(parser().parse_args(arguments), [ADD, NORM, ROPE], [], device, clock)
    sys.stdout.flush()
    os._exit(session.status_of(run) or 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
