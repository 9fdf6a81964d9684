"""The forward of few rows and many keys, split over the keys: chunks of a prompt, or few heads."""

from __future__ import annotations

import pytest
import torch

import llama_kernels as lk
from bench.attention_options import attention_options
from llama_kernels.core import device, launch_cache
from llama_kernels.ops.attention import dispatch, key_split, tables
from llama_kernels.ops.attention.call import AttentionCall
from llama_kernels.ops.attention.key_split import KeySplit
from llama_kernels.ops.attention.tables import Tile
from tests.support import attention, rope_attention
from tests.support.attention import Case, anywhere, documents, padded_left, shared, so_far
from tests.support.launches import KERNELS_RUN, kernels_launched, names

HALF, TILE = torch.bfloat16, Tile(32, 64, 4, 1)


def choice(Sq: int, Sk: int, Hq: int = 32, B: int = 1, left: int | None = None, prefix: bool = False, D: int = 128):
    q, k = torch.empty(B, Hq, Sq, D, device="meta"), torch.empty(B, Hq // 4, Sk, D, device="meta")
    q, k = q.bfloat16(), k.bfloat16()
    kv_prefix = torch.empty(B, Sq, dtype=torch.int32, device="meta") if prefix else None
    return dispatch.forward(AttentionCall(q, k, k, *attention_options(Sq, Sk, 0.1, left=left), kv_prefix=kv_prefix))


@pytest.fixture
def on_hopper(monkeypatch):
    for module in (device, tables):
        monkeypatch.setattr(module, "arch_of", lambda _: "sm_90")


def test_few_row_tiles_and_many_keys_are_split(on_hopper):
    """Into as few chunks as fill 132 SMs, each of 2,048 keys or more."""
    assert [choice(Sq, 8192).split for Sq in (64, 128, 256)] == [KeySplit(0, 2048, 4)] * 2 + [KeySplit(0, 4096, 2)]
    assert choice(128, 131072, Hq=8).split == KeySplit(0, 8192, 16)
    assert choice(300, 5000, Hq=4).split == KeySplit(0, 2560, 2)
    assert "split" in choice(128, 8192).reason


def test_other_calls_are_not_split(on_hopper):
    """Those that fill a GPU, those of few keys, decoding, and packed batches."""
    assert [choice(*sizes).split for sizes in ((512, 8192), (128, 4095), (4096, 4096), (1, 8192), (0, 8192))] == [
        None
    ] * 5
    q, k, starts = torch.empty(128, 8, 64), torch.empty(8192, 2, 64), torch.zeros(2, dtype=torch.int32)
    packed = AttentionCall(q, k, k, None, None, None, starts, starts, 128, 8192, 0.1, None, None, 0)
    assert key_split.split_of(packed) is None and choice(128, 8192, Hq=8).split is not None


def test_the_split_does_not_depend_on_the_batch(on_hopper):
    assert choice(128, 8192, B=64).split == choice(128, 8192).split


def test_keys_before_the_window_are_in_no_chunk(on_hopper):
    """Unless they may be among the first keys that a row sees besides."""
    assert choice(128, 65536, left=8000).split == KeySplit(57344, 2048, 4)
    assert choice(128, 65536, left=1000).split is None
    assert choice(128, 65536, left=8000, prefix=True).split == KeySplit(0, 16384, 4)


@pytest.fixture
def split(monkeypatch):
    """Few keys are split too."""
    monkeypatch.setattr(key_split, "LEAST_KEYS", 64)
    key_split._chunks.cache_clear()
    launch_cache.clear()
    yield
    key_split._chunks.cache_clear()
    launch_cache.clear()


CASES = [
    Case(2, 4, 2, 40, 300, 32, 32),
    Case(1, 2, 1, 40, 300, 24, 40, is_causal=False, softcap=3.0, sinks=True, scale=-0.3),
    Case(1, 2, 1, 40, 400, 16, 16, window_size=(200, 0)),
    Case(1, 2, 1, 40, 300, 16, 16, is_causal=False, window_size=(200, 10), kv_start=anywhere, kv_end=so_far),
    Case(1, 2, 1, 90, 300, 16, 16, kv_start=documents, kv_prefix=shared),
    Case(1, 2, 1, 40, 400, 16, 16, window_size=(60, 0), kv_prefix=anywhere, sinks=True),
    Case(1, 1, 1, 300, 150, 16, 16),  # rows without keys
    Case(1, 2, 1, 40, 300, 16, 16, kv_start=padded_left, sinks=True),
]


@pytest.mark.parametrize("case, dtype", [*((case, HALF) for case in CASES), (CASES[1], torch.float32)])
def test_out_lse_and_gradients_of_a_split_forward(case, dtype, split, device):
    with kernels_launched() as launches:
        attention.check(case, dtype, device, tile=Tile(32, 64, 4, 1))
    assert not KERNELS_RUN or names(launches)[:2] == ["_forward_kernel", "_combine_kernel"]


def test_bounds_beyond_the_keys_are_those_at_their_ends(split, device):
    """kv_start, kv_end and kv_prefix at the ends of int32 give the bits of 0 and of the number of keys."""
    least, largest = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    q, k = torch.randn(1, 2, 40, 16, device=device), torch.randn(1, 2, 300, 16, device=device)
    values = torch.tensor([least, -1, 0, 170, largest], dtype=torch.int32, device=device).repeat(8)[None]
    for name in ("kv_start", "kv_end", "kv_prefix"):
        beyond, within = (
            lk.attention(q, k, k, **{name: bound}, is_causal=name != "kv_end", return_lse=True)
            for bound in (values, values.clamp(0, 300))
        )
        assert all(torch.equal(a, b) for a, b in zip(beyond, within, strict=True))


def test_rope_attention_is_split_too(split, device):
    with kernels_launched() as launches:
        rope_attention.check(rope_attention.square(150, 32, B=2), torch.float16, device, 16)
    assert not KERNELS_RUN or "_combine_kernel" in names(launches)


def test_a_split_forward_repeats_and_does_not_depend_on_the_batch(split, device):
    q, k, v = (torch.randn(3, H, S, 32, device=device).bfloat16() for H, S in ((4, 40), (2, 300), (2, 300)))
    with attention.tiles(TILE):
        whole, again, alone = (
            lk.attention(*(x[part] for x in (q, k, v)), return_lse=True)
            for part in (slice(None), slice(None), slice(1, 2))
        )
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_keys_that_no_row_sees_are_not_read(split, device):
    """NaN before the window of the first row, and after kv_end, changes no bit."""
    q, k, v = (torch.randn(1, 2, S, 16, device=device) for S in (40, 600, 600))
    kv_end = torch.full((1, 40), 590, dtype=torch.int32, device=device)
    options = {"window_size": (280, 0), "kv_end": kv_end}
    expected = lk.attention(q, k, v, **options)
    for x in (k, v):
        x[:, :, :280], x[:, :, 590:] = torch.nan, torch.nan
    assert torch.equal(lk.attention(q, k, v, **options), expected) or not KERNELS_RUN
