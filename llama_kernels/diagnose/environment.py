"""What a bug report needs to know about a machine, as data. A section that cannot be read is given as its error.

Home folders are replaced by ~, and values that may be secret are hidden.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import llama_kernels
from llama_kernels.core import language
from llama_kernels.core.device import family_of, gpu_of, why_not_compiled

ROOT = Path(llama_kernels.__file__).parent.parent


def environment() -> dict[str, Any]:
    """The sections by name, as JSON values. A section that raises is {"error": the error}."""
    sections: dict[str, Callable[[], Any]] = {
        "llama_kernels": package,
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "system": system,
        "packages": packages,
        "torch build": torch_build,
        "driver": driver,
        "GPUs": gpus,
        "triton tools": triton_tools,
        "variables": variables,
        "torch settings": torch_settings,
    }
    return {name: without_home(attempted(section)) for name, section in sections.items()}


def attempted(section: Callable[[], Any]) -> Any:
    """The result of `section`, or {"error": the error} if it raises; with "warnings" if there were any."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            result = section()
        except Exception as error:
            result = {"error": described(error)}
    warned = sorted({str(each.message).strip().splitlines()[0] for each in given if str(each.message).strip()})
    if not warned:
        return result
    return {**(result if isinstance(result, dict) else {"value": result}), "warnings": warned}


