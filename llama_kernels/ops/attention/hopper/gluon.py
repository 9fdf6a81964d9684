"""Gluon as the Hopper kernels use it. Only this module imports it, since its names differ between releases of Triton.

Gluon is Triton's lower-level language, in which layouts, shared memory, barriers and warp groups are explicit. Where it
is missing, or is of another release than these kernels know, HAS_GLUON is False, WHY_NOT gives the reason, and
attention uses the portable kernels.
"""

from __future__ import annotations

from llama_kernels.core.language import HAS_TRITON, INTERPRETED, Placeholder, triton

__all__ = [
    "HAS_GLUON", "WHY_NOT", "TensorDescriptor", "fence_async_shared", "gl", "jit", "mbarrier", "tma", "tma_add",
    "tma_load", "tma_store", "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip

HAS_GLUON, WHY_NOT = False, "Triton is not installed"
if INTERPRETED:
    WHY_NOT = "Triton's interpreter does not run Gluon"
elif HAS_TRITON:
    try:
        from triton.experimental.gluon import jit
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.language.nvidia.hopper import (
            fence_async_shared,
            mbarrier,
            tma,
            warpgroup_mma,
            warpgroup_mma_wait,
        )
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        if hasattr(tma, "async_load"):
            tma_load, tma_store, tma_add = tma.async_load, tma.async_store, tma.async_atomic_add
        else:  # Triton 3.6 compiles the reduction, but has no function for it
            from triton._C.libtriton import ir
            from triton.experimental.gluon.language._core import builtin

            tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

            @builtin
            def tma_add(tensor_desc, coord, src, _semantic=None):
                """Add a tile in shared memory to global memory."""
                at = _semantic._convert_to_ir_values(coord, require_i64=False)
                add = ir.DESCRIPTOR_REDUCE_KIND.ADD
                _semantic.builder.create_async_tma_reduce(add, tensor_desc.handle, at, src.handle)

    except (ImportError, AttributeError) as error:
        WHY_NOT = f"the Gluon of triton {triton.__version__} is not the one these kernels are written in ({error})"
    else:
        HAS_GLUON, WHY_NOT = True, ""
if not HAS_GLUON:  # the modules that define kernels can then be imported
    gl = mbarrier = tma = Placeholder()
    fence_async_shared = warpgroup_mma = warpgroup_mma_wait = tma_load = tma_store = tma_add = TensorDescriptor = gl

    def jit(fn):
        return fn
