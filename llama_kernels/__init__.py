"""RoPE, RMSNorm and grouped-query attention: Triton kernels, forward and backward, tested against plain PyTorch."""

import importlib
from typing import Any

from llama_kernels import nn, reference
from llama_kernels.core.checks import checked
from llama_kernels.ops.attention import attention, attention_varlen
from llama_kernels.ops.attention.hopper.switch import hopper_attention
from llama_kernels.ops.attention.merge import merge_attention
from llama_kernels.ops.qk_norm_rope import qk_norm_rope
from llama_kernels.ops.rms_norm import add_rms_norm, rms_norm
from llama_kernels.ops.rope import rope, rope_into_cache, rope_qkv
from llama_kernels.ops.rope_attention import rope_attention
from llama_kernels.rotary import rope_axes, rope_frequencies, rope_tables

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `distributed` and `layers` when they are first used.

    torch may be built without torch.distributed, and only the package `kernels` of Hugging Face needs `layers`.
    """
    if name in ("distributed", "layers"):
        return importlib.import_module(f"llama_kernels.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "checked",
    "hopper_attention",
    "merge_attention",
    "nn",
    "qk_norm_rope",
    "reference",
    "rms_norm",
    "rope",
    "rope_attention",
    "rope_axes",
    "rope_frequencies",
    "rope_into_cache",
    "rope_qkv",
    "rope_tables",
]
