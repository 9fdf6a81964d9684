"""Tile tables: which tile each attention pass takes on each family of GPUs. Data, each row with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llama_kernels.runtime import arch_of


@dataclass(frozen=True)
class Tile:
    BLOCK_M: int  # query rows
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int
    split: bool = False  # dk and dv in two launches, where one program cannot hold both

    @property
    def launch_options(self) -> dict[str, Any]:
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N, "num_warps": self.num_warps, "num_stages": self.num_stages}


def tile_for(pass_: str, q: torch.Tensor, v: torch.Tensor) -> Tile:
    return Tile(64, 64, 4, 2)
