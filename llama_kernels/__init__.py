"""RoPE, RMSNorm and grouped-query attention as Triton kernels, forward and backward, each proved against plain PyTorch."""

from llama_kernels import reference
from llama_kernels.ops.attention import attention, attention_varlen
from llama_kernels.ops.rms_norm import add_rms_norm, rms_norm
from llama_kernels.ops.rope import rope

__all__ = ["add_rms_norm", "attention", "attention_varlen", "reference", "rms_norm", "rope"]
