"""A patched model with the kernels that this run has, in Triton's interpreter too."""

from __future__ import annotations

import torch

from tests.integrations.comparison import compare_with_stock, logits_and_gradients, padding_mask
from tests.integrations.small import patched, small, tokens


def test_a_patched_llama_computes_and_generates_what_stock_does():
    stock = small(num_hidden_layers=1)
    ours, ids = patched(stock), tokens(2, 8)
    mask = padding_mask(ids, "left")
    compare_with_stock(ours, stock, logits_and_gradients(ids, mask))
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), stock.generate(ids, **options))
