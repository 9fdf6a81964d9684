"""These tests run where kernels compile: not in Triton's interpreter, and not on a GPU, whose driver they replace."""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
if INTERPRETED or torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
