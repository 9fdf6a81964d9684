"""bench.tiles: which tiles it tries, and that it times none that is wrong."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from bench import tiles
from bench.tiles import Candidate
from llama_kernels.core.language import tl, triton
from llama_kernels.ops.attention import softmax, tables
from llama_kernels.ops.attention.tables import Tile
from tests.support.launches import kernels_launched
from tests.support.planted import planted

SMALL = Tile(16, 32, 4, 1)


@pytest.fixture
def small(monkeypatch):
    """Calls that the interpreter can compute."""
    monkeypatch.setattr(tiles, "DEVICE", "cpu")
    monkeypatch.setattr(tiles, "CHECKED", 40)
    monkeypatch.setattr(tiles, "B", 1)
    monkeypatch.setattr(tiles, "HEADS", {64: (2, 1)})
    caches = (tiles._tensors, tiles._outputs, tiles._truth)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_the_tiles_around_one():
    tile = Tile(128, 64, 8, 3, split=True, for_options=SMALL)
    own, *others = tiles.around(tile)
    assert own == Tile(128, 64, 8, 3, split=True)
    assert len(set(others)) == len(others) == 19 and own not in others
    assert Tile(128, 64, 4, 2, split=True) in others and Tile(64, 64, 4, 2, split=True) not in others
    assert all(16 <= side <= 128 for t in others for side in (t.BLOCK_M, t.BLOCK_N))
    assert all(t.num_stages >= 1 for t in tiles.around(SMALL))


@pytest.mark.parametrize("pass_", tiles.PASSES)
def test_a_pass_takes_the_tile_of_a_candidate_and_the_others_theirs(pass_):
    usual = {p: tables.tile("sm_90", p, 64, torch.bfloat16) for p in tables.PASSES}
    with tiles.taking(Candidate(pass_, 64, SMALL)):
        found = {p: tables.tile("sm_90", p, 64, torch.bfloat16) for p in tables.PASSES}
    assert found == {**usual, pass_: SMALL}
    assert tables.tile("sm_90", pass_, 64, torch.bfloat16) == usual[pass_]


@pytest.mark.interpreter
@pytest.mark.parametrize("pass_", tiles.PASSES)
def test_a_right_tile_is_timed(pass_, small):
    with kernels_launched() as launches:
        assert tiles.compare(Candidate(pass_, 64, SMALL)) == ""
    found = [launch.options for launch in launches if launch.name == f"_{pass_}_kernel"]
    assert [(options["BLOCK_M"], options["BLOCK_N"]) for options in found] == [(16, 32)]


@triton.jit
def acc_not_rescaled(acc, p, shrink, v):
    return acc + tl.dot(p.to(v.dtype), v)


@pytest.mark.interpreter
def test_a_wrong_tile_and_one_that_fails_are_not_timed(small):
    with planted((softmax,), "add_values", acc_not_rescaled):
        assert "wrong numbers" in tiles.compare(Candidate("forward", 64, SMALL))
    with mock.patch.object(tiles, "call_of", side_effect=RuntimeError("out of resource\nshared memory")):
        assert tiles.compare(Candidate("forward", 64, SMALL)) == "RuntimeError: out of resource"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiles.main([]) == 2 and "sees no GPU" in capsys.readouterr().out
