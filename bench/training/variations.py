"""Variations: how a stock model is changed, and what is in force while it runs.

Liger replaces functions of Transformers' module, which would change the other models too.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

from torch import nn

from bench.providers.provider import OURS, Unsupported


class Variation:
    name: str
    compiled = False
    cpu = True

    def change(self, model: nn.Module) -> nn.Module:
        """`model`, or what to run in its place. Raises Unsupported."""
        return model

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around every call."""
        return contextlib.nullcontext()


class Stock(Variation):
    def __init__(self, compiled: bool) -> None:
        self.name, self.compiled, self.cpu = ("stock, compiled" if compiled else "stock"), compiled, not compiled


class Ours(Variation):
    def __init__(self, compiled: bool) -> None:
        self.name, self.compiled, self.cpu = (f"{OURS}, compiled" if compiled else OURS), compiled, not compiled

    def change(self, model: nn.Module) -> nn.Module:
        from llama_kernels.integrations.transformers import patch

        return patch(model)


class Liger(Variation):
    """`everything`: what Liger does by default, its SwiGLU and its loss that never writes the logits among it; else the
    ops that we have too."""

    cpu = False

    def __init__(self, everything: bool) -> None:
        self.name, self.everything = ("liger, with MLP and loss" if everything else "liger, RoPE and norm"), everything
        self._names: dict[str, Any] = {}

    def change(self, model: nn.Module) -> nn.Module:
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama
        except ImportError:
            raise Unsupported("not installed (pip install liger-kernel)") from None
        from transformers.models.llama import modeling_llama

        before = dict(vars(modeling_llama))
        apply_liger_kernel_to_llama(model=model, swiglu=self.everything, fused_linear_cross_entropy=self.everything)
        self._names = {name: x for name, x in vars(modeling_llama).items() if before.get(name) is not x}
        for name in self._names:
            setattr(modeling_llama, name, before[name])
        return model

    def active(self) -> contextlib.AbstractContextManager[Any]:
        from transformers.models.llama import modeling_llama

        return mock.patch.multiple(modeling_llama, **self._names) if self._names else contextlib.nullcontext()


VARIATIONS: tuple[Variation, ...] = (
    Stock(False), Stock(True), Liger(False), Liger(True), Ours(False), Ours(True),
)  # fmt: skip
