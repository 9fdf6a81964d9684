"""Which of our kernels a call launches, and with which tiles, as a record names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.support.launches import kernels_launched


def kernels_of(run: Callable[[], object]) -> list[str]:
    """The Triton kernels that `run` launches, in order, each as "name: tile". It runs once."""
    with kernels_launched() as launches:
        run()
    return [f"{each.name.strip('_')}: {tile_of(**each.options)}" for each in launches]


def tile_of(*, num_warps: int, num_stages: int, **constants: Any) -> str:
    """The tile of a launch: its block sizes, warps and stages. constants: its compile-time arguments."""
    blocks = (f"{name} {x}" for name, x in constants.items() if name.startswith("BLOCK"))
    return ", ".join((*blocks, f"{num_warps} warps", f"{num_stages} stages"))


def has_tile(kernel: str, tile: Mapping[str, Any]) -> bool:
    """Whether `kernel`, of `kernels_of`, ran with the block sizes, warps and stages of `tile`."""
    wanted, (_, ran) = tile_of(**tile), kernel.split(": ")
    return set(wanted.split(", ")) <= set(ran.split(", "))
