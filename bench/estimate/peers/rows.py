"""RMSNorm and RoPE of Liger, Unsloth and flash-linear-attention. Each function gives the kernels of one call."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from bench.estimate.kernels import Kernel, compiled
from bench.estimate.peers.loading import found, jitted, module, stand_in

_TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _liger(folder: Path, name: str) -> ModuleType:
    return module(found(folder, f"liger_kernel/ops/{name}.py"), f"liger_kernel.ops.{name}")


def _unsloth(folder: Path, name: str) -> ModuleType:
    path = found(folder, f"unsloth/kernels/{name}.py")
    settings = _liger(folder, "utils").calculate_settings
    stand_in("unsloth.device_type", DEVICE_COUNT=1)
    stand_in("unsloth.kernels.utils", calculate_settings=settings, torch_gpu_device=None, torch_device_stream=None)
    return module(path, f"unsloth.kernels.{name}")


def _rows(M: int, N: int, dtype: torch.dtype, weight: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty(M, N, dtype=dtype), torch.empty(N, dtype=weight), torch.empty(M)


def liger_rms_norm(folder: Path, family: str, M: int, N: int, dtype: torch.dtype, weight: torch.dtype) -> list[Kernel]:
    """One program a row, which it takes for all but short rows."""
    peer, (x, w, rstd) = _liger(folder, "rms_norm"), _rows(M, N, dtype, weight)
    block, warps = peer.calculate_settings(N)
    kernel = jitted(peer._rms_norm_forward_kernel)
    return compiled(family, lambda: kernel[(M,)](
        x, N, x, N, w, 1, rstd, 1, N, 1e-6, 0.0, 0, True, BLOCK_SIZE=block, num_warps=warps))  # fmt: skip


def liger_rms_norm_backward(
    folder: Path, family: str, M: int, N: int, dtype: torch.dtype, weight: torch.dtype, sms: int = 132
) -> list[Kernel]:
    peer, (x, w, rstd) = _liger(folder, "rms_norm"), _rows(M, N, dtype, weight)
    block, warps = peer.calculate_settings(N)
    kernel, dw = jitted(peer._rms_norm_backward_kernel), torch.empty(sms, N)
    return compiled(family, lambda: kernel[(sms,)](
        x, N, x, N, x, N, _TL[dtype], w, 1, rstd, 1, dw, N, M, N, 0.0, -(-M // sms), 0, True, BLOCK_SIZE=block,
        num_warps=warps))  # fmt: skip


def liger_add_rms_norm(
    folder: Path, family: str, M: int, N: int, dtype: torch.dtype, weight: torch.dtype
) -> list[Kernel]:
    peer, (x, w, rstd) = _liger(folder, "fused_add_rms_norm"), _rows(M, N, dtype, weight)
    block, warps = peer.calculate_settings(N)
    kernel = jitted(peer._fused_add_rms_norm_forward_kernel)
    return compiled(family, lambda: kernel[(M,)](
        x, N, x, N, x, N, x, N, w, 1, rstd, 1, N, 1e-6, 0.0, 0, BLOCK_SIZE=block, num_warps=warps))  # fmt: skip


def liger_add_rms_norm_backward(
    folder: Path, family: str, M: int, N: int, dtype: torch.dtype, weight: torch.dtype, sms: int = 132
) -> list[Kernel]:
    peer, (x, w, rstd) = _liger(folder, "fused_add_rms_norm"), _rows(M, N, dtype, weight)
    block, warps = peer.calculate_settings(N)
    kernel, dw = jitted(peer._fused_add_rms_norm_backward_kernel), torch.empty(sms, N)
    values: dict[str, Any] = {
        "dY_ptr": x, "dY_row_stride": N, "dS_out_ptr": x, "dS_out_row_stride": N, "dX_ptr": x, "dX_row_stride": N,
        "X_ptr": x, "X_row_stride": N, "X_dtype": _TL[dtype], "W_ptr": w, "W_row_stride": 1, "RSTD_ptr": rstd,
        "RSTD_row_stride": 1, "dW_ptr": dw, "dW_row_stride": N, "n_rows": M, "n_cols": N, "offset": 0.0,
        "rows_per_program": -(-M // sms), "casting_mode": 0, "BLOCK_SIZE": block, "has_dS_out": True,
    }  # fmt: skip
    given = {name: values[name] for name in kernel.arg_names}
    return compiled(family, lambda: kernel[(sms,)](**given, num_warps=warps))


def unsloth_rms_norm(
    folder: Path, family: str, M: int, N: int, dtype: torch.dtype, weight: torch.dtype
) -> list[Kernel]:
    peer, (x, w, rstd) = _unsloth(folder, "rms_layernorm"), _rows(M, N, dtype, weight)
    block, warps = _liger(folder, "utils").calculate_settings(N)
    kernel = jitted(peer._rms_layernorm_forward)
    return compiled(family, lambda: kernel[(M,)](
        x, N, x, N, w, 1, rstd, 1, N, 1e-6, BLOCK_SIZE=block, num_warps=warps))  # fmt: skip


def fla_rms_norm(folder: Path, family: str, M: int, N: int, dtype: torch.dtype, weight: torch.dtype) -> list[Kernel]:
    """The kernel with eight warps, which is one of the numbers that it tries."""
    if importlib.util.find_spec("einops") is None:  # which its module imports, and this kernel does not need
        stand_in("einops", rearrange=None, repeat=None, reduce=None)
    peer = module(found(folder, "fla/modules/layernorm.py"), "fla.modules.layernorm")
    x, w, rstd = _rows(M, N, dtype, weight)
    kernel = jitted(peer.layer_norm_fwd_kernel1)
    return compiled(family, lambda: kernel[(M,)](
        x, x, w, None, None, None, None, rstd, 1e-6, G=1, D=N, BD=triton.next_power_of_2(N), IS_RMS_NORM=True,
        HAS_RESIDUAL=False, STORE_RESIDUAL_OUT=False, HAS_WEIGHT=True, HAS_BIAS=False, num_warps=8))  # fmt: skip


def liger_rope(folder: Path, family: str, B: int, S: int, Hq: int, Hkv: int, D: int) -> list[Kernel]:
    """The kernel with tables in bfloat16, as Transformers passes them."""
    peer = _liger(folder, "rope")
    q, k = (torch.empty(B, S, H, D, dtype=torch.bfloat16) for H in (Hq, Hkv))
    cos, up = torch.empty(1, S, D, dtype=torch.bfloat16), triton.next_power_of_2
    kernel = jitted(peer._triton_rope)
    return compiled(family, lambda: kernel[(B * S,)](
        q, q.stride(1), k, k.stride(1), cos, cos.stride(-2), cos, cos.stride(-2), S, B, 1, Hq, Hkv, D, up(Hq),
        up(Hkv), up(D), BLOCK_SIZE=max(up(Hq), up(Hkv)), BACKWARD_PASS=False))  # fmt: skip


def unsloth_rope(folder: Path, family: str, B: int, S: int, Hq: int, Hkv: int, D: int) -> list[Kernel]:
    peer = _unsloth(folder, "rope_embedding")
    q, k = (torch.empty(B, S, H, D, dtype=torch.bfloat16) for H in (Hq, Hkv))
    cos = torch.empty(S, D, dtype=torch.bfloat16)
    block, warps = _liger(folder, "utils").calculate_settings(D // 2)
    kernel = jitted(peer._rope_embedding_QK)
    return compiled(family, lambda: kernel[(B * S, Hq)](
        q, q.stride(0), D, q.stride(1), k, k.stride(0), D, k.stride(1), cos, cos.stride(0), cos, cos.stride(0), None,
        S, head_dim=D, n_heads_K=Hkv, BACKWARD_PASS=False, HAS_ROPE_INDICES=False, BLOCK_SIZE=block,
        num_warps=warps))  # fmt: skip
