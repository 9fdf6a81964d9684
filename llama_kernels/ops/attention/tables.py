"""Which tile each attention pass takes: data, one row a (GPU family, pass), each with its reason.

A row holds the tiles for heads up to 64, 128 and 256 wide. Nothing is tuned at run time: the same call takes the same
tile on every machine of a family, whatever the batch, so its results repeat bit for bit. `python -m bench.codegen`
compiles every row and fails on a spill.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from llama_kernels.core.device import arch_of
from llama_kernels.core.language import TRITON_VERSION


@dataclass(frozen=True)
class Tile:
    BLOCK_M: int  # query rows
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int
    split: bool = False  # dk and dv in two launches, where one program cannot hold both
    carry: bool = False  # of the forward: the softmax of a block beneath p @ v of the one before
    crowded: Tile | None = None  # instead, with options on that hold registers; the launcher says which
    narrow_v: Tile | None = None  # instead, where v is half as wide as q, as multi-head latent attention has it
    newer: Tile | None = None  # instead, from Triton 3.9 on, whose code for this one spills or waits

    @functools.cached_property
    def launch_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")}

    def __str__(self) -> str:
        flags = "".join(f", {name}" for name in ("split", "carry") if getattr(self, name))
        return f"{self.BLOCK_M} x {self.BLOCK_N}, {self.num_warps}, {self.num_stages}{flags}"


# Of the forward on sm_90, at width 256: a v of 128 leaves registers for twice the keys.
_NARROW_V = Tile(128, 64, 8, 2, carry=True, crowded=Tile(128, 32, 8, 2))

# bfloat16 and float16. Of the tiles that compile without a spill under every option, each row has the one that reads
# least from L2 for its tensor-core work: the largest, and where two tie the deeper pipeline.
_HALF = {
    # Hopper's products run on their own, so a softmax should have one above it: p is carried. At width 64, 128
    # registers leave room for a second program too. At width 128, 128 keys a step halve the times that 64 would rescale
    # acc; crowded they spill 8 to 56 bytes, and under Triton 3.9, which carries p in twice the registers, 152.
    ("sm_90", "forward"): (
        Tile(128, 64, 8, 2, carry=True, crowded=Tile(128, 64, 8, 2)),
        Tile(
            128, 128, 8, 2, carry=True, crowded=Tile(128, 64, 8, 3, carry=True), newer=Tile(128, 64, 8, 3, carry=True)
        ),
        Tile(128, 32, 8, 2, carry=True, crowded=Tile(128, 32, 8, 2), narrow_v=_NARROW_V),
    ),
    # Under Triton 3.9 the addresses of a second stage are 40 bytes too many beside all options.
    ("sm_90", "dq"): (
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 32, 8, 2, newer=Tile(128, 32, 8, 2, crowded=Tile(128, 32, 8, 1))),
    ),
    # dk and dv are the larger accumulators, so 128 keys stay and the rows pass by in small blocks: with 64 keys the two
    # warpgroups compute the scores twice. Of 64 rows: with 32, k @ q^T waits for its operands. At width 128 they spill
    # up to 16 bytes, outside of the loop; with softcap and more, 104; under Triton 3.9 within the loop.
    ("sm_90", "dkdv"): (
        Tile(64, 128, 8, 2),
        Tile(64, 128, 8, 2, crowded=Tile(32, 128, 8, 2), newer=Tile(32, 128, 8, 2)),
        Tile(32, 128, 8, 2, split=True),
    ),
    # Ampere has no asynchronous products: q stays in registers, which is what bounds the width of a step. dq of width
    # 128 that ends with a rotation spills 8 bytes with all options at once, outside of the loop.
    ("sm_80", "forward"): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(32, 32, 4, 3)),
    ("sm_80", "dq"): (
        Tile(128, 64, 8, 3),
        Tile(64, 128, 8, 2, newer=Tile(64, 128, 8, 2, crowded=Tile(64, 64, 8, 2))),
        Tile(64, 64, 8, 2, crowded=Tile(64, 64, 8, 1)),
    ),
    # At width 256 four warps: eight, of 16 rows each, would share 64 and compute half of the scores twice.
    ("sm_80", "dkdv"): (
        Tile(32, 128, 8, 3),
        Tile(64, 64, 8, 3),
        Tile(32, 64, 4, 2, split=True, crowded=Tile(32, 64, 4, 1, split=True)),
    ),
    # Consumer chips: as Ampere, with 99 KiB of shared memory a block.
    ("sm_86", "forward"): (
        Tile(128, 64, 8, 1),
        Tile(64, 32, 4, 2),
        Tile(32, 32, 4, 3, newer=Tile(32, 32, 4, 3, crowded=Tile(32, 32, 4, 2))),
    ),
    ("sm_86", "dq"): (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 4, 2)),
    ("sm_86", "dkdv"): (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 4, 1, split=True)),
    # Blackwell: one stage or four. With two or three, tl.dot races in Triton 3.6 and 3.7 (triton#10590). Products run
    # on their own here too: with p carried, p @ v is in flight while the exponentials are computed.
    ("sm_100", "forward"): (
        Tile(128, 64, 8, 4, carry=True, crowded=Tile(128, 128, 8, 1)),
        Tile(128, 64, 8, 4, carry=True),
        Tile(128, 32, 8, 4, carry=True),
    ),
    ("sm_100", "dq"): (
        Tile(128, 64, 8, 4),
        Tile(128, 64, 8, 4),
        Tile(64, 64, 4, 1, crowded=Tile(64, 32, 8, 1), newer=Tile(64, 64, 8, 1, crowded=Tile(64, 32, 8, 1))),
    ),
    ("sm_100", "dkdv"): (Tile(64, 128, 8, 1), Tile(64, 128, 8, 1), Tile(64, 64, 8, 1)),
    # CDNA3 has 64 KiB of shared memory and 512 registers a lane.
    ("gfx942", "forward"): (Tile(128, 64, 8, 2), Tile(128, 64, 4, 1), Tile(64, 64, 4, 1)),
    ("gfx942", "dq"): (
        Tile(64, 64, 4, 1),
        Tile(64, 64, 4, 1),
        Tile(64, 64, 4, 1, crowded=Tile(64, 32, 4, 1), newer=Tile(64, 32, 4, 1, crowded=Tile(32, 32, 4, 1))),
    ),
    ("gfx942", "dkdv"): (
        Tile(32, 128, 8, 1),
        Tile(16, 128, 8, 1),
        Tile(32, 64, 4, 1, newer=Tile(16, 64, 4, 1)),
    ),
    # Decoding waits for memory, so its rows (at most 32 of them) leave room for two or more programs on a processor,
    # each with the next keys on the way. BLOCK_M is the most; a call takes the power of two that holds its rows.
    ("sm_90", "decode"): (Tile(32, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 8, 2)),
    ("sm_80", "decode"): (Tile(32, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 8, 2)),
    ("sm_86", "decode"): (Tile(32, 64, 4, 3), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
    ("sm_100", "decode"): (Tile(32, 64, 4, 4), Tile(32, 64, 4, 4), Tile(32, 32, 8, 4)),
    ("gfx942", "decode"): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 1)),
}

# float32 is multiplied as such, on no tensor core: both operands pass through registers, which asks for small tiles or
# many warps, and one stage. Among those that spill nowhere in the compile gate, the largest. (At other widths, or with
# all options at once, ten kernels spill 8 to 24 bytes: `python -m bench.codegen --full` names them.) On sm_80,
# Triton 3.9 has 64 registers do what took 128: 64 x 64 at width 128 would spill 1,720 bytes.
_FLOAT32 = {
    ("sm_90", "forward"): (Tile(32, 32, 8, 1), Tile(64, 64, 16, 1), Tile(16, 32, 8, 1)),
    ("sm_90", "dq"): (Tile(64, 32, 8, 1), Tile(64, 64, 16, 1), Tile(16, 32, 8, 1)),
    ("sm_90", "dkdv"): (Tile(64, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1, split=True)),
    ("sm_80", "forward"): (
        Tile(32, 32, 4, 1),
        Tile(64, 64, 16, 1, newer=Tile(64, 32, 16, 1, crowded=Tile(32, 64, 16, 1))),
        Tile(64, 16, 8, 1),
    ),
    ("sm_80", "dq"): (Tile(64, 32, 8, 1), Tile(64, 64, 16, 1, newer=Tile(64, 32, 16, 1)), Tile(64, 16, 8, 1)),
    ("sm_80", "dkdv"): (Tile(64, 32, 16, 1), Tile(32, 16, 8, 1), Tile(64, 16, 8, 1, split=True)),
    ("sm_86", "forward"): (Tile(32, 64, 8, 1), Tile(64, 64, 16, 1), Tile(16, 32, 8, 1)),
    ("sm_86", "dq"): (Tile(64, 32, 8, 1), Tile(32, 64, 8, 1), Tile(16, 32, 8, 1)),
    ("sm_86", "dkdv"): (
        Tile(64, 32, 8, 1),
        Tile(64, 16, 8, 1, newer=Tile(32, 16, 8, 1)),
        Tile(32, 16, 8, 1, split=True),
    ),
    ("sm_100", "forward"): (Tile(16, 32, 4, 1), Tile(64, 64, 16, 1), Tile(16, 32, 8, 1)),
    ("sm_100", "dq"): (Tile(64, 32, 8, 1), Tile(64, 64, 16, 1), Tile(32, 16, 8, 1)),
    ("sm_100", "dkdv"): (
        Tile(32, 64, 8, 1),
        Tile(64, 32, 8, 1, newer=Tile(16, 32, 8, 1)),
        Tile(32, 16, 8, 1, split=True),
    ),
    ("gfx942", "forward"): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 16, 8, 1)),
    ("gfx942", "dq"): (Tile(64, 32, 8, 1), Tile(64, 16, 8, 1), Tile(16, 16, 4, 1)),
    ("gfx942", "dkdv"): (Tile(32, 64, 8, 1), Tile(16, 64, 8, 1), Tile(16, 32, 4, 1)),
    ("sm_90", "decode"): (
        Tile(32, 32, 8, 1),
        Tile(32, 32, 16, 1, newer=Tile(32, 32, 8, 1)),
        Tile(32, 32, 16, 1),
    ),
    ("sm_80", "decode"): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    ("sm_86", "decode"): (Tile(32, 32, 8, 1), Tile(32, 32, 16, 1), Tile(32, 32, 16, 1)),
    ("sm_100", "decode"): (
        Tile(32, 32, 8, 1),
        Tile(32, 32, 16, 1, newer=Tile(32, 32, 8, 1)),
        Tile(32, 32, 16, 1),
    ),
    ("gfx942", "decode"): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
}


WIDTHS = (64, 128, 256)
PASSES = ("forward", "decode", "dq", "dkdv")
FAMILIES = tuple(dict.fromkeys(family for family, _ in _HALF))


@functools.cache
def tile(family: str, pass_: str, width: int, dtype: torch.dtype, triton: tuple[int, int] = TRITON_VERSION) -> Tile:
    """The row of `family` for `pass_`, its column for heads of `width`, under this Triton."""
    rows = _FLOAT32 if dtype == torch.float32 else _HALF
    found = rows[family, pass_][next(i for i, widest in enumerate(WIDTHS) if width <= widest)]
    return found.newer if found.newer and triton >= (3, 9) else found


def tile_for(pass_: str, q: torch.Tensor, v: torch.Tensor, crowded: bool = False) -> Tile:
    """The tile of `pass_` for heads as wide as those of `q` and `v`, where they are."""
    D, DV = q.shape[-1], v.shape[-1]
    found = tile(arch_of(q.device), pass_, max(D, DV), q.dtype)
    if found.narrow_v and D > 128 >= DV:
        found = found.narrow_v
    return found.crowded if crowded and found.crowded else found
