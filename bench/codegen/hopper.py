"""The calls of the Hopper kernels that the compile gate compiles, and the rules for their loops.

A loop over blocks must not spill, mask blocks that need no mask, wait for the tensor cores in the softmax, or compute a
product twice. Each of these makes a kernel slow without changing its results. hopper_loops.py shows the loops.
"""

from __future__ import annotations

import collections
import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.attention_options import attention_options
from bench.codegen import sass
from bench.codegen.compiling import Case
from llama_kernels import hopper_attention
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops.attention import dispatch
from llama_kernels.ops.attention.call import AttentionCall, Wanted
from llama_kernels.ops.attention.hopper.tables import TILES, HopperTile

SHOWN = (
    *("HGMMA", "MUFU.EX2", "FFMA", "FMUL", "FADD", "FMNMX", "F2FP"),
    *("PRMT", "ISETP", "FSEL", "BAR.SYNC", "LDL", "STL"),
)
SPILL_WHERE_OFF = 8  # bytes: two registers, of the 240 of a thread


# --- what is compiled ------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Each row of the table of tiles, causal and with all options; other combinations only with --full."""
    for D in (64, 128, 256, 80, 96, 192):
        for options in ((), ("causal",), ("causal", "window"), ("causal", "packed"), ("causal", "softcap"),
                        ("causal", "window", "softcap", "sinks", "packed"), ("causal", "start"),
                        ("causal", "start", "end"), ("causal", "end", "packed"), ("end",),
                        ("causal", "window", "softcap", "sinks", "packed", "start", "end")):  # fmt: skip
            few = options in (("causal",), ("causal", "start")) or len(options) > 2
            label = " ".join((f"D={D} bfloat16", *options))
            full = not few or D not in (64, 128, 256)
            yield Case("hopper", label, functools.partial(_attention, D, options), full, only="sm_90")
    rotated = functools.partial(_attention, 128, ("causal", "rotated"))
    yield Case("hopper", "D=128 bfloat16 causal rotated", rotated, only="sm_90")


