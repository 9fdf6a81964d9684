"""The ops on DTensors, on 2 and 4 processes, against the same calls on whole tensors."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.distributed import dtensors
from tests.distributed.processes import run
from tests.support.environment import INTERPRETED
from tests.support.judge import UNIT

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(INTERPRETED, reason="about placements, not about what runs on a shard"),
]
BOUND = 8 * UNIT[torch.float32]  # sums of float32 in another order: a few more roundings than the call it is held to

STAY_SHARDED = ("rows by batch", "rows by token", "batch", "heads")
# Name and placement of calls of which only the first result is used; whether they are compiled.
OF_ONE_RESULT = [
    (*case, compiled) for case in dtensors.CASES for compiled in (False, True)
    if case[1] in ("rows by token", "heads") or case in (("attention", "batch"), ("rope_attention", "batch"))
]  # fmt: skip

# Shape of the mesh, key heads, dimension of the mesh along which heads are sharded; whether they stay so.
BY_HEADS = {
    ((4,), 4, 0): True,
    ((4,), 2, 0): False,
    ((4,), 6, 0): False,
    ((2, 2), 2, 1): True,
    ((2, 2), 4, 0): True,
    ((2, 2), 3, 1): False,
}


@functools.cache
def results(ranks: int) -> dict[str, Any]:
    if ranks == 4:
        todo: dict[str, Any] = {name: (dtensors.error_on_a_mesh_of_two_dimensions, (name,)) for name in dtensors._CALLS}
        todo |= {f"{case}": (dtensors.attention_by_heads, case) for case in BY_HEADS}
        return run(todo, 4)
    todo = {f"{case}": (dtensors.error_and_placements, case) for case in dtensors.CASES}
    todo |= {f"{case}": (dtensors.error_where_one_result_is_used, case) for case in OF_ONE_RESULT}
    todo["weights"] = (dtensors.errors_where_the_weight_needs_a_gradient_or_not, ())
    return run(todo, 2)


def found(ranks: int, name: str) -> Any:
    result = results(ranks)[name]
    assert not isinstance(result, str), result
    return result


@pytest.mark.parametrize("case", dtensors.CASES, ids=", ".join)
def test_results_and_gradients_of_sharded_tensors(case):
    name, placement = case
    error, placements = found(2, f"{case}")
    assert error < BOUND
    if placement in STAY_SHARDED or (placement == "tokens" and name in ("rope", "qk_norm_rope")):
        assert "Shard" in placements[0], f"gathered: {placements}"
        if "norm" in name:
            assert "Partial" in placements[-1], f"the gradient of the weight is {placements[-1]}"


@pytest.mark.corpus(83)
@pytest.mark.parametrize("case", OF_ONE_RESULT, ids=str)
def test_results_that_are_not_used(case):
    """PyTorch makes plain tensors of their gradients, in each compiled graph. Attention never uses its lse."""
    error, placements = found(2, f"{case}")
    assert error < BOUND
    assert "Shard" in placements[0], f"gathered: {placements}"


@pytest.mark.parametrize("name", dtensors._CALLS)
def test_meshes_of_two_dimensions(name):
    assert found(4, name) < BOUND


@pytest.mark.parametrize("case, divided", BY_HEADS.items(), ids=str)
def test_attention_is_computed_on_shards_of_the_heads_where_the_mesh_divides_the_key_heads(case, divided):
    error, placement = found(4, f"{case}")
    assert error < BOUND
    assert ("Shard" in placement) == divided


def test_a_weight_may_need_a_gradient_in_one_call_and_none_in_the_next():
    assert max(found(2, "weights")) < BOUND
