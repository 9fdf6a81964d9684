"""Makes llama_kernels run in the PTX simulator: its registered ops launch their kernels on CPU tensors.

As a pytest plugin it does so for the whole run, where --compiled names a target.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from llama_kernels import hopper_attention
from llama_kernels.core import device as core_device
from llama_kernels.core import launch_cache
from llama_kernels.ops.attention import dispatch, tables
from llama_kernels.ops.attention import hopper as hopper_kernels
from tests.support import ideal

_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def operators() -> list[str]:
    """The names of all operators of the package; each has a kernel for CUDA tensors."""
    return sorted(name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "llama_kernels::" in name)


def _launcher(name: str, called: Callable[[str], None]) -> Callable[..., Any]:
    """What the operator does for CUDA tensors, for CPU tensors."""
    op = getattr(torch.ops.llama_kernels, name).default

    def launch_kernel(*args: Any) -> Any:
        called(name)
        return op.redispatch(_CUDA, *args)

    return launch_kernel


@contextlib.contextmanager
def kernels_on_cpu(target: str, hopper: bool = False) -> Iterator[set[str]]:
    """Launch kernels, with the tiles of `target`, for CPU tensors. Gives the names of the operators that were called.

    hopper: attention takes the Hopper kernels where it can; an error of theirs is not stepped over.
    """
    called: set[str] = set()
    library = torch.library.Library("llama_kernels", "IMPL")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*[Oo]verrid")  # the CPU's own implementation, for now
        for name in operators():
            library.impl(name, _launcher(name, called.add), "CPU", allow_override=True)
        stack.callback(launch_cache.clear)
        stack.callback(library._destroy)
        for module in (core_device, tables, dispatch):
            stack.enter_context(mock.patch.object(module, "arch_of", functools.partial(_answer, target)))
        stack.enter_context(mock.patch.object(ideal, "rounds_p", lambda device: True))
        if hopper:  # an error of the machine is not a reason for the portable kernels
            stack.enter_context(
                mock.patch.object(hopper_kernels, "attempt", lambda _, launch, *args: (True, launch(*args)))
            )
        stack.enter_context(hopper_attention(hopper))
        launch_cache.clear()
        yield called


def _answer(target: str, device: torch.device) -> str:
    return target


_session = contextlib.ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    if target := config.getoption("compiled", None):
        _session.enter_context(kernels_on_cpu(target, hopper=config.getoption("hopper", False)))


def pytest_unconfigure() -> None:
    _session.close()
