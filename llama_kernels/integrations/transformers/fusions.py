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
    "054f4e0eff96": "llama, mistral, qwen2, qwen3, gemma and 60 others, 5.4 to 5.24",
    "938ccda6e14e": "llama, mistral, qwen2, qwen3, gemma and 40 others, 4.57 to 5.3",
    "02313ea116fb": "qwen3_moe, ernie4_5_moe, qwen3_vl_moe, 4.57",
    "0786e2e7f4ec": "qwen2_vl, qwen2_5_vl, nemotron, 4.57 to 5.3",
    "c7ef0f6f1a5e": "gemma2, gemma3, 5.4 to 5.24",
    "45fa64e55ada": "gemma2, gemma3, 5.0 to 5.3",
    "3c379f904995": "gemma2, 4.57",
    "5978880ee06d": "gemma3, 4.57",
    "914f00492dee": "gemma4, 5.5 to 5.24",
    "9d693ee71066": "gemma4_unified, 5.10 to 5.24",
    "7e8934b421fa": "diffusion_gemma, 5.11 to 5.24",
    "c531e2fc72a7": "mixtral, minimax_m2, 5.4 to 5.24",
    "6e1c0725e0c2": "mixtral, minimax_m2, 5.0 to 5.3",
    "358fec71ef07": "mixtral, 4.57",
    "97658670408b": "qwen3_5, lara_mini, 5.24",
    "fe715cf9d187": "qwen3_5, 5.13 to 5.23",
    "2e11acd1780c": "qwen3_5, 5.9 to 5.12",
    "7f45ad7ae066": "qwen3_5, 5.4 to 5.8",
    "5882bf43ca56": "qwen3_5, 5.2 to 5.3",
    "f01558028016": "qwen3_next, qwen3_5_moe, 5.24",
    "37d66afd0d5c": "qwen3_next, qwen3_5_moe, 5.13 to 5.23",
    "5b44c5a4af31": "qwen3_next, qwen3_5_moe, 5.9 to 5.12",
    "bfa7cbd16cc4": "qwen3_next, qwen3_5_moe, 5.4 to 5.8",
    "1684b94e8cf2": "qwen3_next, qwen3_5_moe, 4.57 to 5.3",
    "a371fc62b9c6": "glm4v, glm_ocr, 5.4 to 5.24",
    "0d5f8f47f216": "glm4v, glm_ocr, 5.0 to 5.3",
    "ffa42733c3a7": "glm4v, 4.57",
    "18ba666e9087": "glm4, 5.4 to 5.24",
    "1935f69ca9b5": "glm4, 4.57 to 5.3",
    "096db7b9748b": "glm_moe_dsa, 5.6 to 5.24",
    "495dc03631c8": "apertus, 5.4 to 5.24",
    "ba103e699a80": "apertus, 4.57 to 5.3",
    "65df982b3a20": "gpt_oss, 5.4 to 5.24",
    "38f05f9e4511": "gpt_oss, 4.57 to 5.3",
    "b576afdb2d16": "qwen3_vl, 5.4 to 5.24",
    "a72860d39b48": "qwen3_vl, 4.57 to 5.3",
    "c44423e45d4b": "mllama (self-attention), blt, 5.4 to 5.24",
    "181327fa239e": "mllama (self-attention), blt, 4.57 to 5.3",
    "701521d0c2f4": "qwen2_moe, 4.57",
    "2575c4af6311": "olmoe, 4.57",
    "c3b568b4aa9b": "vaultgemma, 5.4 to 5.24",
    "c09903df6ba1": "vaultgemma, 5.0 to 5.3",
    "8fa9803b41b0": "vaultgemma, 4.57",
    "1eda8f80cd92": "pixtral, 5.4 to 5.24",
    "b16a312390a8": "pixtral, 4.57 to 5.3",
    "24cca31a1b11": "afmoe, 5.4 to 5.24",
    "d76b6c09f8c8": "bamba, 5.24",
    "00932000c20d": "falcon_h1, 5.24",
    "e71903fab00b": "jamba (attention), 5.4 to 5.24",
    "cf090b67c028": "jamba (Mamba), 5.24",
    "b02ce36075a9": "olmo_hybrid (linear attention), 5.24",
    "dfc9abbb4527": "kimi_linear, bailing_hybrid, 5.24",
    "a1d8b90184d7": "lfm3, 5.23 to 5.24",
    "ed62fd01f3b1": "mistral_large4, 5.22 to 5.24",
    "9752a951777b": "inkling, 5.14 to 5.24",
    "4966048dad3b": "moshi, kyutai_speech_to_text, 5.21 to 5.24",
    # norms of q and k + RoPE
    "4066bb0d9cf4": "qwen3, qwen3_moe, dots1, 5.24",
    "ce7415abff7c": "qwen3, qwen3_moe, dots1, 5.4 to 5.23",
    "ff4698a6a90f": "qwen3, qwen3_moe, dots1, 5.1 to 5.3",
    "c9528be6db86": "qwen3, qwen3_moe, dots1, 4.57 to 5.0",
    "936601da69ed": "qwen3_5, qwen3_5_moe, qwen3_next, 5.24",
    "863133f074e3": "qwen3_5, qwen3_5_moe, qwen3_next, 5.4 to 5.23",
    "145343890505": "qwen3_5, qwen3_5_moe, qwen3_next, 5.1 to 5.3",
    "5c41a274de11": "qwen3_next, 4.57 to 5.0",
    "730266a7357b": "qwen3_vl, qwen3_vl_moe, 5.24",
    "68fc50a0435e": "qwen3_vl, qwen3_vl_moe, 5.4 to 5.23",
    "63f2fe62d29d": "qwen3_vl, qwen3_vl_moe, 5.1 to 5.3",
    "29474db07c03": "qwen3_vl, qwen3_vl_moe, 4.57 to 5.0",
    "3fffc3089141": "gemma3, 5.24",
    "bd1bbc5a9720": "gemma3, 5.4 to 5.23",
    "95d3dceb382d": "gemma3, 5.1 to 5.3",
    "863bb0e050e5": "gemma3, 5.0",
    "2eba51a5098f": "gemma3, 4.57",
    "47342aaa7078": "apertus, hy_v3, 5.24",
    "3d847d7844c7": "apertus, hy_v3, 5.4 to 5.23",
    "7aff174f2f66": "apertus, 5.1 to 5.3",
    "a58c99f3baef": "apertus, 4.57 to 5.0",
    "af539c2f98bf": "lfm3, 5.24",
    "f4ac66c65b13": "laguna, 5.24",
    "8db69660b86f": "step3p7, 5.24",
    "5a950e5676d9": "minimax_m3_vl, 5.24",
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
