"""Faults planted in the source of the Hopper kernels, compiled, must show in the PTX simulator.

What can go wrong in such a kernel and nowhere else is its schedule: a wrong phase, a wait left out, a slot overwritten
while tensor cores still read it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from llama_kernels.ops.attention import hopper
from tests.support.attention import Case, check
from tests.support.environment import compiles

PACKAGE = "llama_kernels.ops.attention.hopper"


def _schedule(line: str, planted: str) -> tuple[str, str, str]:
    return "schedule.py", line, planted


# File, line, what it becomes.
ARITHMETIC = {
    "a phase that flips a round late": _schedule(
        '    return (step // STAGES) & 1\n', "    return (step // (2 * STAGES)) & 1\n"
    ),
    "a ring of one slot more than there are": _schedule(
        "    return (step // STAGES) & 1\n", "    return (step // (STAGES + 1)) & 1\n"
    ),
    "an untouched slot that is waited for": _schedule("& 1) ^ 1\n", "& 1)\n"),
    "a slot for two steps": _schedule("    return step & (STAGES - 1)\n", "    return (step // 2) & (STAGES - 1)\n"),
    "both begin with the turn": _schedule("    return (step + C) & 1", "    return step & 1"),
    "nobody begins": _schedule("    return (step + C) & 1", "    return (step + 1) & 1"),
    "blocks in the order of the steps": _schedule("    block = walk.top - step\n", "    return step\n"),
    "another head of the group": _schedule(
        "    rest = step - group * walk.masked\n", "    return 0, step % walk.count\n"
    ),
    "no fence before q is stored": ("forward.py", "    fence_async_shared()\n", ""),
    "no fence before ds is read": ("backward.py", "fence_async_shared()\n", "pass\n"),
}  # fmt: skip
WAITS = {
    "forward.py": ("q_filled", "k_filled", "k_freed", "v_filled", "v_freed", "o_filled"),
    "backward.py": ("q_filled", "kv_filled", "do_filled", "freed", "ds_filled", "ds_freed", "dq_filled", "dq_freed",
                    "dkdv_filled"),
}  # fmt: skip


# The ring of four blocks of keys turns around in the first, that of two blocks of rows in the second.
FORWARD = Case(1, 1, 1, 128, 800, 64, 64)
BACKWARD = Case(1, 2, 1, 290, 290, 64, 64, window_size=(150, 0))


@contextlib.contextmanager
def planted(folder: Path, file: str, line: str, by: str) -> Iterator[None]:
    """Attention launches a copy of the Hopper kernels in which `line` (a regular expression, for waits) is replaced."""
    name = f"faulty_{folder.name}".replace("-", "_")
    copy = folder / name
    shutil.copytree(Path(hopper.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            changed = re.sub(line, by, text) if line.startswith("mbarrier") else text.replace(line, by)
            assert changed != text, f"{line!r} is not in {file}"
            text = changed
        # The language, the switch and the tiles stay the package's own.
        path.write_text(re.sub(rf"{PACKAGE}\.(?!gluon|switch|tables)", f"{name}.", text))
    sys.path.insert(0, str(folder))
    try:
        forward, backward = (importlib.import_module(f"{name}.{part}") for part in ("forward", "backward"))
        with (
            mock.patch.object(hopper, "launch_hopper_forward", forward.launch_hopper_forward),
            mock.patch.object(hopper, "launch_hopper_backward", backward.launch_hopper_backward),
        ):
            yield
    finally:
        sys.path.remove(str(folder))
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]


def shows(gradients: bool, D: int = 64) -> str | None:
    """What shows that a kernel is wrong, or None: an error or a finding of the machine, or the judge of the results."""
    from tests.compiled.driver import running
    from tests.compiled.global_memory import Fault
    from tests.compiled.llama.plugin import kernels_on_cpu
    from tests.compiled.report import Checks

    case = dataclasses.replace(BACKWARD if gradients else FORWARD, D=D, DV=D)
    torch.use_deterministic_algorithms(False)
    for seed in (None, 0, 1, 2):
        torch.manual_seed(0)
        try:
            with kernels_on_cpu("sm_90", hopper=True), running("sm_90", Checks(seed=seed)) as log:
                check(case, torch.float16, torch.device("cpu"), gradients=gradients)
        except (Fault, AssertionError) as error:
            return str(error)
        if log.findings:
            return log.findings[0]
    return None


# Of `make test`; the others run in `make test-compiled`.
FAST = ("an untouched slot that is waited for", "nobody begins", "k_filled", "k_freed", "v_filled")


def _parameters(faults: Iterable[tuple[str, ...]]) -> list:
    """Each fault; the last part of it is its name."""
    return [
        pytest.param(*fault, marks=() if fault[-1] in FAST else pytest.mark.compiled_table, id=fault[-1])
        for fault in faults
    ]


@compiles
def test_nothing_shows_in_the_forward_where_nothing_is_planted():
    assert shows(gradients=False) is None


@compiles
@pytest.mark.compiled_table
def test_nothing_shows_in_the_backward_where_nothing_is_planted():
    assert shows(gradients=True) is None


@compiles
@pytest.mark.parametrize("fault", _parameters((fault,) for fault in ARITHMETIC))
def test_wrong_arithmetic_shows(fault, tmp_path):
    with planted(tmp_path, *ARITHMETIC[fault]):
        assert shows(gradients=False) or shows(gradients=True)


@compiles
@pytest.mark.parametrize("file, barrier", _parameters((file, name) for file, names in WAITS.items() for name in names))
def test_a_missing_wait_shows(file, barrier, tmp_path):
    wait = rf"mbarrier\.wait\(bars\.{barrier}\.index\(.*\)\n"
    with planted(tmp_path, file, wait, "pass\n"):
        # The consumers share ds only where heads are 128 wide.
        assert shows(gradients=file == "backward.py", D=128 if barrier.startswith("ds_") else 64)
