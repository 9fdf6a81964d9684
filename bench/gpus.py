"""The GPUs of the estimates: what their datasheets say, and how much of it a program reaches."""

from __future__ import annotations

from typing import NamedTuple

COPY_SHARE = 0.90  # of the datasheet's bandwidth, read plus written, that a plain copy reaches
MATMUL_SHARE = 0.80  # of the datasheet's dense rate that a large product reaches
# Both as seen on an H200: 4.3 of 4.8 TB/s, 788 of 989 TFLOP/s.


class Gpu(NamedTuple):
    """From the datasheet: GB/s of memory, dense TFLOP/s in half precision and in float32 without tensor cores."""

    bandwidth: float
    half: float
    float32: float

    @property
    def ceilings(self) -> dict[str, float]:
        half, float32 = self.half * MATMUL_SHARE, self.float32 * MATMUL_SHARE
        return {"copy": self.bandwidth * COPY_SHARE, "bfloat16": half, "float16": half, "float32": float32}


GPUS = {
    "A100": Gpu(2039, 312, 19.5),
    "H100": Gpu(3350, 989, 67),
    "H200": Gpu(4800, 989, 67),
    "B200": Gpu(8000, 2250, 75),
    "MI300X": Gpu(5300, 1307, 163.4),
}
