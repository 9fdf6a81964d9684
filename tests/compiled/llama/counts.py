"""What each kernel executes, counted by tests/compiled. `python -m tests.compiled.llama.counts` records it.

Instructions of a warp, bytes, tensor-core operations, and passes of shared memory with and without bank conflicts, of a
call a kernel. A change of a kernel that makes it execute more, or move more, shows without a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")

import torch
import triton

import llama_kernels as lk
from tests.compiled.driver import running
from tests.compiled.llama.plugin import kernels_on_cpu
from tests.compiled.report import Checks

RECORD = Path(__file__).with_suffix(".json")
Counts = dict[str, dict[str, int]]  # by kernel, then by what is counted
Record = dict[str, dict[str, Counts]]  # by the release of Triton, then by target


def calls() -> dict[str, Callable[[], object]]:
    """Calls of the ops in bfloat16, at width 64, which reach their kernels."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 256, H, 64).bfloat16().transpose(1, 2).requires_grad_() for H in (2, 1, 1))
    token, keys, values = (torch.randn(1, H, S, 64).bfloat16() for H, S in ((2, 1), (1, 1024), (1, 1024)))
    x, weight = torch.randn(32, 1024).bfloat16().requires_grad_(), torch.ones(1024).bfloat16().requires_grad_()
    head = torch.ones(64).bfloat16().requires_grad_()
    angles = lk.rope_tables(lk.rope_frequencies(64)[0], 256)

    def gradients(outputs: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> object:
        return torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])

    return {
        "attention": lambda: gradients((lk.attention(q, k, v),), (q, k, v)),
        "attention of fixed queries": lambda: gradients((lk.attention(q.detach(), k, v),), (k, v)),
        "decode": lambda: lk.attention(token, keys, values),
        "rms_norm": lambda: gradients((lk.rms_norm(x, weight),), (x, weight)),
        "rope": lambda: lk.rope(q, k, *angles),
        "qk_norm_rope": lambda: gradients(lk.qk_norm_rope(q, k, head, head, *angles), (q, k, head)),
    }


def measure(target: str) -> Counts:
    found: Counts = {}
    with kernels_on_cpu(target), running(target, Checks(races=False, banks=True)) as log:
        for op, call in calls().items():
            del log.reports[:]
            call()
            for report in log.reports:
                found[f"{op}: {report.kernel}"] = dict(sorted(report.counts.items()))
    return found


def differences(now: Counts, recorded: Counts, by: float = 0.02) -> list[str]:
    """Counts that are off by more than a share of the record."""
    out = [f"{kernel} is not recorded" for kernel in now if kernel not in recorded]
    for kernel, counts in recorded.items():
        for name, n in counts.items():
            m = now.get(kernel, {}).get(name, 0)
            if abs(m - n) > by * n:
                out.append(f"{kernel}: {m} {name}, recorded {n}")
    return out


def written(record: Record) -> str:
    """As JSON, one line a kernel."""
    releases = []
    for release, targets in sorted(record.items()):
        parts = []
        for target, kernels in sorted(targets.items()):
            lines = [f"   {json.dumps(kernel)}: {json.dumps(counts)}" for kernel, counts in sorted(kernels.items())]
            parts.append(f'  "{target}": {{\n' + ",\n".join(lines) + "\n  }")
        releases.append(f' "{release}": {{\n' + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(releases) + "\n}\n"


def main() -> int:
    record: Record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[triton.__version__] = {target: measure(target) for target in ("sm_80", "sm_90")}
    RECORD.write_text(written(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
