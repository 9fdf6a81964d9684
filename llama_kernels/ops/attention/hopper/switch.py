"""Whether the Hopper kernels are switched on, and which of them failed on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from llama_kernels.core.checks import check_flag
from llama_kernels.core.tensors import NotContiguous
from llama_kernels.ops.attention.hopper.tables import TILES


class hopper_attention:
    """Let attention on Hopper GPUs use all Hopper kernels, also those that are not on by default.

    Called as a function it holds from then on; as a context manager, inside the `with` block::

        with lk.hopper_attention():
            out = lk.attention(q, k, v)

    A kernel is on by default where a Hopper GPU has shown, under the installed release of Triton, that it is right and
    faster than the portable one: with Triton 3.6, the forward for heads of 72 to 256, without `kv_start`, `kv_end` and
    `kv_prefix`. `python -m llama_kernels` prints which kernel each pass uses, and why. The setting holds for the whole
    process, since PyTorch computes gradients in threads of its own.

    Args:
        enabled: False switches those kernels off again that are not on by default.
    """

    enabled = False

    def __init__(self, enabled: bool = True) -> None:
        check_flag("hopper_attention", "enabled", enabled)
        self._before = hopper_attention.enabled
        hopper_attention.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        hopper_attention.enabled = self._before


_MEASURED = {pass_ for pass_, tiles in TILES.items() if any(tile.measured for tile in tiles)}


def may_run(pass_: str) -> bool:
    """Whether any Hopper kernel of this pass may run. Every call on any GPU asks this first, so it is cheap."""
    return hopper_attention.enabled or pass_ in _MEASURED


failures: dict[str, str] = {}  # by pass: the first line of the error of a kernel that did not compile or launch


def attempt(pass_: str, launch: Callable[..., None], *args: Any) -> bool:
    """Whether launch(*args) launched its kernels. False: they do not compile or launch on this machine.

    That is warned of once. The pass then uses its portable kernels.
    """
    try:
        launch(*args)
    except (torch.OutOfMemoryError, NotContiguous):
        raise
    except Exception as error:
        failures[pass_] = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"llama_kernels: the Hopper kernel of attention {pass_} failed; from now on this process uses the portable "
            f"kernels. {failures[pass_]}",
            stacklevel=2,
        )
        return False
    return True
