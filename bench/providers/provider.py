"""A provider is one small class: a method for each op it has, named after the op, or `any_op` for those without one.

A method gets the work and the device, does what a user does once (import, tables, masks), and returns a function of the
op's arguments. It raises `Unsupported` for what it cannot do; a package that is missing is noticed here. Either
way the provider stays in the table, with the reason. bench/providers/registry.py has the list.
"""

from __future__ import annotations

import importlib.util

import torch

from bench.works.work import Function, Work

OURS = "llama_kernels"


class Unsupported(Exception):
    """Why a provider does not do a piece of work."""


class Provider:
    """`module`: what must be there to import; `package`: what to install for it. `cpu`: runs on CPU tensors too."""

    name: str
    module: str | None = None
    package: str | None = None
    cpu = False

    def function(self, work: Work, device: str) -> Function:
        """The op as this provider has it, ready to be called. Raises Unsupported."""
        if reason := self.why_not(work.op, device):
            raise Unsupported(reason)
        return getattr(self, work.op, self.any_op)(work, device)

    def any_op(self, work: Work, device: str) -> Function:
        """An op that has no method. A provider that has such ops overrides this."""
        raise Unsupported(f"has no {work.op}")

    def has(self, op: str) -> bool:
        return hasattr(self, op) or type(self).any_op is not Provider.any_op

    def why_not(self, op: str, device: str) -> str | None:
        """Why it cannot do `op` at any shape here, or None."""
        if not self.has(op):
            return f"has no {op}"
        if self.module is not None and not _importable(self.module):
            return f"not installed (pip install {self.package})"
        return "needs a GPU" if device == "cpu" and not self.cpu else None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is missing or broken
        return False


def swap(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) <-> (B, S, H, D), a view."""
    return x.transpose(1, 2)


def packed(x: torch.Tensor) -> torch.Tensor:
    """(1, H, T, D) -> (T, H, D), a view; and so is its gradient, where indexing would write one full of zeros."""
    return x.squeeze(0).transpose(0, 1)


def unpacked(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) -> (1, H, T, D), a view."""
    return x.transpose(0, 1).unsqueeze(0)
