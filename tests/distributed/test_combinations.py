"""Every kind of parallelism, and combinations of them, on 2 and 4 processes against the stock model in one process."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from llama_kernels.core.versions import major_minor
from tests.distributed import combinations, titan
from tests.distributed.comparison import check
from tests.distributed.processes import run
from tests.integrations.small import VERSION
from tests.support.environment import INTERPRETED

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(INTERPRETED, reason="about what is sent to whom; the kernels have other tests"),
]
METHODS = ("ring", "all_gather", "ulysses")
ORDERS = ("first", "last")  # when the model is patched
# Until torch 2.12 a stage of an exported pipeline asks for the gradient of all that it receives, integers too. Before
# Transformers 5.24 the first stage of a stock model, too, lacks an argument.
EXPORTS = (major_minor(torch.__version__) or (0, 0)) >= (2, 13) and VERSION >= (5, 24)
# Earlier releases were not tested with a DistributedConfig.
LOADS_SHARDED = VERSION >= (5, 24)

# On 2 and on 4 processes: what is run, by name. A compiled model comes first, so that it meets the first DTensor.
JOBS: dict[int, dict[str, Any]] = {
    2: {
        "TP + SP, compiled": (titan.tp_sp, (True,)),
        "TP + SP": (titan.tp_sp, (False,)),
        "DDP": (combinations.ddp, ()),
        **{f"FSDP2, patched {order}": (combinations.fsdp2, (False, order)) for order in ORDERS},
        **{f"FSDP2 with norms apart, patched {order}": (combinations.fsdp2, (True, order)) for order in ORDERS},
        **{f"TP, patched {order}": (combinations.tp, (order,)) for order in ORDERS},
        "TP + SP of a patched model, compiled": (combinations.tp_sp_compiled, ()),
        **{f"TP + SP, patched {order}": (combinations.tp_sp, (order,)) for order in ORDERS},
        **{f"CP ({method}) x DDP": (combinations.cp_ddp, (method,)) for method in METHODS},
        **{f"CP ({method}) x FSDP2": (combinations.cp_fsdp2, (method,)) for method in METHODS},
        "pipeline, GPipe": (titan.pipeline, ("GPipe",)),
        "pipeline, 1F1B": (titan.pipeline, ("1F1B",)),
        **({"pipeline, exported": (combinations.exported_pipeline, ())} if EXPORTS else {}),
    },
    4: {
        "HSDP": (combinations.hsdp, ()),
        "FSDP2 x (TP + SP)": (titan.fsdp2_tp_sp, ()),
        **({"FSDP2 x TP by Transformers": (combinations.fsdp2_tp_by_transformers, ())} if LOADS_SHARDED else {}),
        "CP (ulysses and ring) x FSDP2": (combinations.ulysses_and_ring_fsdp2, ()),
        **{f"CP ({method}) x TP": (combinations.cp_tp, (method,)) for method in METHODS},
        **{f"CP ({method}) x (TP + SP)": (titan.cp_tp_sp, (method,)) for method in METHODS},
    },
}
LAYOUTS = [*itertools.permutations(("whole", "FSDP2", "TP", "FSDP2 x TP"), 2)]


@functools.cache
def results(ranks: int) -> dict[str, Any]:
    todo = dict(JOBS[ranks])
    if ranks == 4:
        todo |= {f"{pair}": (combinations.weights_that_differ_after, pair) for pair in LAYOUTS}
    return run(todo, ranks)


@pytest.mark.parametrize("ranks, name", [(ranks, name) for ranks, jobs in JOBS.items() for name in jobs])
def test_loss_and_gradients_are_those_of_one_process(ranks, name):
    check(results(ranks)[name])


@pytest.mark.parametrize("name", [name for name in JOBS[2] if "TP + SP" in name and "patched" in name])
def test_patched_norms_are_ours_in_sequence_parallel(name):
    found = results(2)[name]
    assert found["ours"] == found["norms"] > 0, found


@pytest.mark.parametrize("saved, loaded", LAYOUTS)
def test_a_distributed_checkpoint_loads_into_another_layout(saved, loaded):
    assert results(4)[f"{(saved, loaded)}"] == []
