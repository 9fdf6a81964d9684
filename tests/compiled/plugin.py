"""A pytest plugin: `pytest -p PACKAGE.plugin --compiled sm_90` runs the Triton kernels of any test as compiled.

Every kernel that a test launches on CPU tensors is compiled for the target, and its PTX runs in the PTX simulator. A
test fails on what a sanitizer of a GPU would report: see README.md.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest

_PROPERTY = "compiled kernels"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("compiled kernels")
    group.addoption("--compiled", metavar="TARGET", choices=("sm_80", "sm_90"), help="run kernels compiled for TARGET")
    group.addoption("--compiled-seed", type=int, help="draw the schedule of warps that wait for each other one by one")
    group.addoption("--compiled-no-races", action="store_true", help="do not look for races in shared memory")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("compiled"):
        from triton import knobs

        if knobs.runtime.interpret:
            raise pytest.UsageError("--compiled: Triton's interpreter is on; set TRITON_INTERPRET=0")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if not (target := item.config.getoption("compiled")):
        yield
        return
    from .driver import running
    from .report import Checks

    checks = Checks(not item.config.getoption("compiled_no_races"), item.config.getoption("compiled_seed"))
    with running(target, checks) as log:
        outcome = yield
        launches = collections.Counter(report.kernel for report in log.reports)
        ran = {name: (launches[name], log.seconds[name]) for name in launches}
        item.user_properties.append((_PROPERTY, ran))
        if log.findings and outcome.excinfo is None:
            outcome.force_exception(AssertionError("\n".join(log.findings)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == _PROPERTY and report.when == "call":
                    for kernel, (launches, seconds) in value.items():
                        total[kernel][0] += launches
                        total[kernel][1] += seconds
    if total:
        terminalreporter.section("kernels run as compiled")
        for name, (launches, seconds) in sorted(total.items()):
            terminalreporter.line(f"{name:40}{launches:7.0f} launches {seconds:8.1f} s")
