"""Which thread holds which element of a matrix: in mma registers, and in shared memory for wgmma."""

from __future__ import annotations

import functools

import numpy as np

from .floats import tf32, widen


def _operand(x: np.ndarray, kind: str) -> np.ndarray:
    """One register of every lane, as (warps, 8, elements).

    Lane 4 g + t holds row g: element t of four (TF32), or elements 2 t and 2 t + 1 of eight (16-bit floats).
    """
    if kind == "tf32":
        return tf32(x.view("f4")).reshape(-1, 8, 4)
    return widen(np.ascontiguousarray(x).view("u2"), kind).reshape(-1, 8, 8)


def a_fragment(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """A, (warps, 16, k). The registers hold rows 0 to 7, then rows 8 to 15, then the same of the next columns."""
    parts = [_operand(x, kind) for x in registers]
    columns = [np.concatenate(parts[i : i + 2], 1) for i in range(0, len(parts), 2)]
    return np.concatenate(columns, 2)


def b_fragment(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """B transposed, (warps, 8, k)."""
    return np.concatenate([_operand(x, kind) for x in registers], 2)


def c_fragment(registers: list[np.ndarray]) -> np.ndarray:
    """C, (warps, 16, 8 blocks), from four registers for each block of eight columns."""
    blocks = len(registers) // 4
    lanes = np.stack(registers, -1).reshape(-1, 8, 4, blocks, 2, 2)  # warp, g, t, block, half of rows, pair
    return lanes.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 8 * blocks)


def c_registers(c: np.ndarray) -> list[np.ndarray]:
    """The inverse of c_fragment."""
    warps, _, columns = c.shape
    lanes = c.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(np.ascontiguousarray(lanes).reshape(columns // 2, warps * 32))


# --- wgmma's operands in shared memory -------------------------------------------------------------------------------

_ROW_BYTES = {1: 128, 2: 64, 3: 32, 0: 16}  # by the swizzle mode of a descriptor
_XOR = {0: 0, 1: 7, 2: 3, 3: 1}  # bits 7 and up of an address that are mixed into bits 4 and up


@functools.cache
def _relative(rows: int, k: int, each: int, mn_major: bool, swizzle: int, leading: int, stride: int) -> np.ndarray:
    """Bytes from a descriptor's start to each element, (rows, k), before the swizzle."""
    span = _ROW_BYTES[swizzle]
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    if mn_major:
        wide = span // each
        if swizzle:
            return r % wide * each + r // wide * leading + c % 8 * span + c // 8 * stride
        return r % wide * each + r // wide * stride + c % 8 * span + c // 8 * leading
    inner = c * each if swizzle else c * each % 16 + c * each // 16 * leading
    return r // 8 * stride + r % 8 * span + inner


def descriptor_places(descriptor: int, rows: int, k: int, each: int, mn_major: bool) -> np.ndarray:
    """Shared addresses of the elements (rows, k) that a 64-bit matrix descriptor describes; `each` is their bytes."""
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    swizzle = descriptor >> 62
    if descriptor >> 49 & 7:
        raise NotImplementedError("a matrix descriptor with a base offset")
    places = start + _relative(rows, k, each, mn_major, swizzle, leading, stride)
    return places ^ ((places >> 7 & _XOR[swizzle]) << 4)
