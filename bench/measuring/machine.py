"""The machine that measures: its GPU, the versions and the commit."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama_kernels.core.language import HAS_TRITON, triton


def describe(device: str) -> dict[str, Any]:
    """Versions, GPU, driver, date and commit. For device "cpu", GPU and driver are "none"."""
    gpu = device == "cuda"
    return {
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "none",
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "driver": _smi("driver_version") if gpu else "none",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
    }


def repeated(about: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `describe` that every record repeats."""
    return {name: about[name] for name in ("torch", "triton", "gpu", "driver", "date")}


def clock(device: str) -> int | None:
    """The clock of the current GPU's SMs now, in MHz. None on a CPU, or if nvidia-smi does not say."""
    found = re.match(r"\d+", _smi("clocks.sm")) if device == "cuda" else None
    return int(found[0]) if found else None


def _smi(field: str) -> str:
    """`field` of nvidia-smi for the current CUDA device, or "unknown".

    nvidia-smi lists every GPU of the machine in PCI order and ignores CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, so
    its indices differ from CUDA's. The GPU is found by its UUID. A MIG slice has another UUID than its GPU, so it is
    found by the PCI address. If neither is known, the result is the value that all GPUs share.
    """
    listed = _output("nvidia-smi", f"--query-gpu=uuid,pci.bus_id,{field}", "--format=csv,noheader")
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in listed.splitlines() if line.count(",") >= 2]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = str(getattr(properties, "uuid", "")).lower().removeprefix("gpu-")
    address = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    pci = "" if None in address else "{:08x}:{:02x}:{:02x}.0".format(*address)
    ours = [row for row in rows if row[0].lower().removeprefix("gpu-") == uuid]
    ours = ours or [row for row in rows if row[1].lower() == pci] or rows
    values = {row[2] for row in ours}
    return values.pop() if len(values) == 1 else "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
