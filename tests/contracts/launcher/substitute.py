"""A process in which Triton runs on a substitute CUDA driver, and CPU tensors take the kernels.

`build` compiles the driver and gives the environment of the subprocess, which calls `install` before anything imports
the package. What is real there: the package's host code, Triton's binder, its launcher with its compiled C code, and
the PTX of the kernels. What is replaced, all of it here:
- libcuda.so.1, by cuda_driver.c;
- ptxas: a module's image is the PTX itself;
- of torch.cuda the current device and stream, which a CPU build of torch does not have;
- the device of tensors, which lie in the CPU's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pkgutil
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
# Of the driver's devices: 0 and 2 are alike, 1 is not.
ARCHITECTURES = ("sm_90", "sm_80", "sm_90", "sm_80")


def compiler() -> str | None:
    """The C compiler that Triton takes."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> dict[str, str]:
    """Compile the driver into `folder`. Returns the environment variables of a process that uses it."""
    import triton

    includes = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [compiler(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{includes}", HERE / "cuda_driver.c"]
    subprocess.run([*command, "-o", folder / "libcuda.so.1"], check=True)
    # Triton 3.6 compiles a launcher for each signature, with -O3, which takes most of the tests' time.
    quick = folder / "cc"
    quick.write_text(f'#!/bin/sh\nexec {compiler()} "$@" -O0\n')
    quick.chmod(quick.stat().st_mode | stat.S_IXUSR)
    return {
        "CC": str(quick),
        "CUDA_VISIBLE_DEVICES": "",
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_CACHE_DIR": str(folder / "cache"),  # its binaries are PTX: no other process is to find them
        "TRITON_INTERPRET": "0",
        "TRITON_LIBCUDA_PATH": str(folder),
    }


# --- what the driver received ----------------------------------------------------------------------------------------


class Launched(NamedTuple):
    device: int
    function: str  # its handle
    name: str
    grid: str
    block: str
    shared: int
    stream: int
    attributes: str
    parameters: tuple[str, ...]  # their bytes


def driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.recorder_take.restype = library.recorder_stream.restype = ctypes.c_void_p
    library.recorder_free.argtypes = [ctypes.c_void_p]
    library.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    return library


def take() -> list[Launched]:
    """The launches of this thread since the last call."""
    library = state.library
    taken = library.recorder_take()
    lines = ctypes.string_at(taken).decode().splitlines()
    library.recorder_free(taken)
    return [_launched(*line.split(" ")) for line in lines]


def _launched(
    device: str, function: str, name: str, grid: str, block: str, shared: str, stream: str, *rest: str
) -> Launched:
    attributes, parameters = rest
    return Launched(
        int(device), function, name, grid, block, int(shared), int(stream, 16), attributes, tuple(parameters.split(","))
    )


# --- the process -----------------------------------------------------------------------------------------------------


class _State(threading.local):
    """Of a thread, as in CUDA."""

    library: Any = None
    current = 0  # device
    home = 0  # the device that tensors are said to be on
    bound = 0  # launches that Triton bound
    streams: tuple[tuple[int, int], ...] = ()  # device and stream

    def __init__(self) -> None:
        self.library = driver()


state: _State
kernels: dict[str, Callable[..., Any]] = {}  # of the registered ops
called: set[str] = set()  # registered ops


def set_device(index: int) -> None:
    context = ctypes.c_void_p()
    if state.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), index):
        raise RuntimeError(f"there is no device {index}")
    state.library.cuCtxSetCurrent(context)
    state.current = index


@contextlib.contextmanager
def current_device(device: Any) -> Iterator[None]:
    """In place of torch.cuda.device."""
    before = state.current
    set_device(device if isinstance(device, int) else device.index)
    try:
        yield
    finally:
        set_device(before)


@contextlib.contextmanager
def tensors_on(index: int) -> Iterator[None]:
    """Inside, tensors are said to be on this device, in this thread. The current device stays what it is."""
    before, state.home = state.home, index
    try:
        yield
    finally:
        state.home = before


@contextlib.contextmanager
def on_stream(device: int) -> Iterator[int]:
    """Inside, a new stream is the current one of `device`."""
    before, stream = state.streams, state.library.recorder_stream(device)
    state.streams = ((device, stream), *before)
    try:
        yield stream
    finally:
        state.streams = before


def current_stream(device: int) -> int:
    return next((stream for of, stream in state.streams if of == device), 0)


def install() -> None:
    """Make this process launch on the substitute driver. Before the package is imported."""
    global state
    import torch

    if "llama_kernels" in sys.modules:
        raise RuntimeError("the package was imported before its registered ops could be noted")
    state = _State()
    _note_kernels(torch)
    import llama_kernels.ops

    for module in pkgutil.walk_packages(llama_kernels.ops.__path__, "llama_kernels.ops."):
        importlib.import_module(module.name)
    _serve_cpu_tensors(torch)
    _set_triton_driver()


def _note_kernels(torch: Any) -> None:
    impl = torch.library.Library.impl

    def noting(self: Any, name: str, function: Any, key: str = "", **options: Any) -> None:
        if self.ns == "llama_kernels" and key == "CUDA":
            kernels[name] = function
        impl(self, name, function, key, **options)

    torch.library.Library.impl = noting


def _serve_cpu_tensors(torch: Any) -> None:
    import warnings

    from llama_kernels.core import device, registry

    def noting(name: str, kernel: Any) -> Any:
        def call(*args: Any) -> Any:
            called.add(name)
            return kernel(*args)

        return call

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an implementation is replaced, on purpose
        for name, kernel in kernels.items():
            registry.LIBRARY.impl(name, noting(name, kernel), "CPU", allow_override=True)
    torch.Tensor.is_cuda = property(lambda _: True)
    torch.Tensor.get_device = lambda _: state.home
    torch.Tensor.device = property(lambda _: torch.device("cpu", state.home))
    torch.cuda.current_device = lambda: state.current
    torch.cuda.device = current_device
    original = device.arch_of
    for module in [module for name, module in sys.modules.items() if name.startswith("llama_kernels")]:
        if getattr(module, "arch_of", None) is original:
            module.arch_of = lambda device: ARCHITECTURES[device.index]


def _set_triton_driver() -> None:
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver as triton_driver
    from triton.runtime.jit import JITFunction

    CUDABackend.make_cubin = lambda self, ptx, *_: ptx.encode()
    real = CudaDriver()
    real.get_current_device = lambda: state.current
    real.get_current_stream = current_stream
    real.get_device_capability = lambda device: divmod(int(ARCHITECTURES[device][3:]), 10)
    triton_driver.set_active(real)
    run = JITFunction.run

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        state.bound += 1
        return run(self, *args, **options)

    JITFunction.run = counting
