"""Attention of others: Triton's tutorial 06, flash-linear-attention, and FlashAttention-3 from its machine code."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.codegen import sass
from bench.estimate.kernels import Kernel, compiled
from bench.estimate.peers.loading import Missing, found, jitted, module, stand_in
from bench.estimate.sm.code import parsed
from bench.estimate.tiles import Shape

# Of those that the tutorial's autotuner tries, the ones that can be best: BLOCK_M, BLOCK_N, warps, stages.
_TUTORIAL_TILES = ((128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3))


def _tutorial(folder: Path) -> ModuleType:
    stand_in("pytest", mark=_Marks(), skip=None)
    return module(found(folder, "06-fused-attention.py"), "tutorial_06")


class _Marks:
    """pytest.mark, as far as the tutorial decorates its tests with it."""

    def __getattr__(self, name: str):
        return lambda *_, **__: lambda f: f


def tutorial_06_descriptors(folder: Path, family: str, shape: Shape) -> list[Kernel]:
    """The forward with tensor descriptors (2025 and later), with each tile."""
    forward = jitted(_tutorial(folder)._attn_fwd)
    if "desc_q" not in forward.arg_names:
        raise Missing("this tutorial 06 takes pointers, not descriptors")
    B, H, S, D = shape.B, shape.Hq, shape.S, shape.D
    q, lse, rows = torch.empty(B, H, S, D, dtype=torch.float16), torch.empty(B, H, S), B * H * S
    extra = {"IS_HOPPER": True} if "IS_HOPPER" in forward.arg_names else {}
    kernels = []
    for BLOCK_M, BLOCK_N, warps, stages in _TUTORIAL_TILES:
        if BLOCK_N > D:
            continue
        tensors = [q] * 4
        if family == "sm_90":
            blocks = (BLOCK_M, BLOCK_N, BLOCK_N, BLOCK_M)
            tensors = [TensorDescriptor(q, shape=[rows, D], strides=[D, 1], block_shape=[n, D]) for n in blocks]
        kernels += compiled(family, lambda tensors=tensors, m=BLOCK_M, n=BLOCK_N, w=warps, s=stages: forward[
            (triton.cdiv(S, m), B * H, 1)](
            0.1, lse, B, H, *tensors, N_CTX=S, HEAD_DIM=D, BLOCK_M=m, BLOCK_N=n, FP8_OUTPUT=False,
            STAGE=3 if shape.causal else 1, warp_specialize=False, num_warps=w, num_stages=s, **extra))  # fmt: skip
    return kernels


def tutorial_06_pointers(folder: Path, family: str, shape: Shape) -> list[Kernel]:
    """The forward with block pointers (2023 and 2024), with each tile. On Ampere, where descriptors are compiled to
    pointers, today's forward stands for it."""
    forward = jitted(_tutorial(folder)._attn_fwd)
    if "desc_q" in forward.arg_names:
        if family == "sm_80":
            return tutorial_06_descriptors(folder, family, shape)
        raise Missing("this tutorial 06 takes descriptors, not pointers")
    B, H, S, D = shape.B, shape.Hq, shape.S, shape.D
    q, lse = torch.empty(B, H, S, D, dtype=torch.float16), torch.empty(B, H, S)
    strides = q.stride() * 4
    kernels = []
    for BLOCK_M, BLOCK_N, warps, stages in _TUTORIAL_TILES[1:]:
        kernels += compiled(family, lambda m=BLOCK_M, n=BLOCK_N, w=warps, s=stages: forward[
            (triton.cdiv(S, m), B * H, 1)](
            q, q, q, 0.1, lse, q, *strides, B, H, N_CTX=S, HEAD_DIM=D, BLOCK_M=m, BLOCK_N=n,
            STAGE=3 if shape.causal else 1, num_warps=w, num_stages=s))  # fmt: skip
    return kernels


# --- FlashAttention-3 ------------------------------------------------------------------------------------------------

# By pass, width of heads and causal: rows and keys of a tile, warp groups that multiply.
_FA3_TILES = {
    ("Fwd", 128, False): (128, 176, 2), ("Fwd", 128, True): (128, 128, 2),
    ("Fwd", 64, False): (192, 192, 3), ("Fwd", 64, True): (192, 128, 3),
    ("Bwd", 128, False): (80, 128, 2), ("Bwd", 128, True): (64, 128, 2),
    ("Bwd", 64, False): (128, 128, 2), ("Bwd", 64, True): (128, 128, 2),
}  # fmt: skip


def flash_attention_3_forward(folder: Path, family: str, shape: Shape) -> list[Kernel]:
    return [_flash_attention_3(folder, "Fwd", shape.D, shape.causal)]


def flash_attention_3_backward(folder: Path, family: str, shape: Shape) -> list[Kernel]:
    return [_flash_attention_3(folder, "Bwd", shape.D, shape.causal)]


@functools.cache
def _flash_attention_3(folder: Path, direction: str, D: int, causal: bool) -> Kernel:
    """The float16 kernel without options, from its library: _C.so of flash_attn_3, as in the wheel of xformers."""
    BLOCK_M, BLOCK_N, groups = _FA3_TILES[direction, D, causal]
    # Clusters of one, the tile, float16; then: causal, local, softcap, variable lengths.
    head = (
        rf"FlashAttn{direction}Sm90INS1_25CollectiveMainloop{direction}Sm90I(Li2E)+N4cute5tupleIJNS5_1CILi1EEES8_S8_EE"
    )
    sizes = rf"ENS6_IJ{_mangled(BLOCK_M, BLOCK_N, D)}EEE(Li{D}E)?NS_6half_tEfNS_4arch4Sm90E"
    text = _code_of(found(folder, "flash_attn_3/_C.so"), f"{head}{sizes}Lb{int(causal)}ELb0ELb0ELb0E")
    name = f"flash_attention_3_{'forward' if direction == 'Fwd' else 'backward'}"
    constants = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    return Kernel(name, "sm_90", (1,), 4 * groups, 168, 0, 200 * 1024, constants, parsed(text))


def _mangled(*sizes: int) -> str:
    """A tile in the name of a kernel, as C++ mangles it: a size that came before is named by its place."""
    known: dict[int, str] = {}
    text = ""
    for size in sizes:
        text += known.get(size, f"NS7_ILi{size}EEE")
        known.setdefault(size, f"S{'AB'[min(len(known), 1)]}_")
    return text


def _code_of(library: Path, pattern: str) -> str:
    """What nvdisasm prints of the shortest kernel of `library` whose name matches: that with the fewest options."""
    kernels = [
        text
        for cubin in _cubins(library)
        if re.search(pattern.encode(), cubin)
        for name, text in _kernels(cubin)
        if re.search(pattern, name)
    ]
    if not kernels:
        raise Missing(f"{library} has no kernel {pattern}")
    return min(kernels, key=len)


@functools.cache
def _cubins(library: Path) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sass.TOOLS / "cuobjdump", "-xelf", "all", library]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        return [path.read_bytes() for path in sorted(Path(folder).glob("*.sm_90a.cubin"))]


@functools.lru_cache(maxsize=4)
def _kernels(cubin: bytes) -> list[tuple[str, str]]:
    """(mangled name, what nvdisasm prints) of each."""
    parts = re.split(r"\n\s+\.section\s+\.text\.", sass.disassembled(cubin, "-hex"))[1:]
    return [(part.split(",", 1)[0], part) for part in parts]
