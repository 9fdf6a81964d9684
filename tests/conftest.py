"""How the suite runs: on a GPU the compiled kernels; without one the kernels in Triton's interpreter; with
TRITON_INTERPRET=0 and no GPU the reference path that CPU tensors take otherwise. The tests are the same."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is decorated
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product: cuBLAS is deterministic only so

import pytest

from llama_kernels.language import INTERPRETED

torch.set_num_threads(1)  # tests run side by side, on tensors too small to share

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def pytest_report_header() -> str:
    path = "compiled kernels" if DEVICE == "cuda" else "kernels, interpreted" if INTERPRETED else "reference path"
    return f"llama_kernels on {DEVICE}: {path}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and DEVICE != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("interpreter") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="alters a kernel, which only the interpreter picks up"))


@pytest.fixture(autouse=True)
def _reproducible_and_poisoned():
    """A seed, and uninitialised memory filled with NaN: what a kernel does not write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # of the references, some have no such algorithm on a GPU
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
