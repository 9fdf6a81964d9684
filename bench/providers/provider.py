"""A provider is a class with a method for each op that it has, named after the op. Other ops go to `any_op`.

A method gets the work and the device. It does what a user does once (imports, tables, masks) and returns a function of
the op's arguments. It raises `Unsupported` for work that it cannot do; `Provider` itself checks that the package is
installed. In both cases the provider keeps its rows, with the reason. bench/providers/registry.py lists all providers.
"""

from __future__ import annotations

import importlib.util

import torch

from bench.works.work import Function, Work

OURS = "llama_kernels"
NOT_INSTALLED = "not installed"  # the reason begins so if a package is missing
NEEDS_GPU = "needs a GPU"


class Unsupported(Exception):
    """A provider cannot do a piece of work; the message says why."""


class Provider:
    """`module`: the import that it needs. `package`: what pip installs for it. `cpu`: whether it takes CPU tensors."""

    name: str
    module: str | None = None
    package: str | None = None
    cpu = False

    def function(self, work: Work, device: str) -> Function:
        """This provider's function of the op's arguments. Raises Unsupported."""
        if reason := self.why_not(work.op, device):
            raise Unsupported(reason)
        return getattr(self, work.op, self.any_op)(work, device)

    def any_op(self, work: Work, device: str) -> Function:
        """The function of an op without a method of its own. Providers with such ops override this."""
        raise Unsupported(f"has no {work.op}")

    def has(self, op: str) -> bool:
        """Whether this provider has `op`, wherever it runs."""
        return hasattr(self, op) or type(self).any_op is not Provider.any_op

    def why_not(self, op: str, device: str) -> str | None:
        """Why this provider cannot do `op` at any shape on this machine, or None."""
        if not self.has(op):
            return f"has no {op}"
        if self.module is not None and not _importable(self.module):
            return f"{NOT_INSTALLED} (pip install {self.package})"
        return NEEDS_GPU if device == "cpu" and not self.cpu else None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is missing or broken
        return False


def swap(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) <-> (B, S, H, D), a view."""
    return x.transpose(1, 2)


def packed(x: torch.Tensor) -> torch.Tensor:
    """(1, H, T, D) -> (T, H, D), a view. Its gradient is a view too; that of x[0] would fill a tensor with zeros."""
    return x.squeeze(0).transpose(0, 1)


def unpacked(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) -> (1, H, T, D), a view."""
    return x.transpose(0, 1).unsqueeze(0)
