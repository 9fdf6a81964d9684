"""Variations of a stock model: unchanged, patched by llama_kernels, patched by Liger; each plain or compiled."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

from torch import nn

from bench.providers.provider import NOT_INSTALLED, OURS, Unsupported


class Variation:
    """How a stock model is changed, and what is in force while it runs. `cpu`: whether it runs on a CPU."""

    name: str
    compiled = False
    cpu = True

    def change(self, model: nn.Module) -> nn.Module:
        """The changed `model`, which may be the same object. Raises Unsupported."""
        return model

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which every call runs."""
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
    """Liger's patch. It replaces functions in the module of Transformers, so they are put back between calls.

    everything: Liger's default, with its SwiGLU and its loss that does not write the logits. Otherwise only the ops
    that llama_kernels has too.
    """

    cpu = False

    def __init__(self, everything: bool) -> None:
        self.name, self.everything = ("liger, with MLP and loss" if everything else "liger, RoPE and norm"), everything
        self._names: dict[str, Any] = {}

    def change(self, model: nn.Module) -> nn.Module:
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama
        except ImportError:
            raise Unsupported(f"{NOT_INSTALLED} (pip install liger-kernel)") from None
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
