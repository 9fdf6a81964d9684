"""What is known without a GPU: bounds on times, parity, machine code and the host time of a call."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.estimate import bounds
from bench.estimate import training as training_bounds
from bench.measuring import records
from bench.measuring.records import Record
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from bench.providers.provider import Unsupported
from bench.training.scale import scales
from bench.works.work import Work
from llama_kernels.core.language import why_not_interpreted

TARGET = "sm_90"  # the family whose machine code is read; `make codegen` reads all families


def estimates(works: Sequence[Work], about: dict[str, Any], training: bool) -> list[Record]:
    """Bounds on every GPU of bench.gpus: ours, plain PyTorch, and FlashAttention through SDPA."""
    out = bounds.estimates(works, (Ours(), Eager(), bounds.FLASH), about)
    if training:
        with contextlib.suppress(Unsupported):  # without transformers
            out += training_bounds.estimates(scales(), about)
    return out


class Part(NamedTuple):
    """A part of the results: records, or additions to `Run.extra`."""

    records: list[Record]
    extra: dict[str, Any]


PARTS = 4  # that `run` yields


def run(
    works: Sequence[Work], about: dict[str, Any], training: bool, workers: int, say: Callable[[str], None]
) -> Iterator[Part]:
    """Yield the PARTS: bounds, host times, parity and machine code, each as soon as it is known. `say` gets what runs.

    All but the bounds run in new processes, because Triton decides at its import whether it interprets.
    """
    say("bounds")
    yield Part(estimates(works, about, training), {})
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:

        def start(module: str, *arguments: object, **env: str) -> subprocess.Popen[str]:
            process = _start(module, *arguments, **env)
            stack.callback(_end, process)
            return process

        host, parity, codegen = (Path(name, f"{what}.json") for what in ("host", "parity", "codegen"))
        say("host time of a call")
        _wait(start("bench.host", "--json", host), host)
        yield Part([], {"host": json.loads(host.read_text())})
        say(f"parity in Triton's interpreter, machine code for {TARGET}")
        compiling = start("bench.codegen", "--targets", TARGET, "--workers", workers, "--json", codegen)
        if why_not := why_not_interpreted():
            print(f"Parity is left out: {why_not}")
            yield Part([], {})
        else:
            options = ("--dtypes", "bf16", "fp32", "--json", parity, "--out", Path(name, "parity"))
            _wait(start("bench", "parity", *options, TRITON_INTERPRET="1"), parity)
            yield Part(records.read(parity).records, {})
        say(f"machine code for {TARGET}")
        _wait(compiling, codegen)
        yield Part([], {"codegen": json.loads(codegen.read_text())})


def _end(process: subprocess.Popen[str]) -> None:
    """End a process if it still runs: by SIGINT, after which it ends its workers too, or else by SIGKILL."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(module: str, *args: Any, **env: str) -> subprocess.Popen[str]:
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # for --device cpu on a machine with a GPU
    env = {**os.environ, **no_gpu, "TRITON_INTERPRET": "0", **env}
    command = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _wait(process: subprocess.Popen[str], written: Path) -> None:
    """Wait for `process`. Its exit status is ignored: faults that it found are in the file `written`.

    Raises RuntimeError if it has not written that file.
    """
    _, said = process.communicate()
    if not written.exists():
        raise RuntimeError(f"{' '.join(process.args[1:3])} failed:\n{said[-2000:]}")
