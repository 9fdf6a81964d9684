"""Calls of attention that every path computes: the kernels, and what CPU tensors run."""

from __future__ import annotations

import torch

from tests.support.attention import Case, anywhere, documents, packed, padded_left, shared, so_far


def backwards(i: torch.Tensor, Sk: int) -> torch.Tensor:
    return (Sk - 2 * i).clamp_min(-5)


def first_keys(i: torch.Tensor, Sk: int) -> torch.Tensor:
    """For kv_prefix: four keys that stay visible, of which a row of a causal mask sees those before it."""
    return i.clamp(max=4)


def far_on(i: torch.Tensor, Sk: int) -> torch.Tensor:
    return torch.full_like(i, Sk - 40)


CASES = (
    Case(1, 4, 2, 100, 100, 64, 64),
    Case(2, 4, 1, 70, 150, 80, 48),
    Case(2, 4, 1, 150, 70, 80, 48),  # the first 80 rows see no key
    Case(2, 3, 3, 65, 130, 16, 16, is_causal=False),
    Case(1, 6, 2, 33, 33, 96, 96),
    Case(1, 2, 1, 40, 40, 192, 128),
    Case(1, 2, 1, 40, 70, 256, 256),
    Case(1, 2, 1, 40, 70, 512, 512),
    Case(1, 4, 1, 20, 33, 576, 512, sinks=True),
    Case(1, 2, 2, 33, 33, 320, 64, window_size=(9, 0)),
    Case(1, 8, 1, 1, 77, 64, 64),  # decoding
    Case(2, 2, 2, 3, 200, 24, 40),
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(1, 2, 2, 130, 200, 32, 32, window_size=(20, 0)),
    Case(1, 2, 2, 200, 130, 32, 32, window_size=(0, -1)),
    Case(1, 2, 1, 130, 200, 32, 32, is_causal=False, window_size=(-1, 30)),
    Case(1, 2, 1, 60, 60, 32, 32, window_size=(1000, 1000)),
    Case(1, 2, 2, 150, 150, 32, 32, softcap=3.0),
    Case(1, 2, 2, 60, 60, 32, 32, scale=-0.3),
    Case(1, 2, 1, 60, 60, 32, 32, scale=0.0),  # the mean of the visible values
    Case(1, 4, 2, 90, 60, 32, 32, sinks=True),
    Case(2, 2, 1, 150, 150, 32, 32, kv_start=anywhere),
    Case(2, 2, 1, 70, 150, 32, 32, is_causal=False, kv_start=padded_left),
    Case(1, 2, 2, 135, 135, 32, 32, kv_start=documents, sinks=True),
    Case(2, 2, 1, 70, 150, 32, 32, is_causal=False, kv_start=padded_left, kv_end=so_far),
    Case(1, 4, 1, 150, 130, 32, 32, kv_end=anywhere, sinks=True),
    Case(1, 2, 2, 130, 70, 32, 32, is_causal=False, kv_start=backwards, kv_end=anywhere),
    Case(1, 4, 2, 130, 200, 72, 72, is_causal=False, window_size=(20, 30), softcap=5.0, sinks=True, kv_start=anywhere),
    Case(1, 4, 2, 150, 150, 32, 32, kv_start=documents, kv_prefix=shared),
    Case(2, 2, 1, 150, 150, 32, 32, window_size=(20, 0), kv_prefix=first_keys, sinks=True),
    Case(1, 2, 1, 100, 130, 32, 32, kv_prefix=anywhere),
    Case(2, 2, 1, 130, 100, 80, 48, is_causal=False, kv_start=anywhere, kv_end=backwards, kv_prefix=anywhere),
    Case(1, 2, 2, 90, 70, 16, 16, kv_end=anywhere, kv_prefix=backwards, softcap=5.0),
    Case(1, 2, 2, 60, 60, 32, 32, is_causal=False, kv_prefix=anywhere),  # a prefix of what every row sees
    packed((50, 0, 100, 1), (50, 0, 100, 1), 4, 2, 64, 64),
    packed((50, 0, 100, 1), (70, 5, 30, 0), 4, 2, 32, 32, sinks=True),
    packed((30, 90), (90, 130), 4, 1, 80, 80, is_causal=False, window_size=(40, 9), softcap=4.0, kv_start=anywhere),
    packed((30, 90), (90, 130), 4, 2, 32, 32, is_causal=False, kv_start=documents, kv_end=so_far),
    packed((33,) * 4, (33,) * 4, 2, 2, 32, 32, window_size=(8, -1), sinks=True, kv_start=padded_left),
    packed((100, 0, 60), (100, 5, 90), 4, 2, 32, 32, kv_start=documents, kv_prefix=shared),
    packed((30, 90), (90, 60), 2, 2, 32, 32, window_size=(8, -1), sinks=True, kv_prefix=anywhere),
)
DECODING = (
    Case(2, 4, 1, 1, 100, 32, 32),
    Case(1, 2, 2, 1, 33, 64, 64),
    Case(1, 2, 1, 1, 64, 16, 16),
    Case(1, 16, 1, 1, 70, 576, 512),  # multi-head latent attention with its projections absorbed
    Case(1, 6, 2, 3, 97, 24, 40, sinks=True),
    Case(1, 8, 2, 8, 70, 32, 32, is_causal=False, softcap=5.0),
    Case(1, 4, 2, 5, 130, 32, 32, window_size=(20, 0)),
    Case(1, 2, 2, 2, 90, 32, 32, scale=-0.3, is_causal=False, window_size=(30, 4)),
    Case(2, 8, 2, 6, 150, 32, 32, kv_start=padded_left),
    Case(2, 8, 2, 4, 150, 32, 32, is_causal=False, kv_start=padded_left, kv_end=so_far, sinks=True),
    Case(1, 2, 1, 7, 100, 32, 32, kv_start=anywhere, kv_end=backwards),
    Case(2, 4, 1, 19, 100, 16, 16, sinks=True),  # tiles of 32 rows, some of two heads
    Case(1, 8, 1, 12, 70, 16, 16, window_size=(20, 0), kv_start=padded_left),
    Case(2, 4, 2, 3, 150, 32, 32, window_size=(20, 0), kv_prefix=first_keys, sinks=True),
    Case(1, 8, 2, 5, 150, 32, 32, kv_start=anywhere, kv_end=backwards, kv_prefix=anywhere),
    Case(1, 2, 1, 2, 300, 16, 16, kv_start=far_on, kv_prefix=padded_left),  # chunks without a key between the two
)
