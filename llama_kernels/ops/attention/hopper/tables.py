"""Tiles of the Hopper kernels, one for each pass and width of heads, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HopperTile:
    """A tile, and whether a run on a GPU has shown that its kernel is right and fast."""

    width: int  # of a head in shared memory; a narrower head is filled up with zeros
    BLOCK_M: int  # query rows: of a program in the forward, of a step in the backward
    BLOCK_N: int  # keys: of a step in the forward, of a program in the backward
    STAGES: int  # tiles in flight of each of the two tensors that are streamed; a power of two
    record: str | None = None  # names the GPU run that showed parity and speed; None: the kernel is opt-in

    def __str__(self) -> str:
        return f"{self.BLOCK_M} x {self.BLOCK_N}, {self.STAGES} stages"


# Heads up to 64, 128 and, in the forward, 256 wide.
TILES = {
    # Two groups of 64 rows. A step takes as many keys as there are registers for their scores beside the output: 128,
    # or 64 where the output takes 128 registers. Shared memory limits the stages.
    "forward": (HopperTile(64, 128, 128, 4), HopperTile(128, 128, 128, 2), HopperTile(256, 128, 64, 2)),
    # Two groups of 64 keys. dk and dv take 128 of 240 registers, scores and their gradients 64; more rows per step
    # spill. At width 256, dk and dv alone would take all registers.
    "backward": (HopperTile(64, 64, 128, 2), HopperTile(128, 64, 128, 2)),
}


def tile_for_width(pass_: str, D: int) -> HopperTile | None:
    """The tile for heads of width D. None: there is none."""
    fitting = (tile for tile in TILES[pass_] if tile.width // 2 < D <= tile.width)
    return next(fitting, None) if D % 8 == 0 else None
