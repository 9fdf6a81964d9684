"""`python -m llama_kernels`: what runs where on this machine, and why."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator

import torch

import llama_kernels as lk
from llama_kernels.language import HAS_TRITON, INTERPRETED, triton
from llama_kernels.ops.attention.hopper.choice import TILES, row
from llama_kernels.ops.attention.tables import FAMILIES, PASSES, WIDTHS, tile
from llama_kernels.runtime import arch_of

_OPS = (
    ("rope and its two fusions", "ops/rope.py"),
    ("qk_norm_rope", "ops/qk_norm_rope.py"),
    ("rms_norm, add_rms_norm", "ops/rms_norm.py"),
    ("attention, attention_varlen", "ops/attention/"),
    ("rope_attention", "ops/rope_attention.py"),
)


def cpu_path() -> tuple[str, str]:
    """What CPU tensors run, and why."""
    if not HAS_TRITON:
        return "reference", "Triton is not installed (it exists for Linux only)"
    if INTERPRETED:
        return "kernels, interpreted", "TRITON_INTERPRET=1: for proofs, thousands of times slower than a GPU"
    return "reference", "plain PyTorch; TRITON_INTERPRET=1 runs the kernels themselves, in Triton's interpreter"


def gpu_path() -> tuple[str, str]:
    """What CUDA and HIP tensors run, and why."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "nothing", "torch sees no GPU" if built else "this torch is built for CPUs only"
    if not HAS_TRITON:
        return "nothing", "Triton is not installed; no GPU tensor falls back to eager in silence"
    if INTERPRETED:
        return "kernels, interpreted", "TRITON_INTERPRET=1: copied to the CPU and back; unset it"
    return "kernels, compiled", "at first use, for each dtype, head width and set of options; then cached on disk"


def report(family: str | None) -> Iterator[str]:
    """Lines. `family`: show the attention tiles of this family, not of the GPUs here."""
    yield f"llama_kernels {lk.__version__}"
    version = triton.__version__ if HAS_TRITON else "none"
    yield f"  python {platform.python_version()}, torch {torch.__version__}, triton {version}"
    families = [] if family is None else [family]
    for i in range(torch.cuda.device_count()):
        properties, arch = torch.cuda.get_device_properties(i), arch_of(torch.device("cuda", i))
        families += [arch] if family is None and arch not in families else []
        gib = properties.total_memory / 2**30
        yield f"  cuda:{i}: {properties.name}, {gib:.0f} GiB, tiles of {arch}"

    (cpu, why_cpu), (gpu, why_gpu) = cpu_path(), gpu_path()
    yield f"\n  {'op':29}{'where':24}{'CPU tensors run':24}GPU tensors run"
    for op, where in _OPS:
        yield f"  {op:29}{where:24}{cpu:24}{gpu}"
    yield f"\n  CPU: {why_cpu}."
    yield f"  GPU: {why_gpu}."

    for arch in families:
        yield f"\nattention tiles on {arch}: query rows x keys, warps, stages"
        for dtype, names in ((torch.bfloat16, "half"), (torch.float32, "float32")):
            yield f"  {names:10}" + "".join(f"{f'D <= {width}':24}" for width in WIDTHS).rstrip()
            for pass_ in PASSES:
                tiles = (tile(arch, pass_, width, dtype) for width in WIDTHS)
                yield f"    {pass_:8}" + "".join(f"{t!s:24}" for t in tiles).rstrip()
        yield from _hopper(arch)
    if not families:
        yield f"\nattention tiles: --arch shows those of {', '.join(FAMILIES)}."


def _hopper(arch: str) -> Iterator[str]:
    """Which passes take a Hopper kernel instead, and why not."""
    for pass_, rows in TILES.items() if arch == "sm_90" else ():
        choices = [row(pass_, arch, torch.bfloat16, rows[i].width, rows[i].width) for i in range(len(rows))]
        if len(set(choices)) == 1:
            yield f"  hopper {pass_}, half: portable, {choices[0]}"
        else:
            said = (f"{'portable' if isinstance(c, str) else f'{c!s}'}" for c in choices)
            yield f"  hopper {pass_}, half: " + "".join(f"{what:24}" for what in said).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llama_kernels", description="What runs where on this machine.")
    parser.add_argument("--arch", choices=FAMILIES, help="show the attention tiles of this family of GPUs")
    print("\n".join(report(parser.parse_args().arch)))


if __name__ == "__main__":
    sys.exit(main())
