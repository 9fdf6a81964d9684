"""What is known without a GPU: bounds on times, parity, machine code and the host time of a call."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def run(say: Callable[[str], None], workers: int) -> tuple[list[Record], dict[str, Any]]:
    """Parity records, and the extras `host` and `codegen`. Each in a process of its own: how Triton works is decided
    at import."""
    with tempfile.TemporaryDirectory() as name:
        host, parity, codegen = (Path(name, f"{what}.json") for what in ("host", "parity", "codegen"))
        say("host cost of a call")
        _wait(_start("bench.host", "--json", host), host)
        say(f"parity in Triton's interpreter; machine code for {TARGET}")
        compiling = _start("bench.codegen", "--targets", TARGET, "--workers", str(workers), "--json", codegen)
        arguments = ("parity", "--dtypes", "bf16", "fp32", "--json", parity, "--out", Path(name, "parity"))
        if why_not := why_not_interpreted():
            print(f"Parity is left out: {why_not}")
        else:
            _wait(_start("bench", *arguments, TRITON_INTERPRET="1"), parity)
        _wait(compiling, codegen)
        found = [] if why_not else records.read(parity).records
        return found, {"host": json.loads(host.read_text()), "codegen": json.loads(codegen.read_text())}


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
