"""What an instruction takes of an SM: which pipe, for how long, and when its result is there.

Rates are of one of the four schedulers of an SM, in cycles for one warp; constants.json has them with their sources.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import NamedTuple

from bench.estimate.constants import sm_constants
from bench.estimate.sm.code import Instruction


@dataclasses.dataclass(frozen=True)
class Sm:
    """The rates of an SM of one family of GPUs."""

    tensor_flops: int  # a cycle and SM, in half precision
    float32: float
    alu: float
    mufu: float
    mufu_latency: float
    mufu_beside: float  # how many times as long an exponential takes beside an asynchronous product
    shared_bytes: int  # a cycle and SM
    shared_latency: float
    shuffle_latency: float
    global_latency: float  # of the L2
    product_latency: float  # from the end of an asynchronous product to the end of a wait for it
    product_change: float  # of the tensor cores, where a product does not add to the sum of the one before
    products_in_flight: int  # asynchronous, of an SM
    hmma: float  # an HMMA.16816
    hmma_latency: float
    barrier: float  # from the last arrival at a barrier to the first instruction after it
    mbarrier_test: float
    mbarrier_arrive: float

    @classmethod
    def of(cls, family: str) -> Sm:
        return cls(**sm_constants(family))


class Op(NamedTuple):
    """An instruction as the machine sees it. kind: product, wait (for products), copied (closes a group of copies),
    wait_copied, or other. left: of a wait, how many groups may be unfinished."""

    kind: str
    pipe: str = "issue"
    busy: float = 0.0  # cycles of the pipe
    latency: float = 25.0  # from its start to its result, where a scoreboard says when that is
    target: str = ""  # of a product: the first register of its sum
    closes: bool = False  # of a product: it is the last of a group
    left: int = 0


@functools.lru_cache(maxsize=4096)
def decoded(x: Instruction, sm: Sm) -> Op:
    text = x.text
    if text.startswith("HGMMA"):
        target = re.match(r"\S+\s+(\w+)", text)
        assert target  # for the type checker
        return Op("product", "tensor", product_cycles(text, sm), target=target[1], closes="gsb0" in text)
    if found := re.match(r"WARPGROUP\.DEPBAR\S*\s+gsb0,\s*0x(\w+)", text):
        return Op("wait", left=int(found[1], 16))
    if text.startswith("LDGDEPBAR"):
        return Op("copied", latency=sm.global_latency)
    if found := re.match(r"DEPBAR\.LE\s+SB0,\s*0x(\w+)", text):
        return Op("wait_copied", left=int(found[1], 16))
    return Op("other", *_use(x, sm))


def _use(x: Instruction, sm: Sm) -> tuple[str, float, float]:
    """Pipe, cycles of it, latency."""
    op = x.op
    if op.startswith("MUFU"):
        return "mufu", sm.mufu, sm.mufu_latency
    if op.startswith("HMMA"):
        return "tensor", sm.hmma if ".16816" in op else sm.hmma / 2, sm.hmma_latency
    if re.match(r"FFMA|FMUL|FADD|IMAD\.MOV|IMAD\.U32|HFMA2|HADD2|HMUL2", op):
        return "float32", sm.float32, 5
    if op.startswith("IMAD"):
        return "float32", 2 * sm.float32, 5
    if op.startswith("SHFL"):
        return "memory", 4, sm.shuffle_latency
    if re.match(r"LDSM?\b|STSM?\b|ATOMS", op):
        return "memory", _shared_bytes(x) * 4 / sm.shared_bytes, sm.shared_latency
    if op.startswith("LDGSTS"):
        return "memory", 512 * 4 / sm.shared_bytes, 20
    if re.match(r"LDG|LDL|STL|STG|RED|ATOM|LD\b|ST\b", op):
        return "memory", 8, sm.global_latency
    if op.startswith("SYNCS"):
        return "memory", 2, sm.mbarrier_test if "PHASECHK" in op else sm.mbarrier_arrive
    if op.startswith("U") and not op.startswith(("UTMA", "UBLK")):
        return "uniform", 2, 10
    if re.match(r"FMNMX|FSEL|FSET|ISETP|SEL|LOP3|IADD3|SHF|LEA|PRMT|PLOP3|V?IMNMX|VIADD|F2FP|MOV|ISET|P2R|R2P", op):
        return "alu", sm.alu, 5
    return "issue", 0, 25


def _shared_bytes(x: Instruction) -> int:
    """That one warp moves through the port of shared memory."""
    if "LDSM" in x.op or "STSM" in x.op:
        found = re.search(r"\.M\S*\.(\d)\b", x.op)
        return 128 * (int(found[1]) if found else 1)
    found = re.search(r"\.(64|128)(\.|$)", x.op)
    return 32 * (int(found[1]) // 8 if found else 4)


def product_cycles(text: str, sm: Sm) -> float:
    """The cycles of an asynchronous product of one warp group: those of the tensor cores, or of the port of shared
    memory if that takes longer to bring its operands.

    Raises:
        ValueError: `text` is not such a product.
    """
    found = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\S*\s+\w+,\s*(gdesc)?", text)
    if not found:
        raise ValueError(f"not an asynchronous product that the model knows: {text}")
    m, n, k = map(int, found.groups()[:3])
    operands = 2 * k * (n + (m if found[4] else 0))
    return max(2 * m * n * k / sm.tensor_flops, operands / sm.shared_bytes)
