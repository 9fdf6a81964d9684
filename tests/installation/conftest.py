"""GPUs that torch only seems to see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_kernels.core import device
from llama_kernels.diagnose import kernels


@pytest.fixture
def pretend_gpus(monkeypatch):
    """pretend_gpus(*properties): torch sees GPUs with these properties, and this process compiles kernels."""
    default = {
        "warp_size": 32, "multi_processor_count": 132, "total_memory": 80 * 2**30, "shared_memory_per_block": 49152,
    }  # fmt: skip

    def forget() -> None:
        device.arch_of.cache_clear()
        device.gpu_of.cache_clear()

    def pretend(*gpus: dict[str, Any]) -> None:
        forget()
        properties = [SimpleNamespace(**{**default, **gpu}) for gpu in gpus]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties[torch.device(gpu).index])
        for module in (device, kernels):
            monkeypatch.setattr(module, "INTERPRETED", False)
            monkeypatch.setattr(module, "HAS_TRITON", True)

    yield pretend
    forget()
