"""Estimates of our ops: the launches that a call makes, compiled, and put through the models.

An estimate is of the kernels alone, one after another. What a timed call takes beside them is added by `timed`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from bench.attention_options import attention_options
from bench.estimate import ROW_OPS, attention, memory
from bench.estimate.constants import Gpu
from bench.estimate.constants import attention as attention_constants
from bench.estimate.constants import memory as memory_constants
from bench.estimate.errors import error_of
from bench.estimate.kernels import Kernel, compiled
from bench.estimate.result import Estimate, new_name, together
from bench.estimate.tiles import Shape
from bench.works.norms import AddRMSNorm, RMSNorm
from bench.works.rotations import QKNormRope, Rope, RopeQKV
from bench.works.work import Work
from llama_kernels.core.registry import KERNELS

_BF16 = torch.bfloat16


def timed(made: Estimate) -> Estimate:
    """The time of the call between two events, as public figures are measured: the kernels' and what is around them."""
    return dataclasses.replace(made, seconds=made.seconds + memory_constants().call)


# --- rows and heads --------------------------------------------------------------------------------------------------


def work_estimate(gpu: Gpu, work: Work, direction: str) -> Estimate:
    """The time of RMSNorm, add + RMSNorm, RoPE, qk-norm + RoPE, or RoPE of a packed projection.

    Raises:
        ValueError: `work` is of another op, or has no such direction.
    """
    launch = _launcher(work, direction)
    if launch is None:
        raise ValueError(f"{work.op} {direction}: no estimate; there are those of {', '.join(ROW_OPS)}")
    parts: dict[str, Estimate] = {}
    kernels = compiled(gpu.family, launch, gpu)
    for i, kernel in enumerate(kernels):
        bytes_, written = _bytes(kernel, work, direction, kernels[max(i - 1, 0)].grid[-1])
        walk = _walk(kernel, bytes_, written)
        again = _read_again(gpu, kernel, work)
        name = new_name(parts, kernel.name.removesuffix("_kernel"))
        # No peer's loop over rows that loads ahead has a published speed.
        kind = "rows that are loaded ahead" if "backward" in kernel.name else "rows"
        parts[name] = _with_launch(memory.estimate(gpu, kernel, bytes_ + again, walk, kind), bool(parts))
    return together(parts)


def _with_launch(made: Estimate, further: bool) -> Estimate:
    return dataclasses.replace(made, seconds=made.seconds + attention_constants().launch) if further else made


