"""Every launch made twice: through the launch cache, and bound by Triton from the same arguments. The driver must
receive the same bytes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from llama_kernels.core import launch_cache
from llama_kernels.core.device import on_device_of
from tests.contracts.launcher.substitute import Launched, state, take


@dataclass
class Comparison:
    """One call of one launcher."""

    launcher: str  # its module and name
    cached: list[Launched]
    by_triton: list[Launched]
    bound: int  # launches that Triton bound in the first: none where the cache had them
    numbers: tuple[Any, ...]  # the leaves of the arguments that are no tensors

    @property
    def difference(self) -> str | None:
        if self.cached == self.by_triton:
            return None
        lines = [f"{self.launcher}: the launch cache, then Triton"]
        for i in range(max(len(self.cached), len(self.by_triton))):
            lines += [str((launched[i : i + 1] or ["nothing"])[0]) for launched in (self.cached, self.by_triton)]
        return "\n".join(lines)


@dataclass
class Comparisons:
    """Replaces the launchers of the package by ones that compare."""

    cache: ModuleType = launch_cache  # or launch_cache.py with a fault
    made: list[Comparison] = field(default_factory=list)  # since the last `check`
    launchers: dict[str, Callable[..., None]] = field(default_factory=dict)  # as the package has them

    def install(self) -> None:
        for name, module in list(sys.modules.items()):
            for attribute, x in list(vars(module).items()) if name.startswith("llama_kernels.ops") else ():
                listing = getattr(x, "__wrapped__", None)
                if listing is not None and getattr(x, "__code__", None) is _LAUNCH_CODE:
                    key = f"{name.removeprefix('llama_kernels.ops.')}.{attribute}"
                    self.launchers[key] = x
                    cached = x if self.cache is launch_cache else self.cache.cached_launch(listing)
                    setattr(module, attribute, self.compared(key, cached))

    def remove(self) -> None:
        for key, launcher in self.launchers.items():
            module, attribute = key.rsplit(".", 1)
            setattr(sys.modules[f"llama_kernels.ops.{module}"], attribute, launcher)

    def compared(self, name: str, launcher: Callable[..., None]) -> Callable[..., None]:
        listing = launcher.__wrapped__

        @functools.wraps(listing)
        def call(*args: Any) -> None:
            take()
            before = state.bound
            launcher(*args)
            bound, cached = state.bound - before, take()
            leaves, _ = launch_cache._leaves(args)
            with on_device_of(leaves[0]):
                for each in listing(*args):
                    each.kernel[each.grid](*each.args, **each.options, **launch_cache._ALWAYS)
            numbers = tuple(x for x in leaves if not isinstance(x, torch.Tensor))
            self.made.append(Comparison(name, cached, take(), bound, numbers))

        return call

    def check(self) -> None:
        """Raise where one of the comparisons since the last call found a difference; forget them."""
        made, self.made = self.made, []
        differences = [each.difference for each in made if each.difference]
        if differences:
            raise AssertionError(f"{len(differences)} of {len(made)} calls differ. {differences[0]}")


_LAUNCH_CODE = launch_cache.cached_launch(lambda x: []).__code__  # that all launchers share
