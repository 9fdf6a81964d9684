"""The GPUs of the estimates: the rates of their datasheets, and the share of each rate that a program reaches."""

from __future__ import annotations

from typing import NamedTuple

# Measured on an H200: a large copy moved 4.3 of 4.8 TB/s (read plus written), a large product 788 of 989 TFLOP/s.
COPY_SHARE = 0.90
MATMUL_SHARE = 0.80


class Datasheet(NamedTuple):
    """Datasheet rates: memory in GB/s; dense TFLOP/s in half precision, and in float32 without tensor cores."""

    bandwidth: float
    half: float
    float32: float

    @property
    def ceilings(self) -> dict[str, float]:
        """Rates that a program reaches: GB/s of a copy, TFLOP/s of a product by dtype."""
        half, float32 = self.half * MATMUL_SHARE, self.float32 * MATMUL_SHARE
        return {"copy": self.bandwidth * COPY_SHARE, "bfloat16": half, "float16": half, "float32": float32}


GPUS = {
    "A100": Datasheet(2039, 312, 19.5),
    "H100": Datasheet(3350, 989, 67),
    "H200": Datasheet(4800, 989, 67),
    "B200": Datasheet(8000, 2250, 75),
    "MI300X": Datasheet(5300, 1307, 163.4),
}
