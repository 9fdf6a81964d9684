"""The launch cache against Triton's own launcher, down to what the CUDA driver receives.

The checks run in a process of its own whose libcuda.so.1 is a substitute that records launches: no GPU is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.contracts.launcher import substitute
from tests.support.environment import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this run; the other run of the suite compiles"),
    pytest.mark.skipif(DEVICE == "cuda", reason="the run of the suite without a GPU has it"),
    pytest.mark.skipif(substitute.compiler() is None, reason="Triton's launcher needs a C compiler"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {**os.environ, **substitute.build(tmp_path_factory.mktemp("driver"))}


@pytest.mark.parametrize(
    "checks", [("check_compiled.py",), ("check_declared.py", "check_random.py")], ids=["compiled", "declared"]
)
def test_the_launch_cache_launches_what_triton_launches(checks, environment):
    options = ["-p", "tests.contracts.launcher.plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-o", "addopts=", "-q"]
    command = [sys.executable, "-m", "pytest", *options, *(substitute.HERE / check for check in checks)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=substitute.HERE.parents[2])
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
