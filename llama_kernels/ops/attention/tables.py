"""The tiles of the attention kernels: a row for each GPU family and pass, with its reason.

A row holds the tiles for heads up to 64, 128 and 256 wide; wider heads have tables of their own. Nothing is tuned at
run time: a call has the same tile on every machine of a family and in every batch, so that its results repeat bit for
bit. `python -m bench.codegen` compiles every row and fails on a spill.

At the end, `tile_for` says which tile of its row each pass of a call takes, and why.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from llama_kernels.core.checks import message
from llama_kernels.core.device import arch_of
from llama_kernels.core.language import TRITON_VERSION
from llama_kernels.ops.attention.call import AttentionCall


@dataclass(frozen=True)
class Tile:
    """The tile of a pass, how it is launched, and the tiles that take its place where a call needs more registers."""

    BLOCK_M: int  # query rows
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int
    split: bool = False  # dk and dv, or the columns of dq, in several launches, since one program cannot hold them
    columns: int = 512  # of dq, in one of the launches of a split
    computes_delta: bool = True  # dq, in half precision and without a split
    # The tiles in place of this one. `tile_for` says which calls take them.
    for_options: Tile | None = None  # options that take registers
    for_prefix: Tile | None = None  # kv_prefix, whose two loops more take registers
    spare_registers: bool = False  # of dq: for a packed batch and for an inverse rotation, which otherwise are options
    # From Triton `since` on, whose code for this tile spills or waits. The newer tile may have a newer one too.
    newer: Tile | None = None
    since: tuple[int, int] = (3, 8)

    @functools.cached_property
    def launch_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")}

    def __str__(self) -> str:
        return f"{self.BLOCK_M} x {self.BLOCK_N}, {self.num_warps}, {self.num_stages}" + ", split" * self.split


# For the forward on sm_90, at width 256. From Triton 3.7 on, two stages of 32 keys spill 8 bytes or more with a prefix.
# Under Triton 3.9, 64 keys spill 8 bytes.
_WIDEST_FORWARD = Tile(128, 64, 8, 2, for_options=Tile(128, 32, 8, 2))
_WIDEST_FORWARD_3_7 = replace(
    _WIDEST_FORWARD,
    for_prefix=Tile(128, 32, 8, 3),
    newer=replace(
        _WIDEST_FORWARD,
        for_prefix=Tile(128, 16, 8, 3),
        newer=Tile(128, 32, 8, 3, for_options=Tile(128, 32, 8, 2), for_prefix=Tile(128, 16, 8, 3)),
        since=(3, 9),
    ),
)

# For dk and dv on sm_90, at width 128.
_FEW_ROWS = Tile(32, 128, 8, 2)

# For dq on sm_90, at widths 128 and 256.
_DQ = Tile(128, 64, 8, 3, spare_registers=True, for_options=Tile(128, 64, 8, 2))
# Under Triton 3.9 a prefix spills 8 bytes with 64 keys.
_DQ_3_9 = replace(_DQ, for_prefix=Tile(128, 32, 8, 3))
_WIDER_DQ = Tile(128, 32, 8, 3, spare_registers=True, for_options=Tile(128, 32, 8, 1))
# Under Triton 3.8, computing delta beside all options spills 56 bytes, and 8 bytes where q and k are rotated too. With
# two stages kv_start spills 8 bytes.
_WIDER_DQ_3_8 = replace(
    _WIDER_DQ,
    for_options=Tile(128, 16, 8, 3, computes_delta=False),
    for_prefix=Tile(32, 32, 4, 2),
    newer=_WIDER_DQ,
    since=(3, 9),
)

# In the forward on sm_80, at width 64.
_AMPERE_FORWARD_3_8 = Tile(128, 64, 8, 3, for_options=Tile(128, 64, 8, 2))
# In dq on sm_80, at width 128. With all options there are two registers too few to compute delta. From Triton 3.8 on,
# an inverse rotation and a packed batch take registers too.
_FEWER_KEYS_DQ = Tile(64, 64, 8, 2)
_DQ_WITHOUT_DELTA = Tile(64, 128, 8, 2, computes_delta=False, for_options=_FEWER_KEYS_DQ)
_AMPERE_DQ = Tile(64, 128, 8, 2, spare_registers=True, for_prefix=_FEWER_KEYS_DQ, for_options=_DQ_WITHOUT_DELTA)
_AMPERE_DQ_3_8 = Tile(64, 128, 8, 2, for_options=_FEWER_KEYS_DQ)
# In the forward on sm_100, at width 256. From Triton 3.8 on, 128 rows spill with options that take registers.
_BLACKWELL_FORWARD_3_8 = Tile(128, 32, 8, 4, for_options=Tile(64, 32, 8, 4))
# In dq on sm_100, at width 256, with options that take registers, and with them and an inverse rotation.
_BLACKWELL_DQ = Tile(64, 32, 4, 1, for_options=Tile(64, 32, 8, 1))
_BLACKWELL_DQ_3_8 = Tile(64, 64, 8, 1, for_options=Tile(64, 32, 8, 1))

# For dk and dv on sm_80, at width 256.
_ONE_STAGE_DKDV = Tile(32, 64, 4, 1, split=True)

# In dq on sm_86, at width 256, with options that take registers. With an inverse rotation two stages spill 16 bytes
# under Triton 3.9.
_CONSUMER_DQ_3_9 = Tile(32, 32, 4, 2, for_options=Tile(32, 32, 4, 1))

# In dq on gfx942, at width 256. From Triton 3.7 on, 64 keys spill 88 to 1,080 bytes.
_CDNA_DQ_3_7 = Tile(64, 32, 4, 1, for_options=Tile(32, 32, 4, 1))

# bfloat16 and float16. Each row has, of the tiles that compile without a spill under every option, the one that reads
# least from L2 for its tensor-core work: the largest, and of two such the one with more stages.
_HALF = {
    # The tiles of Hopper are the fastest of 5 to 12 that an H100 timed in each pass (docs/lab/2026-11-27-first_gpu.md),
    # but for dq at width 256, whose third stage was not timed (docs/lab/2026-11-28-wide_backward.md).
    ("sm_90", "forward"): (
        Tile(128, 64, 4, 3, for_options=Tile(128, 64, 8, 2)),
        Tile(128, 64, 8, 3, for_options=Tile(128, 64, 8, 2)),
        replace(_WIDEST_FORWARD, newer=_WIDEST_FORWARD_3_7, since=(3, 7)),
    ),
    # Under Triton 3.9 the addresses of a second stage spill 40 bytes with all options on. Triton 3.8 alone spills 56 to
    # 168 bytes with options that take registers, at widths 128 and 256.
    ("sm_90", "dq"): (
        Tile(64, 64, 4, 3, spare_registers=True, for_options=Tile(128, 64, 8, 2)),
        replace(_DQ, newer=replace(_DQ, for_options=Tile(128, 64, 8, 1), newer=_DQ_3_9, since=(3, 9))),
        replace(_WIDER_DQ, for_options=Tile(128, 32, 8, 2), newer=_WIDER_DQ_3_8),
    ),
    # dk and dv are the larger accumulators. At width 128 a program keeps 128 keys and streams the rows in blocks of 64:
    # with 32, k @ q^T waits for its operands. They spill up to 56 bytes, with at most one access in the loop; with
    # softcap and more, up to 104 bytes.
    ("sm_90", "dkdv"): (
        Tile(64, 64, 4, 3),
        Tile(64, 128, 8, 3, for_options=_FEW_ROWS),
        Tile(64, 128, 8, 1, split=True, for_options=Tile(32, 128, 8, 2, split=True)),
    ),
    # Ampere has no asynchronous products: q stays in registers, which limits the keys of a step.
    # In the forward three stages hide the copies, and four warps at width 64 leave room for a second program on an SM.
    # From Triton 3.8 on, four warps spill at width 64, and three stages of 64 keys at width 128.
    ("sm_80", "forward"): (
        Tile(128, 64, 4, 3, for_options=Tile(128, 64, 8, 2), newer=_AMPERE_FORWARD_3_8),
        Tile(128, 64, 8, 3, for_options=Tile(128, 32, 8, 3), newer=Tile(128, 32, 8, 3)),
        Tile(32, 32, 4, 3),
    ),
    ("sm_80", "dq"): (
        Tile(128, 64, 8, 2),
        replace(_AMPERE_DQ, newer=_AMPERE_DQ_3_8),
        Tile(64, 64, 8, 2, for_options=Tile(64, 64, 8, 1)),
    ),
    # Four warps at width 256: eight warps, of 16 rows each, would share 64 keys and compute half of the scores twice.
    # Under Triton 3.9 two stages reload a register in each step.
    ("sm_80", "dkdv"): (
        Tile(32, 128, 8, 3),
        Tile(64, 64, 8, 3),
        Tile(32, 64, 4, 2, split=True, for_options=_ONE_STAGE_DKDV, newer=_ONE_STAGE_DKDV, since=(3, 9)),
    ),
    # Consumer GPUs: as Ampere, with 99 KiB of shared memory for each thread block.
    ("sm_86", "forward"): (
        Tile(128, 64, 8, 1),
        Tile(64, 32, 4, 3),
        Tile(32, 32, 4, 3, newer=Tile(32, 32, 4, 3, for_options=Tile(32, 32, 4, 2))),
    ),
    ("sm_86", "dq"): (
        Tile(128, 64, 8, 2),
        Tile(64, 64, 8, 2),
        Tile(32, 32, 4, 2, newer=Tile(32, 32, 4, 2, for_options=_CONSUMER_DQ_3_9), since=(3, 9)),
    ),
    ("sm_86", "dkdv"): (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 4, 1, split=True)),
    # Blackwell: one stage or four, since with two or three tl.dot has a race in Triton 3.6 and 3.7 (triton#10590).
    ("sm_100", "forward"): (
        Tile(128, 64, 8, 4, for_options=Tile(128, 128, 8, 1), newer=Tile(128, 64, 8, 4)),
        Tile(128, 64, 8, 4),
        Tile(128, 32, 8, 4, for_options=Tile(128, 32, 8, 1), newer=_BLACKWELL_FORWARD_3_8),
    ),
    ("sm_100", "dq"): (
        Tile(64, 64, 4, 4, for_options=Tile(128, 64, 8, 4)),
        Tile(128, 64, 8, 4),
        Tile(64, 64, 8, 1, for_options=_BLACKWELL_DQ, newer=_BLACKWELL_DQ_3_8),
    ),
    ("sm_100", "dkdv"): (Tile(64, 128, 8, 1), Tile(64, 128, 8, 1), Tile(64, 64, 8, 1)),
    # CDNA3 has 64 KiB of shared memory for each thread block and 512 registers for each thread.
    ("gfx942", "forward"): (
        Tile(128, 64, 8, 2),
        Tile(128, 64, 4, 1),
        Tile(64, 64, 4, 1, newer=Tile(64, 64, 4, 1, for_options=Tile(64, 32, 4, 1))),
    ),
    ("gfx942", "dq"): (
        Tile(64, 64, 4, 1),
        Tile(64, 64, 4, 1),
        Tile(64, 64, 4, 1, for_options=Tile(64, 32, 4, 1), newer=_CDNA_DQ_3_7, since=(3, 7)),
    ),
    ("gfx942", "dkdv"): (
        Tile(32, 128, 8, 1),
        Tile(16, 128, 8, 1),
        Tile(32, 64, 4, 1, newer=Tile(16, 64, 4, 1), since=(3, 7)),
    ),
    # Decoding waits for memory, so its at most 32 rows leave room for two or more programs on an SM, each of which
    # loads its next keys meanwhile. BLOCK_M is the largest; a call takes the power of two that holds its rows.
    # Under Triton 3.9 three stages spill 8 bytes on sm_90, at width 128 with all options. From 3.8 on, four warps spill
    # 16 bytes on sm_100 and 32 on sm_86.
    ("sm_90", "decode"): (
        Tile(32, 64, 4, 3),
        Tile(32, 64, 4, 3, newer=Tile(32, 64, 4, 2), since=(3, 9)),
        Tile(32, 64, 8, 2),
    ),
    ("sm_80", "decode"): (Tile(32, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 8, 2)),
    ("sm_86", "decode"): (
        Tile(32, 64, 4, 3),
        Tile(32, 64, 4, 2, newer=Tile(32, 64, 8, 2)),
        Tile(32, 32, 4, 2),
    ),
    ("sm_100", "decode"): (
        Tile(32, 64, 4, 4, newer=Tile(32, 64, 8, 4)),
        Tile(32, 64, 4, 4),
        Tile(32, 32, 8, 4),
    ),
    ("gfx942", "decode"): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 1)),
}

# float32 is multiplied without tensor cores: both operands pass through registers, which needs small tiles or many
# warps, and one stage. Each row has the largest tile that does not spill in the compile gate. (At other widths, or with
# all options at once, ten kernels spill 8 to 24 bytes: `python -m bench.codegen --full` names them.) On sm_80,
# Triton 3.9 gives a thread 64 registers where 3.6 gave 128: 64 x 64 at width 128 would spill 1,720 bytes, and 64 x 32
# in the forward 264.
_CONSUMER_FORWARD_3_7 = Tile(64, 64, 16, 1, for_prefix=Tile(64, 16, 16, 1))  # on sm_86, at width 128
_FLOAT32 = {
    ("sm_90", "forward"): (
        Tile(32, 32, 8, 1),
        Tile(64, 64, 16, 1, for_prefix=Tile(64, 16, 16, 1)),
        Tile(16, 32, 8, 1),
    ),
    ("sm_90", "dq"): (
        Tile(64, 32, 8, 1),
        Tile(64, 64, 16, 1, newer=Tile(64, 64, 16, 1, for_prefix=Tile(64, 32, 16, 1))),
        Tile(16, 32, 8, 1),
    ),
    ("sm_90", "dkdv"): (Tile(64, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1, split=True)),
    ("sm_80", "forward"): (
        Tile(32, 32, 4, 1),
        Tile(64, 64, 16, 1, newer=Tile(64, 16, 16, 1)),
        Tile(64, 16, 8, 1),
    ),
    ("sm_80", "dq"): (
        Tile(64, 32, 8, 1),
        Tile(64, 64, 16, 1, newer=Tile(64, 32, 16, 1)),
        Tile(64, 16, 8, 1),
    ),
    ("sm_80", "dkdv"): (Tile(64, 32, 16, 1), Tile(32, 16, 8, 1), Tile(64, 16, 8, 1, split=True)),
    ("sm_86", "forward"): (
        Tile(32, 64, 8, 1),
        Tile(64, 64, 16, 1, for_prefix=Tile(16, 32, 8, 1), newer=_CONSUMER_FORWARD_3_7, since=(3, 7)),
        Tile(16, 32, 8, 1),
    ),
    ("sm_86", "dq"): (
        Tile(64, 32, 8, 1),
        Tile(32, 64, 8, 1, newer=Tile(64, 32, 8, 1)),
        Tile(16, 32, 8, 1),
    ),
    ("sm_86", "dkdv"): (
        Tile(64, 32, 8, 1),
        Tile(64, 16, 8, 1, newer=Tile(32, 16, 8, 1), since=(3, 9)),
        Tile(32, 16, 8, 1, split=True),
    ),
    ("sm_100", "forward"): (Tile(16, 32, 4, 1), Tile(64, 64, 16, 1), Tile(16, 32, 8, 1)),
    ("sm_100", "dq"): (
        Tile(64, 32, 8, 1),
        Tile(64, 64, 16, 1, newer=Tile(64, 64, 16, 1, for_prefix=Tile(64, 32, 16, 1))),
        Tile(32, 16, 8, 1),
    ),
    ("sm_100", "dkdv"): (
        Tile(32, 64, 8, 1),
        Tile(64, 32, 8, 1, newer=Tile(16, 32, 8, 1)),
        Tile(32, 16, 8, 1, split=True),
    ),
    ("gfx942", "forward"): (
        Tile(64, 32, 8, 1),
        Tile(64, 32, 8, 1, newer=Tile(64, 32, 8, 1, for_prefix=Tile(64, 16, 8, 1))),
        Tile(64, 16, 8, 1),
    ),
    ("gfx942", "dq"): (Tile(64, 32, 8, 1), Tile(64, 16, 8, 1), Tile(16, 16, 4, 1)),
    ("gfx942", "dkdv"): (Tile(32, 64, 8, 1), Tile(16, 64, 8, 1), Tile(16, 32, 4, 1)),
    ("sm_90", "decode"): (
        Tile(32, 32, 16, 1, newer=Tile(32, 32, 8, 1), since=(3, 9)),
        Tile(32, 16, 8, 1),
        Tile(32, 32, 16, 1),
    ),
    ("sm_80", "decode"): (Tile(32, 32, 8, 1), Tile(32, 32, 16, 1), Tile(32, 32, 8, 1)),
    ("sm_86", "decode"): (Tile(32, 32, 8, 1), Tile(32, 32, 16, 1), Tile(32, 32, 16, 1)),
    ("sm_100", "decode"): (
        Tile(32, 16, 8, 1),
        Tile(32, 16, 8, 1),
        Tile(32, 32, 16, 1),
    ),
    ("gfx942", "decode"): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
}

# Heads up to 512 and 576 wide: Gemma 4's global layers, and multi-head latent attention with its projections absorbed.
# A tile has as few rows as the accumulators leave registers for, less than the warps cover, so that they compute some
# of the scores more than once. 576 columns take a tile of 1,024.
_WIDE_DKDV, _FEWER_KEYS = Tile(32, 64, 8, 1, split=True), Tile(32, 32, 8, 1, split=True)  # on sm_90
_WIDE_HALF = {
    # From Triton 3.7 on, 32 keys of 576 columns spill 16 bytes with all options and a prefix.
    ("sm_90", "forward"): (
        Tile(32, 64, 8, 1),
        Tile(32, 32, 8, 1, newer=Tile(32, 32, 8, 1, for_prefix=Tile(32, 16, 8, 1)), since=(3, 7)),
    ),
    ("sm_90", "dq"): (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, split=True)),
    # Triton 3.8 alone waits for each product where options take registers.
    ("sm_90", "dkdv"): (
        replace(_WIDE_DKDV, newer=replace(_WIDE_DKDV, for_options=_FEWER_KEYS, newer=_WIDE_DKDV, since=(3, 9))),
        Tile(16, 16, 8, 1, split=True),
    ),
    ("sm_90", "decode"): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    ("sm_80", "forward"): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    # With all options at once dq of 512 columns spills 8 bytes on sm_80.
    ("sm_80", "dq"): (
        Tile(32, 32, 8, 1),
        Tile(16, 16, 8, 1, split=True, for_options=Tile(32, 16, 8, 1, split=True, columns=256)),
    ),
    ("sm_80", "dkdv"): (Tile(32, 32, 8, 1, split=True), Tile(16, 16, 8, 1, split=True)),
    ("sm_80", "decode"): (Tile(32, 16, 8, 2), Tile(32, 32, 8, 1)),
    ("sm_86", "forward"): (Tile(32, 32, 8, 1),),
    ("sm_86", "dq"): (Tile(32, 16, 8, 1),),
    ("sm_86", "dkdv"): (Tile(16, 32, 8, 1, split=True),),
    ("sm_86", "decode"): (Tile(32, 32, 8, 1),),
    ("sm_100", "forward"): (Tile(32, 64, 8, 1), Tile(32, 32, 8, 1)),
    ("sm_100", "dq"): (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, split=True)),
    ("sm_100", "dkdv"): (Tile(32, 64, 8, 1, split=True), Tile(16, 16, 8, 1, split=True)),
    ("sm_100", "decode"): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    ("gfx942", "forward"): (Tile(32, 16, 8, 1),),
    ("gfx942", "dq"): (Tile(16, 16, 4, 1),),
    ("gfx942", "dkdv"): (Tile(16, 32, 4, 1, split=True),),
    ("gfx942", "decode"): (Tile(32, 16, 8, 1),),
}
_WIDE_FLOAT32 = {
    ("sm_90", "forward"): (Tile(16, 16, 8, 1),),
    ("sm_90", "dq"): (Tile(16, 16, 8, 1),),
    ("sm_90", "dkdv"): (Tile(16, 16, 8, 1, split=True),),
    ("sm_90", "decode"): (Tile(32, 16, 16, 1),),
    ("sm_80", "forward"): (Tile(32, 16, 16, 1),),
    ("sm_80", "dq"): (Tile(16, 16, 16, 1),),
    ("sm_80", "dkdv"): (Tile(16, 16, 8, 1, split=True),),
    ("sm_80", "decode"): (Tile(32, 16, 16, 1),),
    ("sm_100", "forward"): (Tile(16, 16, 16, 1),),
    ("sm_100", "dq"): (Tile(16, 16, 16, 1),),
    ("sm_100", "dkdv"): (Tile(16, 16, 8, 1, split=True),),
    ("sm_100", "decode"): (Tile(32, 16, 16, 1),),
}

WIDTHS = (64, 128, 256)
WIDE = (512, 576)
ALL_WIDTHS = (*WIDTHS, *WIDE)
PASSES = ("forward", "decode", "dq", "dkdv")
FAMILIES = tuple(dict.fromkeys(family for family, _ in _HALF))


def row_of(family: str, pass_: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles for heads up to each of WIDTHS, and up to as many of WIDE as fit a program."""
    rows, wide = (_FLOAT32, _WIDE_FLOAT32) if dtype == torch.float32 else (_HALF, _WIDE_HALF)
    return *rows[family, pass_], *wide.get((family, pass_), ())


