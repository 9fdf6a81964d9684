"""The test suite in parts of at most PART tests, each a pytest process with a time limit of its own.

Parts run side by side, which compiles cold kernels on every core, and each part's verdict is on disk: a second run
repeats only what has none. Which tests there are pytest says, so no list of files can go stale; a test that means
nothing on a GPU is skipped there by its own mark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.gpu_check.process import Job
from bench.gpu_check.state import ROOT

PART = 40
SECONDS = 300.0  # of a part: its kernels may all be new
COLLECT_SECONDS = 60.0
# Slow, and least likely to say something new about a GPU.
LAST = ("tests/integrations/", "tests/examples/", "tests/regressions/test_fuzz.py", "tests/gpu/test_large.py")
# Hundreds of launches that must be alike, which the determinism stage repeats while others use the GPU.
REPEATS = "repeat or races"

_PYTEST = (sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider")


def pytest_job(name: str, *args: str, seconds: float = SECONDS, env: Mapping[str, str] = {}) -> Job:
    """-v names each test before it runs, so the last line of a job that hangs is the test that hung."""
    hang = f"faulthandler_timeout={0.8 * seconds:.0f}"
    return Job(name, (*_PYTEST, "-v", "--durations=5", "-o", hang, *args), seconds, env)


def collect_job() -> Job:
    """Lists the tests that depend on how kernels run, in collect/collect.txt."""
    return Job("collect", (*_PYTEST, "-q", "--collect-only", "-m", "not once", "tests"), COLLECT_SECONDS)


def listed(folder: Path) -> list[str]:
    """The ids of all tests, and of a file that pytest could not collect its name: run by itself, it fails and says
    why. Empty where nothing was collected."""
    try:
        lines = (folder / "collect" / "collect.txt").read_text().splitlines()
    except OSError:
        return []
    found = [re.match(r"(?:ERROR )?(tests/\S+\.py(?:::.*)?)(?: - .*)?$", line) for line in lines]
    return list(dict.fromkeys(match[1] for match in found if match))


def once(folder: Path) -> list[Job]:
    """Every test, but for those that the determinism stage repeats."""
    return parts(test for test in listed(folder) if not is_repeated(test))


def with_hopper(folder: Path) -> list[Job]:
    """The tests of attention, with its Hopper kernels."""
    return parts(filter(reaches_attention, listed(folder)), "--hopper")


def parts(ids: Iterable[str], *options: str) -> list[Job]:
    """Jobs for `ids`, in their order but for files that are LAST. A part holds tests of one file."""
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
    """Whether the determinism stage runs `test`: the same choice as pytest's -k REPEATS in tests/gpu/test_gpu.py."""
    return test.startswith("tests/gpu/test_gpu.py::") and any(word in test.lower() for word in REPEATS.split(" or "))


def reaches_attention(test: str) -> bool:
    """Whether the file of `test` calls attention, by itself or among all ops: --hopper may change what it runs."""
    file = test.split("::")[0]
    if file.startswith("tests/integrations/"):
        return False
    called = r"\b(?:lk|llama_kernels)\.(?:rope_)?attention|from tests\.support\.(?:attention|ops)\b"
    return re.search(called, (ROOT / file).read_text()) is not None


def counts(output: str) -> dict[str, int]:
    """How many tests passed, failed and so on, of pytest's last line."""
    last = output.strip().rsplit("\n", 1)[-1]
    return {what.rstrip("s"): int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last)}
