"""What a machine and its stages leave behind, made up."""

from __future__ import annotations

from bench.gpu_check.stages import Machine

ABOUT = {"torch": "2.13.0", "triton": "3.6.0", "python": "3.11.7", "gpu": "Imitated GPU", "driver": "1.0",
         "commit": "abc1234", "date": "2026-01-02T03:04:05+00:00"}  # fmt: skip
HOPPER = Machine(True, "/usr/bin/compute-sanitizer", 16)
