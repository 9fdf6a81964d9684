"""Subclasses of Llama's modules, as users write them, and classes of users' files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.llama import modeling_llama


def with_class(model: nn.Module, name: str, cls: type[nn.Module]) -> nn.Module:
    model.get_submodule(name).__class__ = cls
    return model


def class_in(file: Path, name: str) -> Any:
    """A class of this file, which is imported now."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


class OwnAttention(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        out, weights = super().forward(hidden_states, **kwargs)
        return out.clamp(-0.2, 0.2), weights


class OwnRMSNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states).clamp(-1, 1)


class OwnLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        h = hidden_states + 0.5 * self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return h + 2.0 * self.mlp(self.post_attention_layernorm(h))


class Renamed(modeling_llama.LlamaAttention):
    """A subclass with the forward of its base class."""

    def helper(self):
        return None


class OwnMask(modeling_llama.LlamaAttention):
    """Attention without RoPE that computes with its mask, which must be that of eager attention."""

    def forward(self, hidden_states, attention_mask, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        function = {"eager": modeling_llama.eager_attention_forward, **modeling_llama.ALL_ATTENTION_FUNCTIONS}[
            self.config._attn_implementation
        ]
        out, weights = function(self, q, k, v, 0.5 * attention_mask, scaling=self.scaling)
        return self.o_proj(out.flatten(2)), weights
