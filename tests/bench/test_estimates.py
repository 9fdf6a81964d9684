"""Bounds without a GPU: bytes and FLOPs are counted on tensors without data."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from bench.estimate import bounds
from bench.gpus import GPUS
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from bench.providers.provider import OURS
from bench.training.scale import flops
from bench.training.step import Step, llama
from bench.training.variations import Stock
from bench.works.norms import RMSNorm
from tests.bench.fakes import ABOUT, EVERY_OP, tiny_model

pytestmark = pytest.mark.once


def test_bytes_and_flops_of_ops_are_counted():
    x, w = torch.empty(8, 32, device="meta"), torch.empty(32, 16, device="meta")
    tally = bounds.count(lambda: (x @ w).view(-1).t() + 1)
    assert [(op.name, op.bytes, op.flops) for op in tally.ops] == [
        ("aten.mm", (8 * 32 + 32 * 16 + 8 * 16) * 4, 2 * 8 * 32 * 16),
        ("aten.add", 2 * 8 * 16 * 4, 0),
    ]
    tally = bounds.count(lambda: torch.empty(4, device="meta").expand(100, 4) * x.new_empty(100, 1).expand(100, 4))
    assert [op.bytes for op in tally.ops] == [(4 + 100 + 400) * 4]  # what is broadcast is there once
    # 1 GB/s is a byte a nanosecond
    assert bounds.count(lambda: x + 1).milliseconds({"copy": 1.0, "float32": 1.0}, "float32") == pytest.approx(2048e-6)


@pytest.mark.parametrize("work", EVERY_OP, ids=lambda w: w.shape)
def test_our_ops_move_little_more_than_the_least_bytes(work):
    work = dataclasses.replace(work, dtype=torch.bfloat16)
    made = bounds.estimates([work], [Ours()], ABOUT)
    assert {r.gpu for r in made} == set(GPUS) and all(r.estimate and r.method == "model" for r in made)
    most = 2.0 if work.op == "rope_attention" else 1.4  # rotated q and k are written, and read again
    for r in made:
        floor = max(work.bytes(r.direction) / GPUS[r.gpu].ceilings["copy"] / 1e6,
                    work.flops(r.direction) / GPUS[r.gpu].ceilings["bfloat16"] / 1e9)  # fmt: skip
        assert 0.9 * floor <= r.ms <= most * floor, r  # rstd, delta; scores twice in a backward


def test_plain_pytorch_moves_more():
    work = RMSNorm(shape="", M=4096, N=4096)
    made = bounds.estimates([work], [Ours(), Eager()], ABOUT)
    ours, eager = (next(r.ms for r in made if r.provider == name) for name in (OURS, "eager"))
    assert eager > 5 * ours


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "llama"])
def test_flops_of_a_step_are_those_that_are_counted(whole):
    pytest.importorskip("transformers")
    scale = tiny_model(whole, 2)
    step = Step(scale, Stock(False), "meta", scale.dtype, llama(scale, "meta", scale.dtype))
    no_mask = mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", lambda *_, **__: None)
    with bounds.counting_flash(), no_mask:
        tally = bounds.count(lambda: step.backward(step.forward()))
    assert sum(op.flops for op in tally.ops) == flops(scale)
