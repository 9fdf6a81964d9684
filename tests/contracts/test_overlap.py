"""Tensors that are written in place may be views of one tensor if they share no element."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core import overlap
from llama_kernels.core.overlap import shares_with_itself, sharing_pair
from tests.support.ops import sample

B, S, D = 2, 6, 8


def _of_rows(rows: torch.Tensor, width: int, *firsts: int) -> tuple[torch.Tensor, ...]:
    """Heads (B, H, S, D), from `width` columns of each row (B, S, columns) after each of `firsts`."""
    return tuple(rows[..., first : first + width].unflatten(-1, (-1, D)).transpose(1, 2) for first in firsts)


def _of_memory(*firsts: int) -> tuple[torch.Tensor, ...]:
    """Dense (B, 2, S, D) from each of `firsts`, in one memory."""
    memory = torch.randn(1000)
    return tuple(memory.as_strided((B, 2, S, D), (2 * S * D, S * D, D, 1), first) for first in firsts)


# Two tensors in one memory, each (B, 2, S, D).
APART = {
    "columns of a projection": lambda: _of_rows(torch.randn(B, S, 4 * D), 2 * D, 0, 2 * D),
    "heads of a dense tensor": lambda: torch.randn(B, 4, S, D).chunk(2, 1),
    "halves of the last dimension": lambda: torch.randn(B, 2, S, 2 * D).chunk(2, -1),
    "k and v of a token in turn": lambda: torch.randn(B, 2, S, 2, D).unbind(3),
    "every other token": lambda: torch.randn(B, 2, S, 2, D).flatten(2, 3).unflatten(2, (S, 2)).unbind(3),
    "every other head": lambda: torch.randn(B, S, 2, 2, D).transpose(1, 3).unbind(2),
    "sequences in turn": lambda: torch.randn(B, 2, 2, S, D).unbind(1),
    "one after another": lambda: _of_memory(0, B * 2 * S * D),
}
SHARED = {
    "a head of both": lambda: _of_rows(torch.randn(B, S, 5 * D), 2 * D, 0, D),
    "a column of both": lambda: _of_rows(torch.randn(B, S, 5 * D), 2 * D, 0, 2 * D - 1),
    "the last element and the first": lambda: _of_memory(0, B * 2 * S * D - 1),
    "the same elements in another order": lambda: (x := torch.randn(B, 2, S, D), x.view(B, S, 2, D).transpose(1, 2)),
}


def _share(x: torch.Tensor, y: torch.Tensor) -> bool:
    return sharing_pair((x, y), 1) == (0, 1)


@pytest.mark.parametrize("kind", APART)
def test_views_that_share_no_element_are_written(kind):
    q, k = APART[kind]()
    args = {**sample("rope"), "q": q, "k": k}
    expected = lk.rope(**args)
    lk.rope(**args, inplace=True)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])

    caches, args = APART[kind](), sample("rope_into_cache")
    owned = [cache.clone() for cache in caches]
    lk.rope_into_cache(**{**args, "k_cache": owned[0], "v_cache": owned[1]})
    lk.rope_into_cache(**{**args, "k_cache": caches[0], "v_cache": caches[1]})
    assert torch.equal(caches[0], owned[0]) and torch.equal(caches[1], owned[1])


@pytest.mark.parametrize("kind", SHARED)
def test_views_that_share_an_element_are_refused_before_anything_is_written(kind):
    for x, y in (SHARED[kind](), SHARED[kind]()[::-1]):
        before = x.clone(), y.clone()
        with pytest.raises(ValueError, match=r"rope: k is in the memory of q; .* Pass k\.clone\(\)"):
            lk.rope(**{**sample("rope"), "q": x, "k": y}, inplace=True)
        with pytest.raises(ValueError, match="rope_into_cache: v_cache is in the memory of k_cache"):
            lk.rope_into_cache(**{**sample("rope_into_cache"), "k_cache": x, "v_cache": y})
        assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_token_inside_of_a_cache_is_refused_before_anything_is_written(name, cache):
    """Programs write rows of the cache that others still read as tokens."""
    args = sample("rope_into_cache")
    heads, tokens = args["q"].shape[1], args["q"].shape[2]
    memory = torch.randn(2, heads, 12, args["k"].shape[-1], dtype=args["k"].dtype, device=args["k"].device)
    args |= {name: memory[:, : args[name].shape[1], 3 : 3 + tokens], cache: memory[:, : args["k"].shape[1]]}
    other = "v_cache" if cache == "k_cache" else "k_cache"
    args[other] = torch.randn_like(args[cache])
    before = memory.clone()
    with pytest.raises(ValueError, match=rf"rope_into_cache: {name} is in the memory of {cache}; .*Pass {name}\.clone"):
        lk.rope_into_cache(**args)
    assert torch.equal(memory, before)


def test_two_of_many_tensors_share_only_if_one_of_them_is_written():
    x, y = SHARED["a head of both"]()
    z = torch.empty(3)
    assert sharing_pair((z, x, y), 1) is None and sharing_pair((z, x, y), 2) == (1, 2)
    assert sharing_pair((x, z, y), 1) == (0, 2)


def test_the_answer_is_that_of_a_list_of_all_addresses():
    """For random layouts. Half of them have nested strides, as slices make them."""
    draw, memory, found = random.Random(7), torch.empty(4000, dtype=torch.int16), 0

    def layout() -> torch.Tensor:
        shape = [draw.randint(1, 4) for _ in range(draw.randint(1, 4))]
        if draw.random() < 0.5:
            strides = [draw.choice((0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 33, 64)) for _ in shape]
        else:
            strides = [4 * 5**i for i in draw.sample(range(len(shape)), len(shape))]
        return memory.as_strided(shape, strides, draw.randint(0, 200))

    def addresses(x: torch.Tensor) -> list[int]:
        indices = itertools.product(*map(range, x.shape))
        return [x.storage_offset() + sum(i * s for i, s in zip(at, x.stride(), strict=True)) for at in indices]

    for _ in range(2000):
        x, y = layout(), layout()
        of_x, of_y = addresses(x), addresses(y)
        shared = not set(of_x).isdisjoint(of_y)
        assert _share(x, y) == shared, (x.shape, x.stride(), y.shape, y.stride())
        assert shares_with_itself(x.shape, x.stride()) == (len(set(of_x)) < len(of_x)), (x.shape, x.stride())
        found += shared
    assert 200 < found < 1000


def test_tensors_of_other_dtypes_share_bytes():
    memory = torch.empty(64, dtype=torch.uint8)
    odd, words = memory.as_strided((4,), (2,), 1), memory.view(torch.int32)  # odd: bytes 1, 3, 5 and 7
    assert _share(words, odd) and _share(odd, words)
    assert not _share(words[2:], odd) and not _share(memory[::2], odd)


def test_a_search_that_takes_too_long_refuses_nothing(monkeypatch):
    x, y = SHARED["a head of both"]()
    assert _share(x, y)
    monkeypatch.setattr(overlap, "_MOST_STEPS", 2)
    overlap._meet.cache_clear()
    assert not _share(x, y)
    overlap._meet.cache_clear()