def fits(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernels take heads of the widths of q and v, on their device."""
    row = row_of(arch_of(q.device), "forward", q.dtype)
    return max(q.shape[-1], v.shape[-1]) <= ALL_WIDTHS[len(row) - 1]


@functools.cache
def tile(family: str, pass_: str, width: int, dtype: torch.dtype, triton: tuple[int, int] = TRITON_VERSION) -> Tile:
    """The tile of `pass_` on `family`, for heads of `width`, under this release of Triton.

    Raises:
        ValueError: such heads do not fit a program.
    """
    row = row_of(family, pass_, dtype)
    place = next(i for i, widest in enumerate(ALL_WIDTHS) if width <= widest)
    if place >= len(row):
        wanted = f"at most {ALL_WIDTHS[len(row) - 1]} in this dtype on {family}, since no wider head fits a program"
        raise ValueError(message("attention", "q or v", f"a head width of {width} in {str(dtype)[6:]}", wanted))
    found = row[place]
    while found.newer and triton >= found.since:
        found = found.newer
    return found


def tile_for(pass_: str, call: AttentionCall, rotated: bool = False) -> Tile:
    """The tile that a pass of `call` takes. rotated: the pass ends with an inverse rotation; only dq needs to know.

    It is the tile for the widths and the dtype of the call, unless the call has options for which the pass holds more
    in registers than that tile leaves room for:

        forward   a softcap, a window's left side, kv_start, kv_end or kv_prefix: `AttentionCall.has_options`
        dq        likewise; also a packed batch or an inverse rotation, unless the tile has spare registers
        dkdv      a softcap, kv_end, kv_prefix, or kv_start beside a window's left side
        decode    none

    Then `for_prefix` takes its place in the forward and in dq where the call has a kv_prefix, and `for_options`
    otherwise, if there is one. In dq an inverse rotation takes more than other options, so the tile found may have
    `for_options` of its own for it.
    """
    found = tile(arch_of(call.q.device), pass_, max(call.q.shape[-1], call.v.shape[-1]), call.q.dtype)
    if pass_ == "decode":
        return found
    prefix = call.kv_prefix is not None
    if pass_ == "dkdv":
        both_floors = call.kv_start is not None and call.limits_left
        needs_registers = prefix or both_floors or call.kv_end is not None or call.softcap is not None
        return found.for_options if needs_registers and found.for_options else found
    needs_registers = call.has_options
    if pass_ == "dq" and not found.spare_registers:
        needs_registers = needs_registers or call.packed or rotated
    instead = found.for_prefix if prefix and found.for_prefix else found.for_options
    if not needs_registers or instead is None:
        return found
    return instead.for_options if rotated and instead.for_options else instead
