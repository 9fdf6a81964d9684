"""The test suite in parts of at most PART tests. Each part is a pytest process with its own time limit.

Parts run at the same time, so kernels compile on every core. The result of each part is on disk, so a second run
repeats only parts without one. pytest lists the tests, so there is no list of files to maintain. A test that has no
meaning on a GPU is skipped by its own mark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.gpu_check.process import Job
from bench.gpu_check.state import ROOT

PART = 40
SECONDS = 300.0  # time limit of a part, all of whose kernels may need to be compiled
COLLECT_SECONDS = 60.0
# Slow, and the least likely to find a fault of a GPU.
LAST = ("tests/integrations/", "tests/examples/", "tests/regressions/test_fuzz.py", "tests/gpu/test_large.py")
# Words in the names of tests that the determinism stage runs, while other processes use the GPU.
REPEATS = "repeat or races"

_PYTEST = (sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider")


def pytest_job(name: str, *args: str, seconds: float = SECONDS, env: Mapping[str, str] = {}) -> Job:
    """A job that runs pytest. With -v, the last line of a job that hangs names the test that hangs."""
    hang = f"faulthandler_timeout={0.8 * seconds:.0f}"
    return Job(name, (*_PYTEST, "-v", "--durations=5", "-o", hang, *args), seconds, env)


def collect_job() -> Job:
    """A job that lists the tests that depend on how kernels run, in collect/collect.txt."""
    return Job("collect", (*_PYTEST, "-q", "--collect-only", "-m", "not once", "tests"), COLLECT_SECONDS)


def listed(folder: Path) -> list[str]:
    """The ids of all tests, and the names of files that pytest could not collect: run, such a file fails and says why.

    Empty if nothing was collected.
    """
    try:
        lines = (folder / "collect" / "collect.txt").read_text().splitlines()
    except OSError:
        return []
    found = [re.match(r"(?:ERROR )?(tests/\S+\.py(?:::.*)?)(?: - .*)?$", line) for line in lines]
    return list(dict.fromkeys(match[1] for match in found if match))


def once(folder: Path) -> list[Job]:
    """Every test except those that the determinism stage runs."""
    return parts(test for test in listed(folder) if not is_repeated(test))


def with_hopper(folder: Path) -> list[Job]:
    """The tests of attention, with its Hopper kernels."""
    return parts(filter(reaches_attention, listed(folder)), "--hopper")


def parts(ids: Iterable[str], *options: str) -> list[Job]:
    """Jobs for `ids`. A part has tests of one file; the files in LAST come last."""
    by_file: dict[str, list[str]] = {}
    for each in ids:
        by_file.setdefault(each.split("::")[0], []).append(each)
    found = []
    for file in sorted(by_file, key=lambda file: file.startswith(LAST)):
        tests = by_file[file]
        chunks = [tests[i : i + PART] for i in range(0, len(tests), PART)]
        stem = file.removeprefix("tests/").removesuffix(".py").replace("/", "-")
        found += [pytest_job(f"{stem}.{i}", *options, *chunk) for i, chunk in enumerate(chunks, 1)]
    return found


def is_repeated(test: str) -> bool:
    """Whether the determinism stage runs `test`, as pytest -k REPEATS chooses in tests/gpu/test_gpu.py."""
    return test.startswith("tests/gpu/test_gpu.py::") and any(word in test.lower() for word in REPEATS.split(" or "))


def reaches_attention(test: str) -> bool:
    """Whether the file of `test` calls attention, alone or among all ops, so that --hopper may change what it runs."""
    file = test.split("::")[0]
    if file.startswith("tests/integrations/"):
        return False
    called = r"\b(?:lk|llama_kernels)\.(?:rope_)?attention|from tests\.support\.(?:attention|ops)\b"
    return re.search(called, (ROOT / file).read_text()) is not None


def counts(output: str) -> dict[str, int]:
    """The numbers of tests by result, from the last line of pytest's output."""
    last = output.strip().rsplit("\n", 1)[-1]
    return {what.rstrip("s"): int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last)}
