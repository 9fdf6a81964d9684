"""What a thread block holds in shared memory: rings of tiles, and the barriers through which they are handed over."""

from __future__ import annotations

from llama_kernels.ops.attention.hopper.gluon import gl, jit, mbarrier


@jit
def ring(desc, SLOTS: gl.constexpr):
    """Shared memory for SLOTS tiles of desc."""
    return gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_shape, desc.layout)  # noqa: RUF005


@jit
def tile_in(ring, slot):
    """The tile in a slot of `ring`, as [rows, width]."""
    tile = ring.index(slot)
    return tile.reshape([tile.shape[-2], tile.shape[-1]])


@jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """SLOTS barriers. A phase of each ends after ARRIVALS arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars
