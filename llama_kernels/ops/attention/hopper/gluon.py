"""Gluon as the Hopper kernels use it: the one module that imports it, and knows how its names drift between releases.

Gluon is Triton's lower language: layouts, shared memory, barriers and warp groups are said, not inferred. Where it is
missing or has moved on, HAS_GLUON is False, `WHY_NOT` says so, and attention takes its portable kernels.
"""

from __future__ import annotations

from llama_kernels.core.language import HAS_TRITON, INTERPRETED, triton

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
        else:  # triton 3.6 compiles the reduction, and has no name for it
            from triton._C.libtriton import ir
            from triton.experimental.gluon.language._core import builtin

            tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

            @builtin
            def tma_add(tensor_desc, coord, src, _semantic=None):
                """Add a tile of shared memory onto global memory."""
                at = _semantic._convert_to_ir_values(coord, require_i64=False)
                add = ir.DESCRIPTOR_REDUCE_KIND.ADD
                _semantic.builder.create_async_tma_reduce(add, tensor_desc.handle, at, src.handle)

    except (ImportError, AttributeError) as error:
        WHY_NOT = f"the Gluon of triton {triton.__version__} is not the one these kernels are written in ({error})"
    else:
        HAS_GLUON, WHY_NOT = True, ""
if not HAS_GLUON:  # so that modules which define kernels still import

    class _Hollow:
        """Any attribute and any call give it back."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    gl = mbarrier = tma = _Hollow()
    fence_async_shared = warpgroup_mma = warpgroup_mma_wait = tma_load = tma_store = tma_add = TensorDescriptor = gl

    def jit(fn):
        return fn
