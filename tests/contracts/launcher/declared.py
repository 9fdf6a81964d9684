"""Kernels that are declared, not compiled: what a launch needs of one is its name and parameters, which follow from the
signature. So a test can launch thousands of signatures. A test compares declarations with compiled kernels."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.compiler.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction

from llama_kernels.core import launch_cache

# By Triton's name of a type, that of PTX; pointers are .u64.
_PTX = {"i1": "u8", "u1": "u8", "i8": "u8", "u8": "u8", "i16": "u16", "i32": "u32", "u32": "u32", "i64": "u64",
        "u64": "u64", "fp32": "f32", "fp64": "f64"}  # fmt: skip


def parameters(signature: Any) -> list[str]:
    """The PTX types of a kernel's parameters: those of the signature that are no constants, and two scratch buffers."""

    def flat(kind: Any) -> Iterator[str]:
        if isinstance(kind, (tuple, list)):
            for part in kind:
                yield from flat(part)
        elif kind != "constexpr":
            yield "u64" if kind[0] == "*" else _PTX[kind]

    return [*flat(tuple(signature.values())), "u64", "u64"]


def ptx(name: str, signature: Any) -> str:
    declared = ",\n".join(f"\t.param .{kind} {name}_param_{i}" for i, kind in enumerate(parameters(signature)))
    return f".visible .entry {name}(\n{declared}\n)\n{{\n}}\n"


def compile(src: Any, target: Any, options: dict[str, Any], _env_vars: Any = None) -> CompiledKernel:
    """In place of `triton.compile`."""
    options = make_backend(target).parse_options({**options, **src.parse_options()})
    # A kernel is identified by its source, options and target, as in Triton.
    told = f"{src.hash()} {options.hash()} {target}"
    digest, name = hashlib.sha256(told.encode()).hexdigest(), src.fn.__name__
    metadata = {
        **vars(options), "hash": digest, "target": target, "name": name, "shared": 0, "tmem_size": None,
        "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0, "profile_scratch_align": 1,
        "tensordesc_meta": None,
    }  # fmt: skip
    files = {f"{name}.json": json.dumps(metadata, default=vars), f"{name}.cubin": ptx(name, src.signature)}
    folder = Path(os.environ["TRITON_CACHE_DIR"], "declared", digest)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text)
    return CompiledKernel(src, {file: str(folder / file) for file in files}, digest)


@contextlib.contextmanager
def declared_kernels() -> Iterator[None]:
    """Inside, what Triton is asked to compile is declared."""
    forget_kernels()
    with mock.patch.object(triton.compiler, "compile", compile):
        yield
    forget_kernels()


def forget_kernels() -> None:
    """Of all Triton functions: what they were compiled to. And the launch cache."""
    launch_cache.clear()
    for function in functions():
        function.device_caches.clear()


def functions() -> list[JITFunction]:
    """Those of the ops and of the tests: every one is a global of a module."""
    modules = [module for name, module in sys.modules.items() if name.startswith(("llama_kernels.", "tests."))]
    return [x for module in modules for x in vars(module).values() if issubclass(type(x), JITFunction)]
