"""Tensors that pretend to be on a device."""

from __future__ import annotations

from typing import Any

import torch


def on(device: str, args: dict[str, Any]) -> dict[str, Any]:
    """`args` with new tensors on `device`, which inside of a FakeTensorMode need not be there."""
    return {
        name: torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, torch.Tensor) else x
        for name, x in args.items()
    }
