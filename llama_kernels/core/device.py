"""The device of a call: the GPU's family, shared memory, SMs and warp size; launches go to the tensors' own device."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any, NamedTuple

import torch

from llama_kernels.core.language import HAS_TRITON, INTERPRETED


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch inside this: Triton launches on the current device, which need not be the one that holds `x`."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_SWITCH  # nearly always, and every launch asks
    return torch.cuda.device(x.device)


_NO_SWITCH = contextlib.nullcontext()

# KiB of shared memory that one program may use, by GPU family.
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
# SMs (on AMD, compute units) of a large GPU of each family: A100, A40, H100 and H200, B200, MI300X. How the keys of a
# call are split depends on these, not on the SMs of its GPU, so results are the same bits on every GPU of a family.
SMS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}

# The devices that have kernels. On the meta device, and while tracing, only shapes are computed.
KERNEL_DEVICES = ("cuda", "cpu")


@functools.cache
def arch_of(device: torch.device) -> str:
    """The GPU family by which tiles are chosen for `device`: sm_80, sm_86, sm_90, sm_100 or gfx942.

    Every launcher calls it before a kernel is compiled. A launch from the launch cache does not.

    Raises:
        ValueError: no kernel can be compiled for `device`.
    """
    if device.type != "cuda" or INTERPRETED:
        return "sm_80"  # the interpreter runs any tile
    gpu = gpu_of(device)
    if reason := why_not_compiled(gpu):
        fix = "llama_kernels.reference has every op in plain PyTorch, under the same name, for any device."
        patched = "A patched Transformers model runs stock code after unpatch(model)."
        raise ValueError(f"llama_kernels: no kernel can be compiled for {device}: {reason}. {fix} {patched}")
    return family_of(gpu)


class GPU(NamedTuple):
    """What the choice of tiles depends on."""

    name: str
    arch: tuple[int, int] | str  # compute capability; on AMD the architecture, such as gfx942
    shared_bytes: int | None  # that one program may use; None: this torch does not say
    lanes: int  # threads in a warp


@functools.cache
def gpu_of(device: torch.device) -> GPU:
    """The CUDA or HIP GPU `device`, as its driver describes it."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return GPU(properties.name, arch, properties.shared_memory_per_block, properties.warp_size)
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    return GPU(properties.name, (properties.major, properties.minor), shared, properties.warp_size)


def family_of(gpu: GPU) -> str:
    """The family of `gpu`, a key of SHARED_KIB. Ask `why_not_compiled` whether kernels compile for it."""
    if isinstance(gpu.arch, str):
        return "gfx942"
    if gpu.arch == (8, 0):
        return "sm_80"
    # Consumer GPUs (8.6, 8.9, 12.x), 11.0, for which Triton emits their tensor-core instructions, and unknown GPUs take
    # the tiles that need the least shared memory.
    return {9: "sm_90", 10: "sm_100"}.get(gpu.arch[0], "sm_86")


# AMD's GCN and RDNA 1 and 2. For them Triton expands matrix products into scalar code, which takes minutes to compile
# and spills kilobytes.
_WITHOUT_MATRIX_INSTRUCTIONS = re.compile("gfx([78]|90[02469c]|10)")


def why_not_compiled(gpu: GPU) -> str | None:
    """Why kernels cannot be compiled for `gpu`. None: they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if isinstance(gpu.arch, str):
        if _WITHOUT_MATRIX_INSTRUCTIONS.match(gpu.arch):
            return f"{gpu.name} is a {gpu.arch}; wanted an AMD GPU with matrix instructions, CDNA or RDNA 3 or newer"
    elif gpu.arch < (8, 0):
        return f"{gpu.name} has compute capability {gpu.arch[0]}.{gpu.arch[1]}; Triton compiles for 8.0 and newer"
    needed = SHARED_KIB[family_of(gpu)]
    if gpu.shared_bytes is not None and gpu.shared_bytes < 1024 * needed:
        has = f"{gpu.shared_bytes // 1024} KiB of shared memory a program"
        return f"{gpu.name} has {has}; the kernels for such a GPU need {needed} KiB"
    return None


@functools.cache
def processors_of(device: torch.device) -> int:
    """SMs (on AMD, compute units) of `device`."""
    if device.type != "cuda":
        return 2  # the interpreter runs programs one after another; two still exercise the sum over programs
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_bytes_of(device: torch.device) -> int:
    """Shared memory that one program may use on every GPU of the family of `device`."""
    return 1024 * SHARED_KIB[arch_of(device)]


def processors_of_family(device: torch.device) -> int:
    """SMs (on AMD, compute units) of a large GPU of the family of `device`, the same for every GPU of the family."""
    return SMS[arch_of(device)]


def lanes_of(device: torch.device) -> int:
    """Threads in a warp of `device`: 32, and 64 on AMD's CDNA."""
    if arch_of(device) != "gfx942":
        return 32
    return gpu_of(device).lanes if device.type == "cuda" else 64  # a CPU tensor stands for gfx942 in the compile gate
