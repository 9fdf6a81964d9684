"""Rewritten forwards with fused operations: residual add + norm, or the norms of q and k + RoPE.

A rewrite changes a few lines of a forward whose whole text is known: KNOWN has the digests of these texts. The rewrite
does not call the norm modules. A call runs the forward without it if one of them has hooks or is not ours.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from llama_kernels.integrations.transformers import modules, source

ADD_NORM, QK_NORM_ROPE = "add_rms_norm", "qk_norm_rope"

_RESIDUAL = re.compile(
    r"^(?P<indent> +)(?P<x>\w+) = residual \+ (?P=x)\n(?P=indent)residual = (?P=x)\n"
    r"(?P=indent)(?P=x) = self\.(?P<norm>\w*norm\w*)\((?P=x)\)$",
    re.M,
)
# Lines of a body, which is indented by four. The norms are in the lines of the projections, or after all three.
_HEAD_NORM = re.compile(r"^(    (query|key)_states = )self\.([qk]_norm)\((.+)\)(\.transpose\(1, 2\))$", re.M)
_HEAD_NORMS_AFTER = re.compile(
    r"^    query_states = self\.q_norm\(query_states\)\n    key_states = self\.k_norm\(key_states\)\n"
    r"(?=    cos, sin = position_embeddings$)",
    re.M,
)
_ROTARY = re.compile(
    r"^(    query_states, key_states = )apply_rotary_pos_emb\((query_states, key_states, cos, sin)\)$", re.M
)

_CACHE = re.compile(r"\bpast_key_values?\b")

# Digests of reviewed texts, with the families and the releases of Transformers that have them.
KNOWN = {
    # residual add + RMSNorm
    "054f4e0eff96": "llama, mistral, qwen2, qwen3, gemma and 60 others, 5.17 to 5.24",
    "938ccda6e14e": "llama, mistral, qwen2, qwen3, gemma and 20 others, 4.57",
    "02313ea116fb": "qwen3_moe, ernie4_5_moe, qwen3_vl_moe, 4.57",
    "0786e2e7f4ec": "qwen2_vl, qwen2_5_vl, nemotron, 4.57",
    "c7ef0f6f1a5e": "gemma2, gemma3, 5.17 to 5.24",
    "3c379f904995": "gemma2, 4.57",
    "5978880ee06d": "gemma3, 4.57",
    "c531e2fc72a7": "mixtral, minimax_m2, 5.17 to 5.24",
    "358fec71ef07": "mixtral, 4.57",
    "a371fc62b9c6": "glm4v, glm_ocr, 5.17 to 5.24",
    "ffa42733c3a7": "glm4v, 4.57",
    "18ba666e9087": "glm4, 5.17 to 5.24",
    "1935f69ca9b5": "glm4, 4.57",
    "495dc03631c8": "apertus, 5.17 to 5.24",
    "ba103e699a80": "apertus, 4.57",
    "65df982b3a20": "gpt_oss, 5.17 to 5.24",
    "38f05f9e4511": "gpt_oss, 4.57",
    "b576afdb2d16": "qwen3_vl, 5.17 to 5.24",
    "a72860d39b48": "qwen3_vl, 4.57",
    "c44423e45d4b": "mllama (self-attention), blt, 5.17 to 5.24",
    "181327fa239e": "mllama (self-attention), blt, 4.57",
    "701521d0c2f4": "qwen2_moe, 4.57",
    "2575c4af6311": "olmoe, 4.57",
    "c3b568b4aa9b": "vaultgemma, 5.17 to 5.24",
    "8fa9803b41b0": "vaultgemma, 4.57",
    "1eda8f80cd92": "pixtral, 5.17 to 5.24",
    # norms of q and k + RoPE
    "4066bb0d9cf4": "qwen3, qwen3_moe, dots1, 5.24",
    "ce7415abff7c": "qwen3, qwen3_moe, dots1, 5.17 to 5.23",
    "c9528be6db86": "qwen3, qwen3_moe, dots1, 4.57",
    "730266a7357b": "qwen3_vl, qwen3_vl_moe, 5.24",
    "68fc50a0435e": "qwen3_vl, qwen3_vl_moe, 5.17 to 5.23",
    "29474db07c03": "qwen3_vl, qwen3_vl_moe, 4.57",
    "3fffc3089141": "gemma3, 5.24",
    "bd1bbc5a9720": "gemma3, 5.17 to 5.23",
    "2eba51a5098f": "gemma3, 4.57",
    "47342aaa7078": "apertus, hy_v3, 5.24",
    "3d847d7844c7": "apertus, hy_v3, 5.17 to 5.23",
    "a58c99f3baef": "apertus, 4.57",
}


class Fusion(NamedTuple):
    """A rewritten text, and the norm modules that it does not call."""

    text: str
    norms: tuple[str, ...]


def fusion_of(kind: str, text: str) -> Fusion | None:
    """The rewrite of a normalised forward, known or not. None where it does not have the lines of this kind."""
    if kind == ADD_NORM:
        found = list(_RESIDUAL.finditer(text))
        if not found:
            return None
        line = r"\g<indent>\g<x>, residual = add_and_norm(self.\g<norm>, \g<x>, residual)"
        return Fusion(_RESIDUAL.sub(line, text), tuple(match["norm"] for match in found))
    if len(_ROTARY.findall(text)) != 1:
        return None
    norms = [match[2] for match in _HEAD_NORM.findall(text)]
    if norms == ["q_norm", "k_norm"]:
        text = _HEAD_NORM.sub(r"\1\4\5", text)
    elif not norms and len(_HEAD_NORMS_AFTER.findall(text)) == 1:
        text = _HEAD_NORMS_AFTER.sub("", text)
    else:
        return None
    text = _ROTARY.sub(r"\1norm_and_rotate(self.q_norm, self.k_norm, \2)", text)
    return Fusion(text, ("q_norm", "k_norm"))


def digest(text: str) -> str:
    """The digest of a text. It does not depend on the argument name of the cache, which differs between releases."""
    return hashlib.sha256(_CACHE.sub("cache", text).encode()).hexdigest()[:12]


def fused_forward(forward: Any, plain: Callable[..., Any], fusion: Fusion, names: dict[str, Any]) -> Any:
    """A forward that runs the rewrite of `forward` if all its norms may be skipped, and otherwise `plain`."""
    fused = source.with_globals(forward, names, fusion.text)
    if fused is None:
        return None

    @functools.wraps(plain)
    def forward_of(self: Any, *args: Any, **kwargs: Any) -> Any:
        skipped = all(modules.may_be_skipped(getattr(self, norm)) for norm in fusion.norms)
        return (fused if skipped else plain)(self, *args, **kwargs)

    return forward_of
