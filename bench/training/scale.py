"""The models whose training steps are measured, and the FLOPs of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bench.measuring.records import Record
from bench.works.attention import pairs
from bench.works.models import MODELS, Model

TRAINING = ("decoder_layer", "llama")


@dataclasses.dataclass(frozen=True)
class Scale:
    """A model with as many layers as are run, and the batch of a step: B sequences of S tokens."""

    shape: str
    whole: bool  # True: with embedding, head, loss and a step of AdamW; False: one decoder layer
    model: Model
    B: int
    S: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def op(self) -> str:
        return "llama" if self.whole else "decoder_layer"

    @property
    def direction(self) -> str:
        return "step" if self.whole else "both"

    @property
    def sizes(self) -> dict[str, Any]:
        return {**self.model._asdict(), "B": self.B, "S": self.S}


def scales() -> Iterator[Scale]:
    """The scales that are measured."""
    for name in ("Llama 3.2 1B", "Llama 3.1 8B"):
        yield Scale(name, False, MODELS[name]._replace(layers=1, vocab=64), 2, 4096)
    yield Scale("4 layers of Llama 3.2 1B", True, MODELS["Llama 3.2 1B"]._replace(layers=4, vocab=32000), 2, 4096)


def put_rate(r: Record, scale: Scale, ceilings: Mapping[str, float]) -> None:
    """Fill in tokens a second. The ceiling is the rate if a step took only as long as its matrix products."""
    tokens = scale.B * scale.S
    r.rate, r.unit = tokens / r.ms * 1e3, "tokens/s"
    r.ceiling = tokens / (flops(scale) / ceilings[r.dtype] / 1e9) * 1e3
    r.percent = 100 * r.rate / r.ceiling


def flops(scale: Scale) -> int:
    """FLOPs of the matrix products of a step, forward and backward."""
    tokens, m = scale.B * scale.S, scale.model
    heads = 2 * m.heads + 2 * m.kv_heads  # q and out, k and v
    weights = m.layers * (m.hidden * heads * m.head_dim + 3 * m.hidden * m.mlp)
    weights += m.hidden * m.vocab if scale.whole else 0
    attention = m.layers * 14 * m.heads * m.head_dim * scale.B * pairs(scale.S)
    return 6 * tokens * weights + attention
