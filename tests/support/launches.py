"""Which kernels ran: `kernels_launched` records the launches themselves, not what the package says it will launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from llama_kernels.core.language import HAS_TRITON, INTERPRETED

# Whether the tests run kernels; else CPU tensors take the reference, and nothing is ever launched.
KERNELS_RUN = INTERPRETED or torch.cuda.is_available()


class Launched(NamedTuple):
    name: str  # of the kernel's Python function
    options: dict[str, Any]  # its compile-time values, num_warps and num_stages, by name


_recording: list[list[Launched]] = []


def _record(name: str, options: dict[str, Any]) -> None:
    for launches in _recording:
        launches.append(Launched(name, options))


def names(launches: list[Launched]) -> list[str]:
    """Each kernel once, in the order of their first launches."""
    return list(dict.fromkeys(launched.name for launched in launches))


@contextlib.contextmanager
def kernels_launched() -> Iterator[list[Launched]]:
    """Every launch inside, in order: by Triton and by its interpreter.

    Of Triton's, those that its launcher announces (launch_enter_hook) right before it hands them to the driver; a
    launch from the launch cache is announced too.
    """
    launches: list[Launched] = []
    with contextlib.ExitStack() as stack:
        if not _recording and HAS_TRITON:  # the outermost recorder records for all
            stack.enter_context(_interpreted() if INTERPRETED else _compiled())
        _recording.append(launches)
        stack.callback(_recording.pop)
        yield launches


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    """Launches by Triton's interpreter are recorded."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def recorded(self: Any, *args: Any, **options: Any) -> None:
        _record(self.fn.__name__, options)
        run(self, *args, **options)

    with mock.patch.object(GridExecutor, "__call__", recorded):
        yield


@contextlib.contextmanager
def _compiled() -> Iterator[None]:
    """Launches by Triton's own launcher are recorded."""
    from triton import knobs
    from triton.compiler import CompiledKernel

    metadata_of = CompiledKernel.launch_metadata

    def with_options(self: Any, *args: Any) -> Any:
        metadata = metadata_of(self, *args)
        metadata.data["llama_kernels"] = Launched(self.src.fn.__name__, _options(self))
        return metadata

    def announced(metadata: Any) -> None:
        _record(*metadata.get()["llama_kernels"])

    knobs.runtime.launch_enter_hook.add(announced)
    try:
        with mock.patch.object(CompiledKernel, "launch_metadata", with_options):
            yield
    finally:
        knobs.runtime.launch_enter_hook.remove(announced)


def _options(kernel: Any) -> dict[str, Any]:
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    return {**constants, "num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}
