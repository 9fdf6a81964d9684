"""The time of attention kernels: the model of one SM for the steps of their loops, put together over tiles and SMs.

The steps of a loop come from `bench.estimate.sm`. A tile takes its steps and a fixed time for its start and end.
Programs start in order as SMs come free. Under load a GPU lowers its clock, by the share of the tensor cores' rate that
is in use.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from bench.estimate import tiles as tiling
from bench.estimate.constants import Gpu, attention
from bench.estimate.errors import error_of
from bench.estimate.kernels import Kernel
from bench.estimate.result import Estimate, together
from bench.estimate.sm.code import loops
from bench.estimate.sm.machine import Result, run
from bench.estimate.sm.pipes import Sm
from bench.estimate.tiles import Shape, Tile

_PRODUCT = "HGMMA|HMMA"


@functools.lru_cache(maxsize=256)
def steps_of(kernel: Kernel, programs: int) -> tuple[Result, Result]:
    """A step of the loop without a mask and of the loop with one, `programs` programs on an SM. With one loop they are
    the same."""
    bodies = loops(kernel.code, _PRODUCT)
    if not bodies:
        raise ValueError(f"{kernel.name} has no loop around products, so it is not a kernel of attention")
    if kernel.specialised:  # each warp group has code of its own, in the same order
        each = len(bodies) // 2
        pairs = [list(pair) for pair in zip(bodies[:each], bodies[each:], strict=True)]
    else:
        pairs = [[body] * max(kernel.warps // 4, 1) for body in bodies]
    pairs.sort(key=lambda bodies: len(bodies[0]))
    sm = Sm.of(kernel.family)
    plain = run([pairs[0]] * programs, sm)
    return plain, run([pairs[-1]] * programs, sm) if len(pairs) > 1 else plain


def kernel_estimate(
    gpu: Gpu, kernel: Kernel, tiles: Sequence[Tile], *, flops: float, l2_bytes: float, kind: str, reduced: float = 0.0,
    empty: int = 0, first: float = 0.0,
) -> Estimate:  # fmt: skip
    """The time of one launch. flops: that the tensor cores execute for the visible pairs. l2_bytes: that the SMs read.
    reduced: bytes that are added to sums in the L2. empty: programs without work. kind: whose error is stated, as in
    errors.json. first: bytes that a tile loads before its steps, at its SM's share of the bandwidth of memory, during
    which the SM does nothing else."""
    programs = min(kernel.resident, max(1, round(kernel_programs(tiles) / gpu.sms)))
    plain, masked = steps_of(kernel, programs)
    fixed = attention().tile + first * gpu.sms * gpu.clock / gpu.copy
    costs = [(t.plain * plain.step + t.masked * masked.step + fixed, t.count) for t in tiles]
    alone = tiling.cycles(costs, gpu.sms * programs)
    busy = tiling.cycles([*costs, (attention().empty, empty)], gpu.sms * programs)
    clock = clock_under(gpu, flops, busy) * 1e9
    limits = {
        "empty" if busy > 2 * alone else plain.limit: busy / clock,
        "l2": l2_bytes / (gpu.l2_rate_together * gpu.sms * clock),
        "reduce": reduced / (attention().reduce * gpu.sms * 1e9),
    }
    limit = max(limits, key=limits.__getitem__)
    idle = (busy - alone) / clock if limits[limit] == busy / clock else 0.0
    return Estimate(limits[limit], limit, error_of(kind, gpu.family), empty=idle, kind=kind)


def kernel_programs(tiles: Sequence[Tile]) -> int:
    return sum(t.count for t in tiles)


def clock_under(gpu: Gpu, flops: float, cycles: float) -> float:
    """GHz that `gpu` holds while it executes `flops` in `cycles`: the full clock up to a share of the tensor cores'
    rate, then less in proportion, down to the loaded clock at the full rate."""
    share = flops / (cycles * gpu.sms * Sm.of(gpu.family).tensor_flops)
    beyond = max(share - attention().unloaded, 0.0) / (1 - attention().unloaded)
    return gpu.clock - beyond * (gpu.clock - gpu.loaded_clock)


def forward(gpu: Gpu, kernel: Kernel, shape: Shape, kind: str = "") -> Estimate:
    """The time of a forward's kernel, without what a call takes around it."""
    BLOCK_M, BLOCK_N = kernel.tile
    tiles = tiling.of_rows(shape, BLOCK_M, BLOCK_N, shape.B * shape.Hq)
    read = tiling.steps(tiles) * BLOCK_N * shape.D * 2 * 2
    kind = kind or _kind(kernel, "forward")
    return kernel_estimate(gpu, kernel, tiles, flops=shape.flops, l2_bytes=read, kind=kind)


