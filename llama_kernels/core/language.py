"""Triton, and the device functions that all kernels share.

Triton exists for Linux only. Without it the names below are placeholders: modules that define kernels can still be
imported, and CPU tensors take the reference.
"""

from __future__ import annotations

from typing import Any

from llama_kernels.core.versions import check_version, interpreter_fault, major_minor


class Placeholder:
    """Takes the place of a module that is missing. Any attribute of it, and any call, is the placeholder itself."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


try:
    import triton
except ImportError as error:
    if not (isinstance(error, ModuleNotFoundError) and error.name == "triton"):
        fault = f"Triton is installed, but cannot be imported: {error}"
        if error.name == "numpy":  # imported by Triton's interpreter alone
            fault = f"TRITON_INTERPRET is set, and {interpreter_fault('', None)}"
        raise ImportError(f"llama_kernels: {fault}", name=error.name) from error

    triton = Placeholder()
    HAS_TRITON = INTERPRETED = False
else:
    check_version("triton", triton.__version__)
    import triton.language as tl

    HAS_TRITON = True
    # Triton decides at decoration whether a kernel is compiled or interpreted, so this is fixed once imported.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    if INTERPRETED:
        import numpy

        if reason := interpreter_fault(triton.__version__, numpy.__version__):
            raise ImportError(f"llama_kernels: TRITON_INTERPRET is set, and {reason}", name="numpy")

if not HAS_TRITON:
    tl = triton


def why_not_interpreted() -> str | None:
    """Why a process with TRITON_INTERPRET=1 cannot run the kernels here, or None where it can."""
    if not HAS_TRITON:
        return "Triton is not installed."
    try:
        import numpy
    except ImportError:
        return interpreter_fault(triton.__version__, None)
    return interpreter_fault(triton.__version__, numpy.__version__)


# Such as (3, 6). Releases compile differently: a tile that fits the registers with one may spill with the next.
TRITON_VERSION = major_minor(triton.__version__) if HAS_TRITON else (0, 0)

# The interpreter stores bfloat16 as 16-bit integers. Its loads and casts to float32 are right; its arithmetic, its dot
# and its rounding are not. Only the two functions below depend on it.
_BF16_IS_BITS: tl.constexpr = tl.constexpr(INTERPRETED)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 `x` rounded once, to nearest even, to `dtype`. Compiled, this is `x.to(dtype)` and nothing else."""
    if _BF16_IS_BITS and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40  # the carry above would make some NaNs infinite
        y = tl.where(x == x, nearest, quiet_nan).to(tl.uint16).to(dtype, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def dot(a, b, acc=None):
    """`a @ b (+ acc)` with a float32 result.

    bfloat16 and float16 are multiplied on tensor cores; float32 without them, since they would round it to TF32.
    """
    if _BF16_IS_BITS and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def inverse_root(x):
    """1 / sqrt(x) of float32 x. The GPU's instruction treats x below 2^-126 as 0, so small x is scaled first."""
    small = x < 2.0**-100
    root = tl.rsqrt(tl.where(small, x * 2.0**48, x))
    return tl.where(small, root * 2.0**24, root)
