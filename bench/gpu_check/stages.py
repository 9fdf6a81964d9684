"""The stages of gpu-check, the most valuable first. A stage is a list of jobs with a common time limit."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.gpu_check import suite
from bench.gpu_check.process import Job
from bench.measuring import records

_PYTHON = (sys.executable, "-m")
_PACKAGE = ("llama_kernels", "reference")
# What the results of the bench and of the tests depend on.
_BENCH, _TESTS = (*_PACKAGE, "bench"), (*_PACKAGE, "bench", "tests")

# The tests that run under compute-sanitizer: partial blocks at the end, and sums over programs.
SANITIZED = ("tests/regressions/test_corpus.py", "-k", "tail_block or first_rows")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# PyTorch's caching allocator would hide an access past the end of a tensor.
_NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
UNDER_LOAD = 3  # processes that repeat the same launches at the same time
OURS_BOTH = ("llama_kernels", "llama_kernels, apart")
HOPPER_OPS = ("attention", "bounded_attention", "rope_attention", "attention_varlen")


class Stage(NamedTuple):
    """One stage.

    minutes: time limit of all its jobs together.
    jobs: takes the folder of the run and returns the jobs.
    sources: folders that the result depends on.
    workers: how many jobs run at once; 0 for --workers of the command line.
    needs: a stage that must come before this one.
    finished: takes the folder of the stage and returns whether commands that passed have done all their work.
    """

    name: str
    minutes: float
    jobs: Callable[[Path], list[Job]]
    sources: tuple[str, ...]
    workers: int = 1
    needs: str | None = None
    finished: Callable[[Path], bool] = lambda _: True


class Missing(NamedTuple):
    """A stage that cannot run on this machine, and why."""

    name: str
    why: str


class Machine(NamedTuple):
    """The properties of the machine that decide which stages there are."""

    hopper: bool
    sanitizer: str | None
    cores: int


def stages(machine: Machine) -> Iterator[Stage | Missing]:
    yield _one("environment", 0.5, _PACKAGE, "llama_kernels")
    yield Stage("compile", 2, lambda folder: [_compile(folder, machine.cores)], _BENCH)
    yield Stage("parity", 1, lambda folder: [_parity(folder)], _BENCH)
    yield Stage("speed", 4, lambda folder: [_speed("speed", folder, 4)], _BENCH, finished=_all_measured)
    yield Stage("collect", 1, lambda _: [suite.collect_job()], _TESTS)
    yield Stage("tests", 8, suite.once, _TESTS, workers=0, needs="collect")
    if machine.hopper:
        options = "--hopper", "--ops", *HOPPER_OPS, "--providers", "llama_kernels", "sdpa-flash", "sdpa-cudnn"
        yield Stage("hopper", 2, suite.with_hopper, _TESTS, workers=0, needs="collect")
        yield Stage("hopper-speed", 1.5, lambda folder: [_speed("hopper-speed", folder, 1.5, *options)], _BENCH,
                    finished=_all_measured)  # fmt: skip
    else:
        yield from (Missing(name, "the GPU is not a Hopper one") for name in ("hopper", "hopper-speed"))
    yield Stage("determinism", 2, lambda _: _determinism(), _TESTS, workers=UNDER_LOAD)
    if machine.sanitizer:
        yield Stage("sanitizer", 2, lambda _: _sanitizers(machine.sanitizer), _TESTS, workers=len(SANITIZERS))
    else:
        where = "neither on the PATH, nor in CUDA_HOME, nor in NVIDIA's wheels"
        yield Missing("sanitizer", f"compute-sanitizer is {where}")
    yield Stage("host", 0.5, lambda folder: [_host(folder)], _TESTS)  # its calls are those of tests/support/ops.py


def _one(name: str, minutes: float, sources: tuple[str, ...], *command: str) -> Stage:
    return Stage(name, minutes, lambda _: [Job(name, (*_PYTHON, *command), 60 * minutes)], sources)


def _bench(name: str, minutes: float, *command: object) -> Job:
    return Job(name, (*_PYTHON, "bench", *map(str, command)), 60 * minutes)


def _compile(folder: Path, cores: int) -> Job:
    found = folder / "compile" / "kernels.json"
    command = (*_PYTHON, "bench.gpu_check.compile", "--workers", str(cores), "--json", str(found))
    return Job("compile", command, 120)


def _parity(folder: Path) -> Job:
    """Our providers alone; the numbers of their peers are checked when these are timed."""
    run = ("parity", "--out", folder / "parity", "--resume", "--patience", 0.5, "--providers", *OURS_BOTH)
    return _bench("parity", 1, *run)


def _speed(name: str, folder: Path, minutes: float, *options: str) -> Job:
    """Records are on disk after each piece of work, and --resume measures what has none."""
    inside = 0.8 * minutes  # the rest is for the report, and for work that began just before the limit
    run = ("run", "--preset", "smoke", "--minutes", inside, "--out", folder / name, "--resume", "--patience", 1)
    return _bench(name, minutes, *run, *options)


def _all_measured(folder: Path) -> bool:
    """Whether the bench measured all its work within its minutes."""
    try:
        return all(r.finished for r in records.read(folder / "records.json").records)
    except (OSError, ValueError):
        return False


def _determinism() -> list[Job]:
    """The same repeats in several processes at once, which load the GPU for each other."""
    names = [f"under-load.{i}" for i in range(1, UNDER_LOAD + 1)]
    return [suite.pytest_job(name, "tests/gpu/test_gpu.py", "-k", suite.REPEATS, seconds=120) for name in names]


def _sanitizers(program: str) -> list[Job]:
    found = []
    for tool in SANITIZERS:
        job = suite.pytest_job(tool, *SANITIZED, seconds=120, env=_NO_CACHE)
        found.append(job._replace(command=(program, "--tool", tool, "--error-exitcode", "1", *job.command)))
    return found


def _host(folder: Path) -> Job:
    """Host time is measured without the GPU: bench.host has a stand-in driver whose launches do nothing."""
    command = (*_PYTHON, "bench.host", "--json", str(folder / "host" / "microseconds.json"))
    return Job("host", command, 30, {"CUDA_VISIBLE_DEVICES": ""})


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer: on the PATH, in the CUDA toolkit, or in a wheel of NVIDIA; else None."""
    if found := shutil.which("compute-sanitizer"):
        return found
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = ("bin", "compute-sanitizer")
    places = [Path(toolkit, folder) for toolkit in (*toolkits, "/usr/local/cuda") for folder in folders]
    wheels = Path(sysconfig.get_path("purelib"), "nvidia")
    places += [path.parent for path in wheels.rglob("compute-sanitizer")]
    return next((found for place in places if (found := shutil.which("compute-sanitizer", path=str(place)))), None)
