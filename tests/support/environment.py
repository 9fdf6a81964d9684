"""Where the tests run: on which device, and whether the kernels are interpreted. tests/conftest.py chooses first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama_kernels.core.language import HAS_TRITON, INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

# Of what compiles kernels, or launches them into nothing, under a driver that stands in for a GPU's.
COMPILES = [
    pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this run; the other run of the suite compiles"),
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
    pytest.mark.skipif(DEVICE == "cuda", reason="replaces Triton's driver, which the other tests need"),
]


def compiles(test: Any) -> Any:
    for mark in COMPILES:
        test = mark(test)
    return test
