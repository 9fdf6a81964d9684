"""Launches a compiled kernel: PTX text, a grid, parameters, and the tensors that it may touch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .descriptors import Descriptor
from .emit import load_opcodes
from .global_memory import Global, Region
from .machine import Machine
from .parse import Entry, parse
from .program import DESCRIPTORS, Program
from .report import Checks, Report

LANES = 4096  # threads at once; more thread blocks wait


class Kernel:
    """PTX text, or an entry that was read from one, ready to launch."""

    def __init__(self, ptx: str | Entry) -> None:
        load_opcodes()
        self.program = Program(parse(ptx) if isinstance(ptx, str) else ptx)
        self.name = self.program.entry.name

    def launch(
        self,
        grid: tuple[int, ...],
        args: Sequence[int | float | Descriptor],
        regions: Sequence[Region],
        dynamic_shared: int = 0,
        checks: Checks | None = None,
    ) -> Report:
        """Run all programs of the grid.

        args: in the order of the .param list. Pointers are addresses of `regions`.
        dynamic_shared: bytes of the extern shared array.

        Raises:
            Fault: what would stop the kernel on a GPU, or hang it.
            NotImplementedError: an instruction that is not supported.
        """
        entry = self.program.entry
        if len(args) != len(entry.params):
            raise TypeError(f"{self.name} has {len(entry.params)} parameters, got {len(args)}")
        params: dict[str, np.ndarray] = {}
        descriptors: dict[int, Descriptor] = {}
        for i, ((name, kind, size), value) in enumerate(zip(entry.params, args, strict=True)):
            if isinstance(value, Descriptor):
                descriptors[DESCRIPTORS + 4096 * i] = value
            elif kind[0] == "f":
                params[name] = np.array([value], f"f{size}")
            else:
                params[name] = np.array([value], f"{'i' if value < 0 else 'u'}{size}").view(f"u{size}")
        report = Report(self.name)
        grid = (*grid, 1, 1)[:3]
        total = grid[0] * grid[1] * grid[2]
        memory, checks = Global(regions), checks or Checks()
        at_once = 1 if self.program.specialised or checks.clocks else max(1, LANES // entry.threads)
        for first in range(0, total, at_once):
            ctas = np.arange(first, min(first + at_once, total))
            Machine(self.program, grid, ctas, params, descriptors, memory, dynamic_shared, checks, report).run()
        blocks = self.program.blocks
        report.counts["instructions"] = sum(n * (blocks[b].last - blocks[b].first) for b, n in report.blocks.items())
        return report
