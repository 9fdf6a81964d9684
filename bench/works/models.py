"""The sizes of published models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Model(NamedTuple):
    """The sizes of a published model.

    window: visible keys of a query in its sliding-window layers, with its own key; -1 if it has no such layers.
    qk_norm: whether RMSNorm is applied to the heads of q and k.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int = -1
    qk_norm: bool = False


MODELS = {
    "Llama 3.2 1B": Model(2048, 8192, 16, 32, 8, 64, 128256),
    "Llama 3.1 8B": Model(4096, 14336, 32, 32, 8, 128, 128256),
    "Llama 3.1 70B": Model(8192, 28672, 80, 64, 8, 128, 128256),
    "Llama 3.1 405B": Model(16384, 53248, 126, 128, 8, 128, 128256),
    "Qwen3 8B": Model(4096, 12288, 36, 32, 8, 128, 151936, qk_norm=True),
    "Gemma 3 12B": Model(3840, 15360, 48, 16, 8, 256, 262208, window=1024, qk_norm=True),
}


def models_by(*fields: str) -> Iterator[tuple[str, Model]]:
    """One model for each combination of values of `fields`, with the names of all models that have them."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, m in MODELS.items():
        alike.setdefault(tuple(getattr(m, field) for field in fields), []).append(name)
    for names in alike.values():
        yield ", ".join(names), MODELS[names[0]]
