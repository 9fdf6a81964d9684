"""What is known without a GPU: bounds on times, parity, machine code and the host time of a call."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.estimate import bounds, training_bounds
from bench.measuring import records
from bench.measuring.records import Record
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from bench.providers.provider import Unsupported
from bench.training.scale import scales
from bench.works import presets
from bench.works.work import Work
from llama_kernels.core.language import why_not_interpreted

TARGET = "sm_90"  # the family whose plain kernels are compiled and read; `make codegen` has all families and options
_PARITY = ("bf16", "fp32")
_LOOK = 0.5  # seconds between two looks at what a process has written


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


def parts(works: Sequence[Work], training: bool) -> int:
    """How many parts `run` yields, about: it yields fewer where a package is missing."""
    small = sum(1 for _ in presets.small([presets.DTYPES[name] for name in _PARITY]))
    return len({work.op for work in works}) + training + small + 2


def run(
    works: Sequence[Work], about: dict[str, Any], training: bool, workers: int, say: Callable[[str], None]
) -> Iterator[Part]:
    """Yield bounds of each op, parity of each piece of work, machine code and host times, each as soon as it is known.

    `say` gets what runs. All but the bounds run in new processes, because Triton decides at its import whether it
    interprets. They begin at once, so that no core is idle; host times come last, when nothing else runs.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:

        def start(module: str, *arguments: object, **env: str) -> subprocess.Popen[str]:
            process = _start(module, *arguments, **env)
            stack.callback(_end, process)
            return process

        host, codegen = Path(name, "host.json"), Path(name, "codegen.json")
        say("bounds; in the background parity and machine code")
        compiling = start("bench.codegen", "--plain", "--targets", TARGET, "--workers", workers, "--json", codegen)
        why_not, parity = why_not_interpreted(), Path(name, "parity")
        checking = None if why_not else start(
            "bench", "parity", "--dtypes", *_PARITY, "--out", parity, TRITON_INTERPRET="1"
        )  # fmt: skip
        yield from _bounds(works, about, training)
        say(f"parity in Triton's interpreter, machine code for {TARGET}")
        if checking is None:
            print(f"Parity is left out: {why_not}")
        else:
            yield from _as_it_comes(checking, parity / "records.json")
        say(f"machine code for {TARGET}")
        _wait(compiling, codegen)
        yield Part([], {"codegen": json.loads(codegen.read_text())})
        say("host time of a call")
        _wait(start("bench.host", "--json", host), host)
        yield Part([], {"host": json.loads(host.read_text())})


def _bounds(works: Sequence[Work], about: dict[str, Any], training: bool) -> Iterator[Part]:
    for op in dict.fromkeys(work.op for work in works):
        yield Part(estimates([work for work in works if work.op == op], about, False), {})
    if training:
        yield Part(estimates([], about, True), {})


def _as_it_comes(process: subprocess.Popen[str], file: Path) -> Iterator[Part]:
    """The records that `process` writes into `file`, each piece of work as soon as it is there."""
    shown, ended, said = 0, False, ""
    while not ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, said = process.communicate(timeout=_LOOK)
            ended = True
        made = records.read(file).records if file.exists() else []
        for _, same in itertools.groupby(made[shown:], key=lambda r: r.work):
            yield Part(list(same), {})
        shown = len(made)
    _check(process, file, said)


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
    _check(process, written, process.communicate()[1])


def _check(process: subprocess.Popen[str], written: Path, said: str) -> None:
    if not written.exists():
        raise RuntimeError(f"{' '.join(process.args[1:3])} failed:\n{said[-2000:]}")
