"""Forwards of Transformers rewritten so that two operations become one: residual add and norm, head norms and RoPE.

A rewrite replaces a few lines of a text whose whole is known (`KNOWN`, by digest): the rest stays as it was read. Each
call still runs the forward as it was where a norm that would be skipped as a module has hooks, or is not ours.
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
    r"(?P=indent)(?P=x) = self\.(?P<norm>\w+)\((?P=x)\)$",
    re.M,
)
_HEAD_NORMS = (  # the first of them that fits: norms of (B, S, H, D) in the projections, norms of (B, H, S, D) after them
    re.compile(r"^( +query_states = )self\.q_norm\((.+)\)(\.transpose\(1, 2\))$", re.M),
    re.compile(r"^ +query_states = self\.q_norm\(query_states\)\n +key_states = self\.k_norm\(key_states\)\n", re.M),
)
_ROTARY = re.compile(r"(query_states, key_states = )apply_rotary_pos_emb\((query_states, key_states, cos, sin)\)")

# Digests of the texts that were read, and where.
KNOWN: dict[str, str] = {}


class Fusion(NamedTuple):
    """A rewritten text, the norms that it skips as modules, and the name of the operation that it calls."""

    text: str
    norms: tuple[str, ...]
    calls: str


def fusion_of(kind: str, text: str) -> Fusion | None:
    """The rewrite of a normalised forward, if it has the lines for it. Whether the text is known is another question."""
    if kind == ADD_NORM:
        found = list(_RESIDUAL.finditer(text))
        if not found:
            return None
        line = r"\g<indent>\g<x>, residual = add_and_norm(self.\g<norm>, \g<x>, residual)"
        return Fusion(_RESIDUAL.sub(line, text), tuple(match["norm"] for match in found), "add_and_norm")
    if len(_ROTARY.findall(text)) != 1:
        return None
    if len(_HEAD_NORMS[0].findall(text)) == 1:
        rewritten = _HEAD_NORMS[0].sub(r"\1\2\3", text)
        k_norm = re.compile(_HEAD_NORMS[0].pattern.replace("query", "key").replace("q_norm", "k_norm"), re.M)
        rewritten, count = k_norm.subn(r"\1\2\3", rewritten)
    else:
        rewritten, count = _HEAD_NORMS[1].subn("", text)
    if count != 1:
        return None
    rewritten = _ROTARY.sub(r"\1norm_and_rotate(self.q_norm, self.k_norm, \2)", rewritten)
    return Fusion(rewritten, ("q_norm", "k_norm"), "norm_and_rotate")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fused_forward(forward: Any, plain: Callable[..., Any], fusion: Fusion, names: dict[str, Any]) -> Any:
    """`forward` rewritten, for calls in which all skipped norms are unwatched; `plain` for the others."""
    fused = source.with_globals(forward, names, fusion.text)
    if fused is None:
        return None

    @functools.wraps(plain)
    def forward_of(self: Any, *args: Any, **kwargs: Any) -> Any:
        unwatched = all(modules.is_unwatched(getattr(self, norm)) for norm in fusion.norms)
        return (fused if unwatched else plain)(self, *args, **kwargs)

    return forward_of
