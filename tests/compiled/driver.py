"""A Triton driver whose launches run the compiled PTX in the PTX simulator, on CPU tensors.

    with running("sm_80") as log:
        kernel[grid](x, y, ...)
    assert not log.findings

Triton binds, specialises and compiles as for a GPU; only ptxas, which makes machine code of the PTX, is left out.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from .descriptors import Descriptor
from .global_memory import Region
from .kernel import Kernel
from .report import Checks, Report

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
_CACHE = "without-ptxas"
_MOST_ELEMENTS = 2**26  # of an extent whose elements are looked at one by one


class Launched(NamedTuple):
    """What `Kernel.launch` was given, to launch it again."""

    ptx: str  # path
    grid: tuple[int, int, int]
    values: list[Any]
    regions: list[Region]
    shared: int
    tensors: list[torch.Tensor]  # the arguments


@dataclasses.dataclass
class Log:
    """Every launch since the driver was set. `launches`: a list to keep what was launched, or None."""

    checks: Checks = dataclasses.field(default_factory=Checks)
    reports: list[Report] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    launches: list[Launched] | None = None

    @property
    def findings(self) -> list[str]:
        return [f"{report.kernel}: {what} ({n} x)" for report in self.reports for what, n in report.findings.items()]


class _Utils:
    def load_binary(self, *_: Any) -> tuple[object, int, int, int, int]:
        return object(), 0, 0, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 2}


def region(index: int, name: str, x: torch.Tensor) -> Region:
    """A tensor argument, from its first element to its last; elements in between may belong to others."""
    name = f"{name} ({str(x.dtype)[6:]} of shape {tuple(x.shape)}, strides {x.stride()})"
    if not x.numel():
        return Region.of(index, name, x.data_ptr(), 0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    owned = None
    if x.numel() < extent <= _MOST_ELEMENTS:
        mask = torch.zeros(extent, dtype=torch.bool)
        mask.as_strided(x.shape, x.stride()).fill_(True)
        owned = mask.numpy()
    return Region.of(index, name, x.data_ptr(), extent * x.itemsize, x.itemsize, owned)


_kernels: dict[str, Kernel] = {}  # by the path of the PTX


class Launcher:
    """Launches one compiled kernel. Triton keeps it for as long as it keeps the kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.metadata = metadata
        names = getattr(src.fn, "arg_names", None) or list(src.signature)
        self.parameters = list(zip(names, src.signature.values(), strict=True))
        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
        self.path = files[f"{metadata.name}.ptx"]
        if self.path not in _kernels:
            _kernels[self.path] = Kernel(Path(self.path).read_text())
        self.kernel = _kernels[self.path]

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, about: Any, enter: Any,
                 leave: Any, *args: Any) -> None:  # fmt: skip
        if enter is not None:
            enter(about)
        if self.metadata.global_scratch_size or self.metadata.profile_scratch_size:
            raise NotImplementedError(f"{self.kernel.name}: a kernel with scratch memory in global memory")
        arguments = _Arguments(getattr(self.metadata, "tensordesc_meta", None) or ())
        for (name, kind), value in zip(self.parameters, args, strict=True):
            arguments.add(name, kind, value)
        values = arguments.values
        values += [0] * (len(self.kernel.program.entry.params) - len(values))  # pointers to scratch, none here
        log: Log = driver.active.log
        if log.launches is not None:
            given = values, arguments.regions, self.metadata.shared, arguments.tensors
            log.launches.append(Launched(self.path, (x, y, z), *given))
        begin = time.perf_counter()
        report = self.kernel.launch((x, y, z), values, arguments.regions, self.metadata.shared, log.checks)
        log.seconds[self.kernel.name] += time.perf_counter() - begin
        log.reports.append(report)
        if leave is not None:
            leave(about)


class _Arguments:
    """A launch's arguments as PTX parameters."""

    def __init__(self, boxes: Any) -> None:
        self.boxes = iter(boxes)  # what the compiler says of each tensor descriptor's box
        self.values: list[int | float | Descriptor] = []
        self.regions: list[Region] = []
        self.tensors: list[torch.Tensor] = []

    def _address(self, name: str, x: torch.Tensor) -> int:
        if x.device.type != "cpu":
            raise ValueError(
                f"the kernel's argument {name} is on {x.device}; wanted CPU tensors: the PTX simulator has no GPU"
            )
        self.tensors.append(x)
        self.regions.append(region(len(self.regions), name, x))
        return self.regions[-1].address

    def add(self, name: str, kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for i, pair in enumerate(zip(kind, value, strict=True)):
                self.add(f"{name}[{i}]", *pair)
        elif kind == "constexpr":
            return
        elif str(kind).startswith("tensordesc"):
            box, base = next(self.boxes), value.base
            dtype = "bf16" if base.dtype == torch.bfloat16 else f"f{box['elem_size']}"
            self.values.append(
                Descriptor(self._address(name, base), tuple(value.shape), tuple(value.strides),
                           tuple(box["block_size"]), box["elem_size"], box["swizzle"], dtype)
            )  # fmt: skip
            self.values.extend((*value.shape, *value.strides))
        elif kind[0] == "*":
            self.values.append(0 if value is None else self._address(name, value))
        else:
            self.values.append(value)


class Driver:
    """What Triton asks a driver for."""

    utils = _Utils()

    def __init__(self, target: str, log: Log) -> None:
        self.target, self.log = target, log

    def launcher_cls(self, src: Any, metadata: Any) -> Launcher:
        return Launcher(src, metadata)

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return 100 + list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def running(target: str, checks: Checks | None = None) -> Iterator[Log]:
    """Inside, kernels launched on CPU tensors are compiled for `target` (sm_80 or sm_90) and run in the PTX simulator.

    What is compiled here has no machine code, so it is kept in a folder of its own of Triton's cache.
    """
    log, before = Log(checks or Checks()), driver._active
    cache = str(Path(knobs.cache.dir) / _CACHE) if Path(knobs.cache.dir).name != _CACHE else knobs.cache.dir
    driver.set_active(Driver(target, log))
    try:
        with (
            mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
            mock.patch.object(CUDABackend, "make_cubin", lambda *_: b"none"),
        ):
            yield log
    finally:
        driver._active = before
