"""The specification: each operation in plain PyTorch, in any floating dtype, differentiable any number of times.

Names and signatures are those of the public ops. Float16 and bfloat16 are computed in float32 and rounded once, at the
end; float64 is computed in float64, which makes it the truth that every kernel is judged against.
"""

from .attention import attention, attention_varlen
from .qk_norm_rope import qk_norm_rope
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope, rope_into_cache, rope_qkv
from .rope_attention import rope_attention

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "rope_attention",
    "rope_into_cache",
    "rope_qkv",
]
