"""Tiles of the Hopper kernels, one for each pass and width of heads, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llama_kernels.core.language import TRITON_VERSION


class Record(NamedTuple):
    """A run on a GPU that showed that a kernel is right, and faster than the portable one."""

    run: str  # what was measured, and where
    triton: tuple[int, int]  # the release that compiled the kernel


@dataclass(frozen=True)
class HopperTile:
    """A tile. Its kernel runs by default if it has a record under the installed release of Triton."""

    width: int  # of a head in shared memory; a narrower head is filled up with zeros
    BLOCK_M: int  # query rows: of a program in the forward, of a step in the backward
    BLOCK_N: int  # keys: of a step in the forward, of a program in the backward
    STAGES: int  # tiles in flight of each of the two tensors that are streamed; a power of two
    record: Record | None = None
    why_off: str = ""  # by default, of a kernel without a record

    @property
    def measured(self) -> bool:
        """Whether the record was made with the installed release of Triton."""
        return self.record is not None and self.record.triton == TRITON_VERSION

    def __str__(self) -> str:
        return f"{self.BLOCK_M} x {self.BLOCK_N}, {self.STAGES} stages"


_NOT_REPEATED = "its dq does not repeat bit for bit"
_H100 = "H100, Triton 3.6.0: {} TFLOP/s causal at 8,192 tokens, the portable kernel {}, cuDNN {}"

# Heads up to 64, 128 and, in the forward, 256 wide.
TILES = {
    # Two groups of 64 rows. A step takes as many keys as there are registers for their scores beside the output: 128,
    # or 64 where the output takes 128 registers. Shared memory limits the stages.
    "forward": (
        HopperTile(64, 128, 128, 4, why_off="the portable kernel is as fast at this width on an H100"),
        HopperTile(128, 128, 128, 2, Record(_H100.format(585, 480, 583), (3, 6))),
        HopperTile(256, 128, 64, 2, Record(_H100.format(669, 510, 632), (3, 6))),
    ),
    # Two groups of 64 keys. dk and dv take 128 of 240 registers, scores and their gradients 64; more rows per step
    # spill. At width 256, dk and dv alone would take all registers. On an H100 they are 14 to 26% faster than the
    # portable backward, but only the gradients of that repeat bit for bit, so that is the default
    # (docs/lab/2026-11-27-second_gpu.md).
    "backward": (HopperTile(64, 64, 128, 2, why_off=_NOT_REPEATED), HopperTile(128, 64, 128, 2, why_off=_NOT_REPEATED)),
}


def tile_for_width(pass_: str, D: int) -> HopperTile | None:
    """The tile for heads of width D. None: there is none."""
    fitting = (tile for tile in TILES[pass_] if tile.width // 2 < D <= tile.width)
    return next(fitting, None) if D % 8 == 0 else None
