"""Functions of Transformers' models that an op may replace.

Each entry has the text of a function and its formula. A function is known if its normalised text (`source.normalised`)
is one of these texts, in any file of any release. All others, such as a user's subclass or an edited method, are not
replaced. The texts are from Transformers 4.57.6, 5.17.0, 5.23.0 and 5.24.0.
tests/integrations/test_known_code.py checks every entry against the source of the installed release.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from llama_kernels.integrations.transformers import source
from llama_kernels.integrations.transformers.known_rotaries import PAIRINGS, ROTARIES, Pairing, Rotary

# --- RMSNorm ---------------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), in float32."""

    families: str
    forward: str
    norm: str = ""  # the text of the method _norm, if forward calls it
    eps: str = "eps"  # the name of the attribute that holds eps
    offset: float = 0.0
    weighted: bool = True
    promotes: bool = False  # the result's dtype is the one that weight and x promote to. False: that of x
    as_weight: bool = False  # the result's dtype is that of weight


_NORM = """def _norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"""
_POWER = """def _norm(self, hidden_states):
    mean_squared = hidden_states.pow(2).mean(-1, keepdim=True) + self.eps
    return hidden_states * torch.pow(mean_squared, -0.5)"""
_UNTIL_WEIGHT = """def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
"""

NORMS = (
    Norm("llama, mistral, mixtral, qwen2, qwen3, granite, smollm3, phi3, glm, deepseek_v3, arcee and most others",
         _UNTIL_WEIGHT + "    return self.weight * hidden_states.to(input_dtype)",
         eps="variance_epsilon", promotes=True),
    Norm("olmo2, olmo3, flex_olmo, gpt_oss, afmoe",
         _UNTIL_WEIGHT + "    return (self.weight * hidden_states).to(input_dtype)", eps="variance_epsilon"),
    Norm("helium, nemotron_h",
         _UNTIL_WEIGHT + "    return (self.weight.to(torch.float32) * hidden_states).to(input_dtype)",
         eps="variance_epsilon"),
    Norm("gemma, gemma2, gemma3, recurrent_gemma, t5gemma, vaultgemma, qwen3_next, qwen3_5",
         """def forward(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)""", _NORM, offset=1.0),
    Norm("gemma3n, gemma4", """def forward(self, hidden_states):
    normed_output = self._norm(hidden_states.float())
    if self.with_scale:
        normed_output = normed_output * self.weight.float()
    return normed_output.type_as(hidden_states)""", _POWER),
    Norm("moshi, kyutai_speech_to_text", """def forward(self, x):
    output = self._norm(x.float())
    output = output * self.weight.float()
    return output.type_as(x)""", _NORM),
    Norm("llama4", """def forward(self, x):
    output = self._norm(x.float()).type_as(x)
    return output * self.weight""", _NORM, promotes=True),
    Norm("llama4 (L2Norm), nanochat, hrm_text", """def forward(self, x):
    return self._norm(x.float()).type_as(x)""", _NORM, weighted=False),
    Norm("inkling2, inkling2_loop", """def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.float()
    hidden_states = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.eps)
    return hidden_states.to(input_dtype)""", weighted=False),
    Norm("deepseek_v4, glm5_next", """def forward(self, x):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)""", weighted=False),
    Norm("muse_spark", """def forward(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight).float()
    return output.type_as(x)""", _NORM, offset=1.0),
    Norm("t5, mt5, longt5, umt5, idefics", """def forward(self, hidden_states):
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states""", eps="variance_epsilon", as_weight=True),
)  # fmt: skip


# --- looking up ------------------------------------------------------------------------------------------------------


def norm_of(cls: type) -> Norm | None:
    """The RMSNorm that modules of this class compute, or None if their forward is not known."""
    forward = getattr(cls, "forward", None)
    norm = _norms().get(source.text_of(forward))
    if norm is None or (norm.norm and source.text_of(getattr(cls, "_norm", None)) != source.normalised(norm.norm)):
        return None
    return norm if _globals_are_torch(forward) else None


_HELPERS = ("_apply_rotary_emb", "rotate_every_two", "rotate_pairwise", "reshape_for_broadcast", "stack_freqs")


def rotary_of(function: Any) -> Rotary | None:
    """The entry of an apply_rotary_pos_emb, with the fields that its helper decides. None if it is not known."""
    text, helpers = source.without_unused_defaults(source.text_of(function)), {}
    for name in source.global_names(function):
        if name.startswith("rotate_half"):  # rotate_half_text, rotate_half_llm
            text, helpers["rotate_half"] = text.replace(f"{name}(", "rotate_half("), function.__globals__.get(name)
        elif name in _HELPERS:
            helpers[name] = function.__globals__.get(name)
    rotary = _rotaries().get(text)
    if rotary is None or not _globals_are_torch(function):
        return None
    if not rotary.helper:
        return rotary
    pairing = _pairings().get(source.text_of(helpers.get(rotary.helper)))
    return None if pairing is None else rotary._replace(**pairing._asdict())


def _globals_are_torch(function: Any) -> bool:
    return function.__globals__.get("torch") is torch


@functools.cache
def _norms() -> dict[str, Norm]:
    return {source.normalised(norm.forward): norm for norm in NORMS}


@functools.cache
def _rotaries() -> dict[str, Rotary]:
    return {source.without_unused_defaults(source.normalised(rotary.text)): rotary for rotary in ROTARIES}


@functools.cache
def _pairings() -> dict[str, Pairing]:
    return {source.normalised(text): pairing for text, pairing in PAIRINGS.items()}
