"""Patched models under torch.compile and torch.export: they are one graph, and give the results of stock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import StaticCache

from tests.integrations.comparison import (
    Results,
    Run,
    compare_with_stock,
    logits_and_gradients,
    logits_of,
    padding_mask,
)
from tests.integrations.small import CACHE, VERSION, not_interpreted, patched, small, tokens
from tests.support.environment import DEVICE

pytestmark = not_interpreted


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def skip_unless_it_compiles(stock: Any, run: Run) -> None:
    """Skip where the stock model does not compile: in some releases of Transformers, the experts of GPT-OSS do not."""
    model = copy.deepcopy(stock)
    model.config._experts_implementation = "batched_mm"
    try:
        run(torch.compile(model, backend="aot_eager", fullgraph=True))
    except Exception as error:
        pytest.skip(f"the stock model does not compile: {str(error).splitlines()[0]}")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "side", "layers"),
    [("llama", "left", 1), ("mistral", None, 1), ("qwen3", "left", 1), ("gemma3_text", "left", 2),
     ("gpt_oss", "left", 2)],  # the last two have a window in one of two layers
)  # fmt: skip
def test_training_compiles_without_a_graph_break(family, side, layers):
    stock, ids = small(family, num_hidden_layers=layers), tokens()
    run = logits_and_gradients(ids, None if side is None else padding_mask(ids, side))
    if family == "gpt_oss" and VERSION < (5, 10):
        skip_unless_it_compiles(stock, run)
    ours = patched(stock)
    ours.config._experts_implementation = "batched_mm"  # the eager one is a loop
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)

    def without_prefix(model: Any) -> Results:
        return {name.removeprefix("_orig_mod."): x for name, x in run(model).items()}

    compare_with_stock(compiled, stock, run, without_prefix)


def test_packed_documents_of_other_lengths_do_not_recompile():
    stock = small("mistral", num_hidden_layers=1)
    compiled = torch.compile(patched(stock), backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (20, 24, 30):  # of one bit length, for which masks are compiled: see intervals.py
        ids = tokens(1, length)
        positions = torch.tensor([[*range(8), *range(length - 8)]], device=DEVICE)
        with torch._dynamo.config.patch(error_on_recompile=length > 20):
            compare_with_stock(compiled, stock, logits_of(ids, position_ids=positions, use_cache=False))


def test_decoding_with_a_static_cache_compiles_once_without_a_graph_break():
    stock, ids = small(), tokens(2, 11)
    mask = padding_mask(ids, "left")
    ours = patched(stock)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = StaticCache(config=ours.config, max_cache_len=16)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def decode(model: Any) -> Results:
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        logits = []
        for a, b in ((0, 8), (8, 9), (9, 10), (10, 11)):
            call = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b], "use_cache": True, CACHE: cache}
            if VERSION < (5, 0):
                call["cache_position"] = torch.arange(a, b, device=DEVICE)
            if a:  # of the length of the cache, as `generate` passes it
                call["attention_mask"] = torch.nn.functional.pad(mask[:, :b], (0, 16 - b))
            logits.append((compiled if a else model)(ids[:, a:b], **call).logits[:, -1])
        return {"logits": torch.stack(logits, 1)}

    def whole(model: Any) -> Results:
        return {"logits": model(ids, attention_mask=mask, position_ids=positions).logits[:, 7:]}

    with torch.no_grad():
        compare_with_stock(ours, stock, whole, decode)
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("side", [None, "left"])
def test_a_model_exported_with_a_dynamic_length_gives_the_logits_of_stock(side):
    stock, ids = small(attention="sdpa"), tokens(2, 9)
    length = torch.export.Dim("length", min=2, max=64)
    mask = None if side is None else torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    shapes = {"input_ids": {1: length}, "attention_mask": None if mask is None else {1: length}, "use_cache": None}
    exported = torch.export.export(patched(stock), (), inputs, dynamic_shapes=shapes, strict=False).module()
    for n in (2, 3, 20):
        x = tokens(2, n)
        given = None
        if mask is not None:
            given = torch.ones_like(x)
            given[0, : n // 2] = 0

        def run(model: Any, x: Any = x, given: Any = given) -> Results:
            out = model(input_ids=x, attention_mask=given, use_cache=False).logits
            return {"logits": out.detach()[(torch.ones_like(x) if given is None else given).bool()]}

        compare_with_stock(exported, stock, run)
