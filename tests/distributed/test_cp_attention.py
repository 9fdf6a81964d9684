"""Context-parallel attention on 2, 4 and 8 processes against one device."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from llama_kernels.distributed import balanced_layout
from tests.distributed import jobs
from tests.distributed.cases import TOKENS, Case, doc_starts
from tests.distributed.processes import run
from tests.support.environment import INTERPRETED
from tests.support.judge import UNIT

plain_only = pytest.mark.skipif(INTERPRETED, reason="sizes of the plain run; the interpreter runs the bitwise cases")

DOCUMENTS = ((13, 14, 30), (24,))  # across borders of chunks, on one, and a document of one token
INTERLEAVED = [range(0, TOKENS, 2), range(1, TOKENS, 2)]  # as lists of positions, for two ranks
BALANCED = [x.tolist() for x in balanced_layout(doc_starts(DOCUMENTS), 4, chunk=4).lists]  # likewise, for four
OPTIONS = (
    Case(),
    Case(documents=DOCUMENTS, sinks=True),
    Case(documents=DOCUMENTS, window_size=(9, -1)),
    Case(documents=DOCUMENTS, is_causal=False, window_size=(5, 7), softcap=3.0),
    Case(is_causal=False, Dv=24, sinks=True),
    Case(Hkv=1, window_size=(7, -1)),
)
METHODS = {2: ("ring", "all_gather", "ulysses"), 4: ("ring", "all_gather", "ulysses", ("ulysses", "ring"))}
KINDS = {2: ("zigzag", "contiguous", INTERLEAVED), 4: ("zigzag", BALANCED)}


def in_float64(ranks: int) -> list[Case]:
    choices = itertools.product(OPTIONS, METHODS[ranks], KINDS[ranks])
    return [case._replace(method=method, kind=kind) for case, method, kind in choices]


# In bfloat16. With fewer key heads than processes, which share them in Ulysses.
ROUNDED = [Case(method=method, documents=DOCUMENTS, sinks=True, Hq=8) for method in METHODS[4]]
WITH_RANKS = [(ranks, case) for ranks in (2, 4) for case in in_float64(ranks)]


@functools.cache
def results(ranks: int) -> dict[str, Any]:
    """What all processes found, by the name of the job. One start of the processes serves all tests."""
    todo: dict[str, Any] = {}
    if ranks == 8:
        todo["blocks"] = (jobs.errors_with_rounded_blocks, (ROUNDED[0],))
    else:
        todo |= {f"{case}": (jobs.errors_in_float64, (case,)) for case in in_float64(ranks)}
        todo["sent"] = (jobs.sent, (Case(),))
    if ranks == 2:
        todo |= {mistake: (jobs.largest_error_with, (mistake,)) for mistake in jobs.MISTAKES}
    else:
        todo |= {f"rounded {case}": (jobs.errors_of_the_ops, (case, torch.bfloat16)) for case in ROUNDED}
        todo["held"] = (jobs.held, (Case(),))
        todo |= {f"repeats {case}": (jobs.repeats, (case,)) for case in ROUNDED}
    return run(todo, ranks)


def found(ranks: int, name: str) -> Any:
    result = results(ranks)[name]
    assert not isinstance(result, str), result
    return result


@plain_only
@pytest.mark.once
@pytest.mark.parametrize("ranks, case", WITH_RANKS, ids=str)
def test_exact_in_float64(ranks, case):
    errors = found(ranks, f"{case}")
    assert max(errors.values()) <= 1e-13, errors


@plain_only
@pytest.mark.once
@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_bfloat16_is_as_accurate_as_on_one_device(case, ranks):
    errors, alone = found(ranks, f"rounded {case}")
    assert not less_accurate(errors, alone), (errors, alone)


def less_accurate(errors: dict[str, float], alone: dict[str, float]) -> list[str]:
    """The results with a larger error than on one device, by the factor of judge.py: partial results are float32, so
    that each result is rounded once."""
    return [name for name in errors if errors[name] > 1.15 * alone[name] + UNIT[torch.float32]]


@plain_only
@pytest.mark.once
def test_blocks_in_bfloat16_would_be_less_accurate():
    assert less_accurate(*found(8, "blocks")) == ["out", "dq", "dk", "dv", "dsinks"]


@plain_only
@pytest.mark.once
@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_two_runs_give_the_same_bits(case, ranks):
    assert found(ranks, f"repeats {case}")


@plain_only
@pytest.mark.once
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ring_sends_six_blocks_a_hop_of_key_heads_alone(ranks):
    """k and v forward, k and v backward, dk and dv backward: each W - 1 times."""
    shapes = found(ranks, "sent")
    assert shapes == [(2, 2, TOKENS // ranks, 16)] * 6 * (ranks - 1)


@plain_only
@pytest.mark.once
def test_a_ring_holds_two_blocks_beside_its_own():
    """Of keys and values: the block at work and the one that comes. Of their gradients: what came and what comes."""
    assert found(4, "held") == {torch.bfloat16: 2 * 2, torch.float32: 2 * 2}


@plain_only
@pytest.mark.once
@pytest.mark.parametrize("mistake", jobs.MISTAKES)
def test_planted_mistakes_show(mistake):
    assert found(2, mistake) > 1e-3


BITWISE = {"ulysses": [], "all_gather": ["dk", "dv"]}  # the results that may differ in the last bits


@functools.cache
def differing() -> dict[str, Any]:
    cases = {method: Case(method=method, documents=DOCUMENTS) for method in BITWISE}
    return run({method: (jobs.differing_bits, (case, torch.bfloat16)) for method, case in cases.items()}, 2)


@pytest.mark.parametrize("method", BITWISE)
def test_the_same_bits_as_on_one_device(method):
    result = differing()[method]
    assert isinstance(result, list), result
    assert set(result) <= set(BITWISE[method])