def _launcher(work: Work, direction: str) -> Callable[[], object] | None:
    backward = direction == "backward"
    if isinstance(work, RMSNorm):
        x, weight = torch.empty(work.M, work.N, dtype=work.dtype), torch.empty(work.N, dtype=work.dtype)
        other = x if isinstance(work, AddRMSNorm) else None
        if not backward:
            return lambda: KERNELS["rms_norm_forward"](x, other, weight, 1e-6, 0.0)
        rstd = torch.empty(work.M, 1)
        return lambda: KERNELS["rms_norm_backward"](x, other, x, weight, rstd, 1e-6, 0.0, work.dtype, True, True)
    if not isinstance(work, Rope) or work.op not in ROW_OPS:
        return None
    q, k = (torch.empty(work.B, work.S, H, work.D, dtype=work.dtype).transpose(1, 2) for H in (work.Hq, work.Hkv))
    angles = (torch.empty(work.S, work.D // 2), torch.empty(work.S, work.D // 2), None)
    if isinstance(work, QKNormRope):
        weights = (torch.empty(work.D, dtype=work.dtype),) * 2
        rest = (*weights, *angles, 1e-6, 0.0, False)
        if not backward:
            return lambda: KERNELS["qk_norm_rope"](q, k, *rest)
        return lambda: KERNELS["qk_norm_rope_backward"](q, k, q, k, *rest, True)
    if isinstance(work, RopeQKV) and backward:
        return lambda: KERNELS["rope_qkv_backward"](q, k, k, *angles, False)
    if isinstance(work, RopeQKV):  # q and k are views of the projection
        q, k, _ = work.split(torch.empty(work.B, work.S, (work.Hq + 2 * work.Hkv) * work.D, dtype=work.dtype))
    return lambda: KERNELS["rope"](q, k, *angles, False, backward)


def _bytes(kernel: Kernel, work: Work, direction: str, programs: int) -> tuple[float, float]:
    """That one launch of a call moves to and from DRAM, and those of them that it writes. programs: of the launch
    before, each of which left a row of partial sums."""
    if kernel.name == "sum_partials_kernel":
        N = work.N if isinstance(work, RMSNorm) else work.D if isinstance(work, Rope) else 0
        return (4.0 * programs + 2.0) * N, 2.0 * N
    if kernel.name == "rms_norm_weight_grad_kernel" and isinstance(work, RMSNorm):  # x and dy
        written = 4.0 * kernel.grid[-1] * work.N
        return 4.0 * work.M * work.N + written, written
    total = float(work.bytes(direction))
    outputs = {"rms_norm backward": 1 / 3, "add_rms_norm backward": 1 / 4, "qk_norm_rope backward": 1 / 3}
    return total, total * outputs.get(f"{work.op} {direction}", 1 / 2)


def _walk(kernel: Kernel, bytes_: float, written: float) -> memory.Walk:
    """How often the loops of a program run follows from what it writes, or, if no loop writes, from what it reads."""
    trips = memory.fitting_trips(kernel, bytes_ - written, written)
    stages = kernel.constants.get("STAGES", 1)
    ahead = stages - 1 if trips > 1 else 0
    return memory.Walk(trips, max(trips, 1.0), ahead)


def _read_again(gpu: Gpu, kernel: Kernel, work: Work) -> float:
    """Bytes that a forward over long rows reads twice from DRAM: all but the last step, unless the L2 still has it."""
    if kernel.name != "rms_norm_forward_kernel" or not isinstance(work, RMSNorm):
        return 0.0
    steps = -(-work.N // kernel.constants["BLOCK_N"])
    row = work.N * 2 * (steps - 1) / steps
    return row * work.M if row * gpu.sms * kernel.resident > 0.6 * gpu.l2 else 0.0


# --- attention -------------------------------------------------------------------------------------------------------


def attention_estimate(
    gpu: Gpu, shape: Shape, direction: str, hopper: bool = False, delta_apart: bool = False
) -> Estimate:
    """The time of a dense call in bfloat16 without options. hopper: by the Hopper kernels, where they compute it.

    delta_apart: as until 2026-11-27, when a launch of its own computed delta for the portable kernels too.
    """
    kernels = attention_kernels(gpu.family, shape.D, shape.group, shape.causal, direction, hopper)
    parts: dict[str, Estimate] = {}
    if delta_apart and kernels[0].name == "dq_kernel":
        parts["delta"] = _around(gpu, "delta", shape, hopper=False)
    for kernel in kernels:
        name = kernel.name.removesuffix("_kernel")
        if name in ("forward", "hopper_forward"):
            made = attention.forward(gpu, kernel, shape)
        elif name == "dq":
            first = 0.0 if delta_apart else attention.bytes_for_delta(kernel, kernels, shape.D)
            made = attention.dq(gpu, kernel, shape, first)
        elif name in ("dkdv", "hopper_backward"):
            made = attention.dkdv(gpu, kernel, shape)
        else:
            made = _around(gpu, name, shape, hopper)
        parts[new_name(parts, name)] = _with_launch(made, bool(parts))
    return together(parts)


def _around(gpu: Gpu, name: str, shape: Shape, hopper: bool) -> Estimate:
    """delta reads out and do; with the Hopper backward, which adds dq up, zeros are written before. round_sum reads
    that sum and writes dq."""
    elements = shape.B * shape.Hq * shape.S * shape.D
    a_byte = 1 / (gpu.copy * 1e9)
    bytes_ = {"delta": (4 + 4 * hopper) * elements, "round_sum": 6 * elements}[name]
    return Estimate(bytes_ * a_byte, "dram", error_of("rows", gpu.family))


@functools.cache
def attention_kernels(
    family: str, D: int, group: int, causal: bool, direction: str, hopper: bool = False
) -> list[Kernel]:
    """What a dense call launches, whatever its batch and length."""
    B, Hkv, S = 1, 2, 2048
    q, k, v = (torch.empty(B, S, H, D, dtype=_BF16).transpose(1, 2) for H in (Hkv * group, Hkv, Hkv))
    rest = attention_options(S, S, D**-0.5, right=0 if causal else None)
    lse = torch.empty(B, Hkv * group, S)
    gradients = (True, True, True, False, None)
    if direction == "forward":
        return compiled(family, lambda: KERNELS["attention_forward"](q, k, v, *rest), hopper=hopper)
    backward = KERNELS["attention_backward"]
    return compiled(family, lambda: backward(q, None, q, k, v, q, lse, *rest, *gradients), hopper=hopper)
