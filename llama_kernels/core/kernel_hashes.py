"""Makes a kernel's key in Triton's cache on disk independent of what was launched before.

Triton hashes a kernel together with the functions that it calls. Up to 3.7 the hash also depends on which of these
functions had been hashed before, for another kernel. So a program that launched its kernels in another order compiled
them again.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from typing import Any

from llama_kernels.core.language import HAS_TRITON, INTERPRETED

if HAS_TRITON:
    from triton.runtime.jit import JITCallable

_settled: set[int] = set()  # ids of functions, which live as long as their modules


def settled(kernel: Any) -> Any:
    """Return `kernel`, after hashing every function that it calls, callees first."""
    if id(kernel) not in _settled and not INTERPRETED:
        _settled.add(id(kernel))
        for called in _called(kernel):
            settled(called)
        kernel.cache_key  # noqa: B018 (computed once, and kept)
    return kernel


def _called(function: Any) -> Iterator[Any]:
    """The Triton functions that `function` names."""
    for instruction in dis.get_instructions(function.fn):
        if instruction.opname == "LOAD_GLOBAL":
            value = function.fn.__globals__.get(instruction.argval)
            if isinstance(value, JITCallable):
                yield value