def bytes_for_delta(kernel: Kernel, launched: Sequence[Kernel], D: int) -> float:
    """That a tile of dq loads before its steps beside q and do: its rows of the forward's output, for delta.

    0 for another kernel, and where delta has a launch of its own among those `launched`.
    """
    if kernel.name != "dq_kernel" or any(each.name == "delta_kernel" for each in launched):
        return 0.0
    return 2.0 * kernel.tile[0] * D


def dq(gpu: Gpu, kernel: Kernel, shape: Shape, first: float) -> Estimate:
    """The time of the kernel of dq. first: as in `kernel_estimate`."""
    BLOCK_M, BLOCK_N = kernel.tile
    tiles = tiling.of_rows(shape, BLOCK_M, BLOCK_N, shape.B * shape.Hq)
    read = tiling.steps(tiles) * BLOCK_N * shape.D * 2 * 2
    kind = _kind(kernel, "backward")
    return kernel_estimate(gpu, kernel, tiles, flops=shape.flops * 1.5, l2_bytes=read, kind=kind, first=first)


def dkdv(gpu: Gpu, kernel: Kernel, shape: Shape) -> Estimate:
    """The time of the portable kernel of dk and dv, or of a Hopper backward, which adds dq up in the L2 too."""
    BLOCK_M, BLOCK_N = kernel.tile
    tiles = tiling.of_keys(shape, BLOCK_M, BLOCK_N, shape.B * shape.Hkv, shape.group)
    steps = tiling.steps(tiles)
    products = 2.5 if kernel.specialised else 2.0
    # Where the warp groups do not share dq, each adds all of it.
    adding = 1 if kernel.constants.get("SHARED") else 2  # warp groups
    reduced = steps * BLOCK_M * shape.D * 4 * adding if kernel.specialised else 0.0
    read = steps * BLOCK_M * shape.D * 2 * 2
    kind = _kind(kernel, "backward")
    return kernel_estimate(gpu, kernel, tiles, flops=shape.flops * products, l2_bytes=read, kind=kind, reduced=reduced)


def _kind(kernel: Kernel, direction: str) -> str:
    return f"attention {direction}" + (", specialised" if kernel.specialised else "")


def flash_backward(gpu: Gpu, kernel: Kernel, shape: Shape) -> Estimate:
    """The time of FlashAttention's backward: delta and zeros, a pass that adds dq up in the L2, and its rounding."""
    BLOCK_M, BLOCK_N = kernel.tile
    tiles = tiling.of_keys(shape, BLOCK_M, BLOCK_N, shape.B * shape.Hkv, shape.group)
    steps = tiling.steps(tiles)
    moved = steps * BLOCK_M * shape.D
    kind = "attention backward, specialised"
    one_pass = kernel_estimate(
        gpu, kernel, tiles, flops=shape.flops * 2.5, l2_bytes=moved * 4, kind=kind, reduced=moved * 4
    )
    return together({"one pass": one_pass, "delta, zeros and rounding of dq": around_backward(gpu, shape)})


def around_backward(gpu: Gpu, shape: Shape) -> Estimate:
    """The time of what is around a one-pass backward: out and do are read, dq's float32 sum is zeroed, read and
    rounded. Two further launches."""
    elements = shape.B * shape.Hq * shape.S * shape.D
    return Estimate(14 * elements / (gpu.copy * 1e9) + 2 * attention().launch, "dram", error_of("rows", gpu.family))
