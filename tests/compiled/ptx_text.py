"""Small PTX kernels as text, for the machine's own tests."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from .descriptors import Descriptor
from .global_memory import Region
from .kernel import Kernel
from .report import Checks, Report

KERNEL = """
.version 8.3
.target {target}
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k({parameters})
.reqntid {threads}
{{
 .reg .b16 %h<20>;
 .reg .b32 %r<99>;
 .reg .b64 %rd<20>;
 .reg .pred %p<9>;
 mov.u32 %r0, %tid.x;
 mov.b32 %r1, smem;
{loads}
{body}
 ret;
}}
"""


def launch(
    body: str, *arrays: np.ndarray, threads: int = 32, target: str = "sm_90", shared: int = 1024, grid: int = 1,
    checks: Checks | None = None, owned: np.ndarray | None = None, boxes: Mapping[int, tuple] = MappingProxyType({}),
) -> Report:  # fmt: skip
    """Run PTX. %r0 is the thread, %r1 the address of `shared` bytes, %rd0, %rd1, ... are addresses of the arrays.

    owned: which elements of array 0 are its own.
    boxes: arrays that are passed as tensor descriptors, with the fields of `Descriptor` behind the address.
    """
    loads = "".join(f" ld.param.b64 %rd{i}, [k_param_{i}];\n" for i in range(len(arrays)) if i not in boxes)
    declared = ".param .u64 .ptr .global .align 1 k_param_{}", ".param .align 64 .b8 k_param_{}[128]"
    names = ", ".join(declared[i in boxes].format(i) for i in range(len(arrays)))
    text = KERNEL.format(target=target, parameters=names, threads=threads, loads=loads, body=body)
    regions = [
        Region.of(i, f"array {i}", x.ctypes.data, x.nbytes, x.itemsize, None if i else owned)
        for i, x in enumerate(arrays)
    ]
    args = [Descriptor(r.address, *boxes[i]) if i in boxes else r.address for i, r in enumerate(regions)]
    return Kernel(text).launch((grid,), args, regions, shared, checks)


_REGISTER = {8: ("h", 16), 16: ("h", 16), 32: ("r", 32), 64: ("rd", 64), 1: ("p", 1)}


def evaluate(text: str, result: int, operands: Sequence[int], rows: Sequence[Sequence[int]]) -> list[int]:
    """Run one instruction for each row of operands; d, a, b, c stand in `text` for its registers.

    result, operands: their bits; 1 for a predicate.
    """
    threads = -(-len(rows) // 32) * 32
    given = np.zeros((threads, len(operands)), "u8")
    given[: len(rows)] = np.array(rows, "u8")
    out = np.zeros(threads, "u8")
    lines = ["mul.wide.u32 %rd10, %r0, 8;", "add.s64 %rd11, %rd1, %rd10;",
             f"mul.wide.u32 %rd12, %r0, {8 * len(operands)};", "add.s64 %rd12, %rd0, %rd12;"]  # fmt: skip
    names, numbers = {}, itertools.count(5)
    for name, bits, i in zip("abc", operands, range(3), strict=False):
        prefix, width = _REGISTER[bits]
        names[name] = f"%{prefix}{next(numbers) if prefix != 'p' else i}"
        if bits == 1:
            lines.append(f"ld.global.b32 %r{50 + i}, [%rd12+{8 * i}]; setp.ne.s32 {names[name]}, %r{50 + i}, 0;")
        else:
            lines.append(f"ld.global.b{width} {names[name]}, [%rd12+{8 * i}];")
    prefix, width = _REGISTER[result]
    names["d"] = f"%{prefix}{8 if prefix == 'p' else next(numbers)}"
    words = [names.get(word, word) for word in re.sub(r"([,;{}])", r" \1 ", text).split()]
    lines.append(" ".join(words))
    if result == 1:
        lines.append(f"selp.b32 %r60, 1, 0, {names['d']}; st.global.b32 [%rd11], %r60;")
    else:
        lines.append(f"st.global.b{width} [%rd11], {names['d']};")
    launch("\n".join(lines), given, out, threads=threads)
    return out[: len(rows)].tolist()
