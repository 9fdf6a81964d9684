"""Masks as Transformers makes them for a model, with stock attention and with ours, and their comparison."""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils

from llama_kernels.integrations.transformers import masks, packed_masks
from llama_kernels.integrations.transformers.attention import NAME
from tests.integrations.small import WithoutWaiting
from tests.support.environment import DEVICE

B, S, WINDOW = 2, 12, 4
BIDIRECTIONAL = ("create_bidirectional_mask", "create_bidirectional_sliding_window_mask")
CREATE = {
    "causal": "create_causal_mask",
    "sliding": "create_sliding_window_causal_mask",
    "chunked": "create_chunked_causal_mask",
    "bidirectional": BIDIRECTIONAL[0],
    "bidirectional sliding": BIDIRECTIONAL[1],
}
LAYERS = {"sliding": "sliding_attention", "chunked": "chunked_attention"}


class State(NamedTuple):
    """What a cache holds when the mask of `queries` new tokens is made."""

    queries: int = S
    past: int = 0
    cache: str | None = None


STATES = {
    "no cache": State(),
    "prefill": State(S, 0, "dynamic"),
    "second piece": State(5, 7, "dynamic"),
    "second piece within the window": State(3, 4, "dynamic"),
    "step": State(1, 11, "dynamic"),
    "late piece": State(5, 20, "dynamic"),
    "late step": State(1, 20, "dynamic"),
    "static prefill": State(5, 0, "static"),
    "static second piece": State(5, 3, "static"),
    "static step": State(1, 9, "static"),
}

# The number of the block of each token. Tokens of a block see one another; -1 is no block.
BLOCKS = {
    "one image": [[-1, -1, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1]] * 2,
    "two images": [[-1, 0, 0, 0, -1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, -1, -1, -1, -1, -1, 1, 1, -1, -1]],
    "images side by side": [[0, 0, 0, 1, 1, 1, -1, 2, 2, 2, -1, -1]] * 2,
    "a prefix": [[0] * 7 + [-1] * 5, [0] * 3 + [-1] * 9],
    "no image": [[-1] * 12] * 2,
}
# Positions of packed documents. Without a cache, Transformers starts a document at each step other than +1.
POSITIONS = {
    "documents": [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5],
    "a document that begins at 3": [3, 4, 5, 6, 7, 3, 4, 5, 0, 1, 2, 3],
    "jumps": [0, 1, 2, 3, 9, 10, 11, 12, 40, 41, 42, 43],
    "repeats": [0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7, 8],
    "constant": [0] * 12,
    "half steps": [i / 2 for i in range(12)],
}


def padding(side: str, length: int = S) -> torch.Tensor | None:
    if side == "none":
        return None
    mask = torch.ones(B, length, dtype=torch.int64, device=DEVICE)
    if side == "left":
        mask[0, : length // 2], mask[1, :1] = 0, 0
    elif side == "right":
        mask[0, -2:] = 0
    elif side == "holes":  # one row as with virtual tokens before padding on the left, one with a hole between tokens
        mask[0, 1 : length // 2], mask[1, -4:-2] = 0, 0
    elif side == "empty":
        mask[0] = 0
    return mask


def config_for(kind: str) -> Any:
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8)
    config.sliding_window = config.attention_chunk_size = WINDOW
    config.layer_types = [LAYERS.get(kind, "full_attention")]
    return config


def cache_in(state: State, config: Any) -> Any:
    if state.cache is None:
        return None
    cache = DynamicCache(config=config) if state.cache == "dynamic" else StaticCache(config=config, max_cache_len=16)
    if state.past:
        kept = torch.zeros(B, 1, state.past, 8, device=DEVICE)
        cache.update(kept, kept, 0, {"cache_position": torch.arange(state.past, device=DEVICE)})
    return cache


class Masks:
    """The masks of one kind in one state, for models that differ in their attention. Skips what Transformers lacks.

    given: arguments of the function that makes the mask, such as attention_mask or position_ids.
    """

    def __init__(self, kind: str, state: State = State(), config: Any = None, **given: Any) -> None:
        self.name, self.state, self.given = CREATE[kind], state, {"attention_mask": None, **given}
        self.config = config_for(kind) if config is None else config
        self.cache = cache_in(state, self.config)

    def call(self, attention: str) -> tuple[Any, dict[str, Any]]:
        """The function of Transformers that makes the mask, and its arguments, for a model with this attention."""
        create = getattr(masking_utils, self.name, None)
        names = inspect.signature(create).parameters if create else {}
        missing = [name for name, value in self.given.items() if value is not None and name not in names]
        if create is None or missing:
            pytest.skip(f"this Transformers has no {self.name}({', '.join(missing)})")
        config = copy.deepcopy(self.config)
        config._attn_implementation = attention
        embeds = torch.zeros(B, self.state.queries, 8, device=DEVICE)
        call = {**self.given, "config": config, "inputs_embeds" if "inputs_embeds" in names else "input_embeds": embeds}
        call |= {name: self.cache for name in ("cache", "past_key_values") if name in names}
        if "position_ids" in names:
            call.setdefault("position_ids", None)
        if "cache_position" in names:
            call["cache_position"] = torch.arange(self.state.past, self.state.past + self.state.queries, device=DEVICE)
        return create, call

    def stock(self) -> torch.Tensor:
        """Which query sees which key, as Transformers' own mask says: (B, Sq, Sk) bool."""
        create, call = self.call("eager")
        mask = create(**call)
        if mask is None:  # a bidirectional mask that hides nothing
            return torch.ones(B, self.state.queries, self.state.queries, dtype=torch.bool, device=DEVICE)
        return (mask[:, 0] == 0).expand(B, -1, -1)

    def ours(self) -> torch.Tensor:
        create, call = self.call(NAME)
        return create(**call)

    def check(self, ranges: bool = True) -> torch.Tensor:
        """Compare the two masks. `ranges`: whether ours is expected to be ranges of keys, not an ordinary mask."""
        expected, ours = self.stock(), self.ours()
        assert is_ranges(ours) == ranges
        assert torch.equal(visible(ours, expected), expected)
        return ours


def visible(mask: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Which query sees which key, in the shape of `expected`, for ranges of keys or an ordinary mask."""
    if mask.dtype == torch.bool:
        return mask[:, 0].expand(expected.shape)
    return packed_masks.written_out(mask, *expected.shape[1:])[:, 0].expand(expected.shape)


def is_ranges(mask: torch.Tensor) -> bool:
    assert mask.ndim == 4 and mask.dtype in (torch.int32, torch.bool)
    return mask.dtype == torch.int32


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Our masks are made without the host waiting for the device."""

    def key_ranges(*args: Any, **kwargs: Any) -> Any:
        with WithoutWaiting():
            return masks.key_ranges(*args, **kwargs)

    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, NAME, key_ranges)
