"""What the suite runs. The tests are the same in each case:

- on a GPU, the compiled kernels;
- without a GPU, the kernels in Triton's interpreter;
- without a GPU and with TRITON_INTERPRET=0, the reference, which CPU tensors take otherwise;
- with --compiled sm_80 or sm_90, the compiled PTX of the kernels, on CPU tensors (tests/compiled).
"""

from __future__ import annotations

import gc
import os
import sys

# Before NumPy is loaded. The interpreter's products are too small for more than one thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    compiled = any(argument.startswith("--compiled") for argument in sys.argv)
    os.environ.setdefault("TRITON_INTERPRET", "0" if compiled else "1")  # before the first kernel is decorated
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product, for cuBLAS to be deterministic

import pytest

pytest.register_assert_rewrite("tests.support")  # before they are imported

from llama_kernels.core import launch_cache  # noqa: E402
from tests.support.environment import DEVICE, INTERPRETED  # noqa: E402

pytest_plugins = ("tests.compiled.plugin", "tests.compiled.llama.plugin", "tests.support.launching_nothing")

torch.set_num_threads(1)  # tests run side by side, on tensors too small to share

if INTERPRETED:
    from tests.support import interpreter

    interpreter.make_faster()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hopper",
        action="store_true",
        help="attention takes the Hopper kernels; PyTorch is asked for deterministic algorithms only in tests that are "
        "marked deterministic, since the Hopper backward is not",
    )
    parser.addoption(
        "--hardware-errors",
        choices=("high", "low", "mixed"),
        help="the interpreter's exp2, log2, rsqrt and division have the errors that the PTX ISA allows: see "
        "tests/support/hardware.py",
    )
    parser.addoption("--compiled-table", action="store_true", help="also the tests that only `make test-compiled` runs")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deterministic: asks PyTorch for deterministic algorithms, under --hopper too")
    if config.getoption("hopper"):
        from llama_kernels import hopper_attention

        hopper_attention()
    if error := config.getoption("hardware_errors"):
        if not INTERPRETED:
            raise pytest.UsageError("--hardware-errors is for Triton's interpreter, which does not run here")
        from tests.support import hardware

        arithmetic = hardware.interpreted(hardware.ERRORS[error])
        arithmetic.__enter__()
        config.add_cleanup(lambda: arithmetic.__exit__(None, None, None))


def pytest_report_header(config: pytest.Config) -> str:
    path = "compiled kernels" if DEVICE == "cuda" else "kernels, interpreted" if INTERPRETED else "reference path"
    if target := config.getoption("compiled"):
        path = f"kernels as compiled for {target}"
    return f"llama_kernels on {DEVICE}: {path}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("compiled_table"):
        rest = [item for item in items if item.get_closest_marker("compiled_table")]
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if not item.get_closest_marker("compiled_table")]
    for item in items:
        if item.get_closest_marker("gpu") and DEVICE != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("interpreter") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="alters a kernel, which only the interpreter picks up"))


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests live to the end: garbage collections need not visit their millions of objects


@pytest.fixture(autouse=True)
def _reproducible_and_poisoned(request: pytest.FixtureRequest):
    """Set a seed, fill uninitialised memory with NaN, and empty the launch cache.

    NaN shows what a kernel does not write. A cached launch may have a tile that another test replaced. PyTorch fills
    memory only where deterministic algorithms are asked for, which rule out the Hopper backward: under --hopper, only
    tests marked `deterministic` ask for them.
    """
    torch.manual_seed(0)
    launch_cache.clear()
    wanted = not request.config.getoption("hopper") or request.node.get_closest_marker("deterministic") is not None
    torch.use_deterministic_algorithms(wanted, warn_only=True)  # some of the reference's operations have none
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