def _attention(D: int, options: tuple[str, ...]) -> None:
    """Forward and backward as on a Hopper GPU. A pass that the package leaves to the portable kernels is skipped."""
    B, Hq, Hkv, S = 2, 8, 2, 512
    q, k, v = (torch.empty(B, S, H, D, dtype=torch.bfloat16).transpose(1, 2) for H in (Hq, Hkv, Hkv))
    lse, cu_seqlens = torch.empty(B, Hq, S), None
    if "packed" in options:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        lse, cu_seqlens = lse[0], torch.zeros(3, dtype=torch.int32)
    sinks = torch.empty(Hq) if "sinks" in options else None
    left, right = 64 if "window" in options else None, 0 if "causal" in options else None
    softcap = 30.0 if "softcap" in options else None
    bound = torch.zeros(S, dtype=torch.int32) if "packed" in options else torch.zeros(B, S, dtype=torch.int32)
    rest = attention_options(
        S, S, 0.1, sinks=sinks, kv_start=bound if "start" in options else None,
        kv_end=bound if "end" in options else None, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, softcap=softcap,
        left=left, right=right,
    )  # fmt: skip
    with mock.patch.object(dispatch, "arch_of", lambda _: "sm_90"), hopper_attention(), warnings.catch_warnings():
        warnings.filterwarnings("error", "llama_kernels: ")  # the package only warns if a kernel does not compile
        KERNELS["attention_forward"](q, k, v, *rest)
        if "rotated" in options:
            tables = (torch.empty(S, D // 2), torch.empty(S, D // 2), None)
            gradients = (True, True, True, False, False)
            call = (q, None, q, k, v, q, lse, None, None, None, *tables, False, *rest[-4:])
            KERNELS["rope_attention_backward"](*call, *gradients)
            return
        wanted = Wanted(True, True, True, sinks is not None, False)
        if dispatch.backward(AttentionCall(q, k, v, *rest), q, wanted).tile is not None:
            KERNELS["attention_backward"](q, None, q, k, v, q, lse, *rest, *wanted)


# --- reading loops ---------------------------------------------------------------------------------------------------


class Loop(NamedTuple):
    """One iteration of a loop with products, of one warpgroup."""

    instructions: int
    mix: dict[str, int]
    tensor_cycles: int  # cycles of the SM for its products, at 4096 FLOPs a cycle
    covered: float  # share of the exponentials that are issued while a product is running


def loops(cubin: bytes) -> list[Loop]:
    """The innermost loops with products, in the order of the machine code."""
    return [_loop(body) for body in sass.innermost(*sass.instructions(sass.disassembled(cubin)), "HGMMA")]


def _loop(body: list[str]) -> Loop:
    mix: collections.Counter[str] = collections.Counter()
    cycles = 0
    for instruction in body:
        op = instruction.split()[0]
        if product := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):
            m, n, k = map(int, product.groups())
            cycles += 2 * m * n * k // sass.PROCESSORS["sm_90"].tensor_flops
        mix[next((shown for shown in SHOWN if op.startswith(shown)), op.split(".")[0])] += 1
    return Loop(len(body), dict(mix), cycles, sass.covered(body))


# --- rules -----------------------------------------------------------------------------------------------------------


def faults(kernel: str, label: str, compiled: Any) -> list[str]:
    """The faults of a Hopper kernel, in addition to those that reading.py finds in any kernel."""
    found = loops(compiled.asm["cubin"])
    wrong = [] if found else ["no loop that multiplies on tensor cores"]
    ptx = compiled.asm["ptx"]
    for what, needed in (("cp.async.bulk.tensor", "the copy engine"), ("setmaxnreg", "registers moved to consumers")):
        if what not in ptx:
            wrong.append(f"without {needed}")
    pass_, tile = _tile(kernel, label)
    # The forward has two products of 64 rows and BLOCK_N keys, the backward five of 64 keys and BLOCK_M rows.
    products, across = (2, tile.BLOCK_N) if pass_ == "forward" else (5, tile.BLOCK_M)
    wanted = products * 2 * 64 * across * tile.width // 4096
    if any(loop.tensor_cycles != wanted for loop in found):
        wrong.append(f"tensor cores busy for {[loop.tensor_cycles for loop in found]} cycles, not {wanted}")
    # With softcap, the backward has the exponentials of tanh too, which come before any product.
    if any(loop.covered < 0.9 for loop in found) and (pass_ == "forward" or "softcap" not in label):
        wrong.append(f"{min(loop.covered for loop in found):.0%} of the exponentials under a product, wanted 90%")
    plain = min(found, key=lambda loop: loop.instructions, default=None)
    if plain and "softcap" not in label and plain.mix.get("FSEL", 0):
        wrong.append("a select in the unmasked loop")
    if any(loop.mix.get(op, 0) for loop in found for op in ("LDL", "STL")):
        wrong.append(sass.LOCAL_MEMORY)
    return wrong


def spill_limit(kernel: str, label: str) -> int:
    """Bytes that a Hopper kernel may spill outside of its loops.

    A kernel whose record was made with another release of Triton than the installed one is off by default: dispatch
    chooses it only within `hopper_attention()`. It may spill SPILL_WHERE_OFF bytes. Any other may not spill.
    """
    _, tile = _tile(kernel, label)
    return SPILL_WHERE_OFF if tile.record is not None and not tile.measured else 0


def _tile(kernel: str, label: str) -> tuple[str, HopperTile]:
    """The pass of a kernel, and its tile in the case with this label."""
    pass_, D = re.match(r"hopper_(\w+)_kernel", kernel)[1], int(re.search(r"D=(\d+)", label)[1])
    return pass_, next(tile for tile in TILES[pass_] if tile.width >= D)