def described(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")


# --- private values --------------------------------------------------------------------------------------------------

_HOMES = re.compile(r"(/home|/Users)/[^/\s:;,'\"]+|[A-Za-z]:\\Users\\[^\\\s:;,'\"]+")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user and password of a URL


def without_home(value: Any) -> Any:
    """`value` with every home folder in its strings replaced by ~."""
    if isinstance(value, dict):
        return {key: without_home(x) for key, x in value.items()}
    if isinstance(value, list):
        return [without_home(x) for x in value]
    if not isinstance(value, str):
        return value
    home = os.path.expanduser("~")
    for folder in {home, os.path.realpath(home)}:
        if len(folder) > 1:  # in some containers it is the root folder
            value = re.sub(re.escape(folder) + r"(?![^/\\\s:;,'\")])", "~", value)
    return _HOMES.sub("~", value)


def without_secrets(name: str, value: str) -> str:
    """The value of the environment variable `name`, hidden where it may be secret."""
    return "(hidden)" if _SECRET_NAME.search(name) else _LOGIN.sub("(hidden)", value)


# --- sections --------------------------------------------------------------------------------------------------------


def package() -> dict[str, Any]:
    """Version, folder, and the commit of a checkout or of an installation from a repository."""
    found: dict[str, Any] = {"version": llama_kernels.__version__, "folder": str(Path(llama_kernels.__file__).parent)}
    if (ROOT / ".git").exists():
        found["commit"] = _git("rev-parse", "HEAD")
        found["changed files"] = len(_git("status", "--porcelain", "--", "llama_kernels", "reference").splitlines())
    else:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            origin = importlib.metadata.distribution("llama-kernels").read_text("direct_url.json") or "{}"
            found["commit"] = json.loads(origin).get("vcs_info", {}).get("commit_id", "unknown")
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def system() -> str:
    """Operating system and release, architecture of the processor, and the number of CPUs this process may use."""
    release = platform.platform()
    with contextlib.suppress(OSError, AttributeError):  # it exists on Linux only
        release = f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {release}"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{release}, {platform.machine()}, {usable} CPUs"


def packages() -> dict[str, Any]:
    """The versions of the packages that this package imports, patches or is compared with."""
    found: dict[str, Any] = {"torch": torch.__version__}
    found["triton"] = language.triton.__version__ if language.HAS_TRITON else _why_no_triton()
    for name in ("numpy", "transformers", "accelerate", "peft", "liger-kernel", "flash-attn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _why_no_triton() -> str:
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"cannot be imported: {described(error)}"
    return "not imported"


def torch_build() -> dict[str, Any]:
    """What torch was built with."""
    found = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "git": torch.version.git_version[:12]}
    if torch.version.cuda or torch.version.hip:
        found["GPUs it was built for"] = " ".join(torch.cuda.get_arch_list())
    return {name: x for name, x in found.items() if x}


def driver() -> dict[str, Any]:
    """The version of the GPU's driver, from nvidia-smi, the kernel module and torch."""
    found: dict[str, Any] = {}
    if tool := shutil.which("nvidia-smi"):
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        lines = (done.stdout + done.stderr).strip().splitlines()
        found["nvidia-smi"] = ", ".join(sorted(set(lines))) if lines else f"exit status {done.returncode}"
    for module in (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")):
        with contextlib.suppress(OSError):
            found["kernel module"] = module.read_text().strip().splitlines()[0]
    if torch.version.cuda:
        found["newest CUDA it supports"] = attempted(_newest_cuda)
    return found or {"none": "no GPU driver was found"}


def _newest_cuda() -> str:
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def gpus() -> list[Any] | dict[str, Any]:
    """The GPUs that torch sees, each with its tile family or the reason why it has none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return {"none": "torch sees no GPU" if built else "this torch is built for CPUs only"}
    return [attempted(functools.partial(gpu, i)) for i in range(torch.cuda.device_count())]


def gpu(index: int) -> dict[str, Any]:
    """One GPU, by the number that CUDA_VISIBLE_DEVICES gives it."""
    device = torch.device("cuda", index)
    properties, described_by_driver = torch.cuda.get_device_properties(device), gpu_of(device)
    arch, shared = described_by_driver.arch, described_by_driver.shared_bytes
    found = {
        "device": str(device),
        "name": described_by_driver.name,
        "architecture": arch if isinstance(arch, str) else "compute capability {}.{}".format(*arch),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "SMs": properties.multi_processor_count,
        "shared memory per block": "unknown" if shared is None else f"{shared // 1024} KiB",
        "threads per warp": described_by_driver.lanes,
    }
    refused = why_not_compiled(described_by_driver)
    found["tiles"] = f"none: {refused}" if refused else family_of(described_by_driver)
    return found


def triton_tools() -> dict[str, Any]:
    """Triton's compilers and its cache folder."""
    if not language.HAS_TRITON:
        return {"none": "Triton is not installed"}
    knobs = language.triton.knobs
    folder = Path(knobs.cache.dir)
    nearest = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    compilers = (os.environ.get("CC"), *map(shutil.which, ("cc", "gcc", "clang")))
    found = {
        "cache": str(folder),
        "cache is writable": os.access(nearest, os.W_OK),
        "free there": f"{shutil.disk_usage(nearest).free / 2**30:.1f} GiB",
        "C compiler": next(filter(None, compilers), "none: Triton needs one at the first launch"),
        "backends": ", ".join(sorted(importlib.import_module("triton.backends").backends)),
    }
    for tool in ("ptxas", "ptxas_blackwell"):
        with contextlib.suppress(Exception):  # not every release and platform has it
            found[tool] = getattr(knobs.nvidia, tool).version
    return found


_PREFIXES = ("TRITON_", "PYTORCH_", "TORCH", "CUBLAS_", "CUDA_", "CUDNN_", "HIP_", "ROCR_", "HSA_", "LLAMA_KERNELS_")
_NAMES = ("NVIDIA_TF32_OVERRIDE", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_PRELOAD", "LD_LIBRARY_PATH", "CC")


def variables() -> dict[str, str]:
    """Environment variables that change what runs, where it runs, or its numbers."""
    return {
        name: without_secrets(name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIXES) or name in _NAMES
    }


def torch_settings() -> dict[str, Any]:
    """Settings of torch that change the numbers of the kernels, or of the eager code that they are compared with."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags: dict[str, Callable[[], Any]] = {
        "float32 matmul precision": torch.get_float32_matmul_precision,
        "matmul.allow_tf32": lambda: matmul.allow_tf32,
        "cudnn.allow_tf32": lambda: cudnn.allow_tf32,
        "bf16 reduced precision reduction": lambda: matmul.allow_bf16_reduced_precision_reduction,
        "fp16 reduced precision reduction": lambda: matmul.allow_fp16_reduced_precision_reduction,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
        "default dtype": lambda: str(torch.get_default_dtype()),
        "CPU threads": torch.get_num_threads,
    }
    return {name: attempted(read) for name, read in flags.items()}
