"""Packed documents: each as if it were alone. Positions that do not fall start none, unless stock's mask says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="4.57")

import transformers
from transformers import StaticCache

from llama_kernels.integrations.transformers import patch
from tests.integrations.small import FAMILIES, VERSION, Calls, as_stock, logits_of, not_interpreted, small, tokens
from tests.support.environment import DEVICE

pytestmark = not_interpreted

LENGTHS = (9, 2, 13)
IDS = tokens(1, sum(LENGTHS))
STARTS = torch.tensor([[*range(9), *range(2), *range(13)]], device=DEVICE)
families = pytest.mark.parametrize("family", FAMILIES)


def with_gradients(model: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    F.cross_entropy(logits[0], IDS[0]).backward()  # no shift: every logit counts, the last of a document too
    gradients = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": logits.detach(), **gradients}


def apart(model: Any) -> dict[str, torch.Tensor]:
    return with_gradients(model, torch.cat([model(ids, use_cache=False).logits for ids in IDS.split(LENGTHS, 1)], 1))


def packed(**how: Any):
    return lambda model: with_gradients(model, model(IDS, position_ids=STARTS, **how).logits)


def cu_seq_lens() -> dict[str, Any]:
    cu = torch.tensor([0, 9, 11, 24], dtype=torch.int32, device=DEVICE)
    return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 13, "max_length_k": 13}


def changed(model: Any, how: str) -> Any:
    ours = copy.deepcopy(model)
    if how == "patched":
        return patch(ours)
    ours.set_attn_implementation("llama_kernels")
    return ours


@pytest.mark.parametrize("how", ["patched", "by name"])
@pytest.mark.parametrize("use_cache", [False, True])
@families
def test_positions_that_start_anew(family, use_cache, how):
    model = small(family)
    as_stock(changed(model, how), model, apart, packed(use_cache=use_cache))


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_document_of_one_token(use_cache):
    """Positions 0, 0 fall nowhere: without a cache two documents, as stock has it; with one, a repeated position."""
    ids, positions = tokens(1, 6), torch.tensor([[0, 1, 2, 0, 0, 1]], device=DEVICE)
    cuts = (3, 3) if use_cache else (3, 1, 2)
    model = small()

    def alone(model: Any) -> dict[str, torch.Tensor]:
        pieces = zip(ids.split(cuts, 1), positions.split(cuts, 1), strict=True)
        return {"logits": torch.cat([model(x, position_ids=at, use_cache=True).logits for x, at in pieces], 1)}

    with torch.no_grad():
        as_stock(patch(copy.deepcopy(model)), model, alone, logits_of(ids, position_ids=positions, use_cache=use_cache))


@pytest.mark.parametrize("how", ["patched", "by name"])
@families
def test_cu_seq_lens(family, how):
    model = small(family)
    as_stock(changed(model, how), model, apart, packed(use_cache=False, **cu_seq_lens()))


@families
def test_a_prefill_into_a_static_cache(family):
    model = small(family)

    def prefill(model: Any) -> dict[str, torch.Tensor]:
        call = {"past_key_values": StaticCache(config=model.config, max_cache_len=40), "use_cache": True}
        if VERSION >= (5, 24):
            call["cache"] = call.pop("past_key_values")
        if VERSION < (5, 0):
            call["cache_position"] = torch.arange(24, device=DEVICE)
        with torch.no_grad():
            return {"logits": model(IDS, position_ids=STARTS, **call).logits}

    as_stock(patch(copy.deepcopy(model)), model, lambda model: {"logits": apart(model)["logits"]}, prefill)


@pytest.mark.parametrize("how", ["patched", "by name"])
def test_a_batch_of_the_flattening_collator(how):
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in collator([{"input_ids": ids[0].tolist()} for ids in IDS.split(LENGTHS, 1)]).items()
    }
    assert {"position_ids", "cu_seq_lens_q"} <= batch.keys()
    model = small()
    ours = changed(model, how)
    as_stock(ours, model, apart, lambda model: with_gradients(model, model(**batch).logits))
    assert ours(**batch).loss.isfinite()


def test_each_row_has_documents_of_its_own():
    ids = tokens(2, 12)
    positions = torch.tensor([[*range(5), *range(7)], [*range(10), *range(2)]], device=DEVICE)
    model = small()

    def alone(model: Any) -> dict[str, torch.Tensor]:
        pieces = ((0, 0, 5), (0, 5, 12), (1, 0, 10), (1, 10, 12))
        return {"logits": torch.cat([model(ids[row : row + 1, a:b]).logits[0] for row, a, b in pieces])}

    with torch.no_grad():
        for use_cache in (True, False):
            run = lambda model: {  # noqa: E731
                "logits": model(ids, position_ids=positions, use_cache=use_cache).logits.flatten(0, 1)  # noqa: B023
            }
            as_stock(patch(copy.deepcopy(model)), model, alone, run)


# One document, whose positions do not go up by one, as in PoSE, parallel branches, ablations without positions. Without
# a cache Transformers' mask splits it at every such step, and so does ours; with a cache neither does.
ODD_POSITIONS = {
    "a jump": [*range(8), *range(48, 56)],
    "repeated": [0, 1, 2, 3, 3, 3, 3, *range(4, 13)],
    "constant": [0] * 16,
    "half steps": [i / 2 for i in range(16)],
    "beginning late": [*range(30, 46)],
}


@pytest.mark.parametrize("how", ["patched", "by name"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", ODD_POSITIONS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_odd_positions_mean_what_they_mean_in_stock(family, positions, use_cache, how):
    positions = torch.tensor([ODD_POSITIONS[positions]] * 2, device=DEVICE)
    model = small(family)
    run = logits_of(tokens(2, 16), position_ids=positions, use_cache=use_cache)
    as_stock(changed(model, how), model, run)


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_with_an_attention_mask_positions_start_no_document(side):
    """As in stock."""
    ids = tokens(1, 24)
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 4), "right": slice(-4, None), "none": slice(0, 0)}[side]] = 0
    model = small()
    ours = patch(copy.deepcopy(model))

    def run(model: Any) -> dict[str, torch.Tensor]:
        return {"logits": model(ids, attention_mask=mask, position_ids=STARTS).logits[mask.bool()]}

    with torch.no_grad():
        as_stock(ours, model, run)
        one = run(ours)["logits"]
        assert (one - ours(ids, position_ids=STARTS).logits[mask.bool()]).abs().max() > 1e-2


def test_positions_of_one_call_are_not_those_of_the_next():
    model = small()
    ours, ids = patch(copy.deepcopy(model)), IDS
    with torch.no_grad():
        ours(ids, position_ids=STARTS)
    as_stock(ours, model, logits_of(ids))
    with Calls() as calls:
        ours(ids)
    assert all(call["kv_start"] is None for call in calls.of("attention_forward"))
