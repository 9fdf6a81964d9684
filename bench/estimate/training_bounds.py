"""Bounds from below on a training step, of stock and ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from unittest import mock

from bench.estimate import bounds
from bench.gpus import GPUS
from bench.measuring import records, timing
from bench.measuring.records import Record
from bench.training.runner import row_of
from bench.training.scale import Scale, put_rate
from bench.training.step import Step, llama
from bench.training.variations import Ours, Stock


def estimates(scales: Iterable[Scale], about: Mapping[str, Any]) -> list[Record]:
    """Bounds from below, as bench.estimate.bounds has them, of stock and ours; the optimizer's step is not in them."""
    out = []
    for scale in scales:
        stock = llama(scale, "meta", scale.dtype)
        # It looks at the tokens' values.
        no_mask = mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", lambda *_, **__: None)
        for variation in (Stock(False), Ours(False)):
            step = Step(scale, variation, "meta", scale.dtype, stock)
            with bounds.counting_flash(), no_mask:
                tally = bounds.count(lambda step=step: step.backward(step.forward()))
                saved = timing.saved_for_backward(step.forward)
            for gpu, model in GPUS.items():
                r = row_of(scale, variation.name, {**about, "gpu": gpu, "driver": "none"})
                r.ms, r.method, r.estimate, r.saved = (
                    tally.milliseconds(model.ceilings, r.dtype), "model", True, saved)  # fmt: skip
                put_rate(r, scale, model.ceilings)
                out.append(r)
    return records.with_ratios(out)
