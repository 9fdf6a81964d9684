"""When attention takes the Hopper kernels, and why not when it does not. The one place that decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llama_kernels.core.device import arch_of
from llama_kernels.ops.attention.hopper.gluon import HAS_GLUON, WHY_NOT


@dataclass(frozen=True)
class HopperTile:
    width: int  # of a head in shared memory: a narrower one has zeros in the rest
    BLOCK_M: int  # query rows a step or, of the forward, a program
    BLOCK_N: int  # keys
    STAGES: int  # tiles under way, of each of the two tensors that pass by; a power of two
    record: str | None = None  # of the GPU run that showed parity and speed; until there is one, opt-in

    def __str__(self) -> str:
        return f"{self.BLOCK_M} x {self.BLOCK_N}, {self.STAGES} stages"


# Heads up to 64, 128 and, forward, 256 wide.
TILES = {
    # Two groups of 64 rows, and as many keys a step as registers hold of their scores beside the output: 128, or 64
    # where the output takes 128 registers. Shared memory bounds the stages.
    "forward": (HopperTile(64, 128, 128, 4), HopperTile(128, 128, 128, 2), HopperTile(256, 128, 64, 2)),
    # Two groups of 64 keys. dk and dv take 128 registers of 240, scores and their gradients 64: more rows a step spill,
    # and at width 256 dk and dv alone would fill them.
    "backward": (HopperTile(64, 64, 128, 2), HopperTile(128, 64, 128, 2)),
}


# --- the switch ------------------------------------------------------------------------------------------------------


class hopper_attention:
    """Let attention on Hopper GPUs take its Gluon kernels, where they have not been shown on one: for good, or inside
    `with`.

        with lk.hopper_attention():
            out = lk.attention(q, k, v)

    They were tested as far as a CPU can and wait for a GPU's record; `python -m llama_kernels` names, pass by pass,
    what runs and why. It holds for the process: gradients are computed in threads of PyTorch's own.
    """

    enabled = False

    def __init__(self, enabled: bool = True) -> None:
        self._before = hopper_attention.enabled
        hopper_attention.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        hopper_attention.enabled = self._before


# --- the choice ------------------------------------------------------------------------------------------------------

_RECORDED = {pass_ for pass_, tiles in TILES.items() if any(tile.record for tile in tiles)}
_failed: dict[str, str] = {}  # passes that did not compile or launch here, and what was said


def row(pass_: str, arch: str, dtype: torch.dtype, D: int, DV: int) -> HopperTile | str:
    """The tile for heads of these widths, or why the portable kernel takes them. Asks no tensor."""
    if arch != "sm_90":
        return f"{arch} is not Hopper"
    if not HAS_GLUON:
        return WHY_NOT
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype)[6:]} has no tensor-core product that keeps it"
    tile = next((tile for tile in TILES[pass_] if tile.width // 2 < D <= tile.width), None)
    if tile is None or D % 8:
        return f"head_dim {D}"
    if D != DV:
        return f"v is {DV} wide, q and k are {D}"
    if pass_ in _failed:
        return f"the Gluon kernel failed here: {_failed[pass_]}"
    if tile.record is None and not hopper_attention.enabled:
        return "the Gluon kernel is opt-in until it has been measured: llama_kernels.hopper_attention()"
    return tile


def wanted(pass_: str) -> bool:
    """The one check that a call on any other machine pays for: whether there is a choice at all."""
    return hopper_attention.enabled or pass_ in _RECORDED


def choose(
    pass_: str,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    softcap: float | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *others: torch.Tensor,
) -> HopperTile | str:
    """The tile for this call, or why the portable kernel takes it. `others` are read or written by the copy engine."""
    tile = row(pass_, arch_of(q.device), q.dtype, q.shape[-1], v.shape[-1])
    if isinstance(tile, str):
        return tile
    if kv_start is not None or kv_end is not None:
        return "kv_start or kv_end"
    if pass_ == "backward" and softcap is not None and tile.width == 128:
        return "softcap: more registers than there are at this width"
    for x in (q, k, v, *others):
        if not x.numel():
            return "an empty tensor"
        if x.data_ptr() % 16:
            return "an address that is not a multiple of 16 bytes"
        for size, stride in zip(x.shape[:-1], x.stride(), strict=False):
            if size > 1 and not (stride % 8 == 0 and 0 < stride < 2**38):
                return "strides that are 0 or no multiple of 16 bytes"
        if x.shape[0 if x.ndim == 3 else 2] > 2**30:
            return "more than 2^30 tokens"
    return tile


def attempt(pass_: str, launch: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
    """(True, launch(*args)), or (False, None) where the kernel does not compile or launch here, which is said once."""
    try:
        return True, launch(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _failed[pass_] = f"{type(error).__name__}: {error}".splitlines()[0]
        said = "takes its portable kernel from here on, since the Hopper one failed"
        warnings.warn(f"llama_kernels: attention {pass_} {said}. {_failed[pass_]}", stacklevel=2)
        return False, None
