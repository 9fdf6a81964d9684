"""Which kernel runs for each op on each device, forward and backward, and why: as data."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import torch

from llama_kernels import reference
from llama_kernels.core.device import arch_of
from llama_kernels.core.language import HAS_TRITON, INTERPRETED
from llama_kernels.diagnose.cases import CASES
from llama_kernels.diagnose.environment import attempted
from llama_kernels.ops.attention import dispatch
from llama_kernels.ops.attention.hopper import hopper_attention
from llama_kernels.ops.attention.tables import PASSES, WIDTHS, tile

_DTYPES = {"bfloat16, float16": torch.bfloat16, "float32": torch.float32}


def kernels(family: str | None = None) -> dict[str, Any]:
    """What runs where. `family`: show the tiles of this family of GPUs instead of those of the GPUs present."""
    families = [family] if family else families_here()
    return {
        "CPU tensors": cpu_path(),
        "GPU tensors": gpu_path(),
        "ops": ops(),
        "attention": {name: attempted(functools.partial(attention, name)) for name in families},
    }


def cpu_path() -> dict[str, str]:
    """What CPU tensors run, and why."""
    if not HAS_TRITON:
        return {"runs": "reference", "why": "plain PyTorch; Triton is not installed"}
    if INTERPRETED:
        return {"runs": "interpreted", "why": "TRITON_INTERPRET=1: the kernels run in Triton's interpreter, for tests"}
    return {"runs": "reference", "why": "plain PyTorch; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter"}


def gpu_path() -> dict[str, str]:
    """What CUDA and HIP tensors run, and why. "GPUs" of the environment says if one GPU is not supported."""
    if not HAS_TRITON:
        return {"runs": "nothing", "why": "Triton is not installed; calls raise, llama_kernels.reference works"}
    if INTERPRETED:
        return {"runs": "interpreted", "why": "TRITON_INTERPRET=1: tensors are copied to the CPU and back; unset it"}
    if not sees_gpu():
        return {"runs": "nothing", "why": "torch sees no GPU"}
    return {"runs": "compiled", "why": "once for each dtype, head width and set of options; later calls use a cache"}


def sees_gpu() -> bool:
    """Whether torch sees a GPU. False if it raises: "GPUs" of the environment has the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.cuda.is_available()
        except Exception:
            return False


def families_here() -> list[str]:
    """The tile families of the GPUs present, each once. "GPUs" of the environment says why a GPU has none."""
    found: list[str] = []
    for i in range(torch.cuda.device_count() if sees_gpu() else 0):
        with contextlib.suppress(Exception):
            found.append(arch_of(torch.device("cuda", i)))
    return list(dict.fromkeys(found))


def ops() -> dict[str, dict[str, str]]:
    """Which kernels compute each op on a GPU."""
    with_gradient = {case.op for case in CASES if case.differentiable}
    kernels_of = dict.fromkeys(dispatch.OPS, "by the table below")
    return {
        name: {
            "forward": kernels_of.get(name, "portable"),
            "backward": kernels_of.get(name, "portable") if name in with_gradient else "none: for inference",
        }
        for name in reference.__all__
    }


def attention(family: str) -> dict[str, Any]:
    """The tiles of the portable kernels by dtype, pass and head width; and which kernel runs, and why."""
    portable = {
        names: {pass_: [str(tile(family, pass_, width, dtype)) for width in WIDTHS] for pass_ in PASSES}
        for names, dtype in _DTYPES.items()
    }
    return {"widths": [f"D <= {width}" for width in WIDTHS], "portable": portable, "choices": choices(family)}


def choices(family: str) -> dict[str, dict[str, str]]:
    """The kernel that runs now and the one inside `hopper_attention()`, by pass and head width, in half precision."""
    found = {}
    for pass_ in ("forward", "backward"):
        for width in WIDTHS:
            now = dispatch.for_heads(pass_, family, width)
            with hopper_attention():
                switched_on = dispatch.for_heads(pass_, family, width)
            found[f"{pass_}, D <= {width}"] = {"now": str(now), "with hopper_attention()": str(switched_on)}
    decoding = dispatch.for_heads("forward", family, WIDTHS[0], Sq=1)
    for name, choice in (("decoding", decoding), ("decoding, key mask", dispatch.MASKED_DECODE)):
        found[name] = {"now": str(choice), "with hopper_attention()": str(choice)}
    return found
