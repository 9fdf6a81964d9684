"""Stand-ins for what the tests of the bench do not measure: clocks, ceilings, a tiny model."""

from __future__ import annotations

import torch

from bench.measuring import timing
from bench.training.scale import Scale
from bench.works.models import Model
from bench.works.norms import RMSNorm

NORM = RMSNorm(shape="norm", M=40, N=64, dtype=torch.float16)
ABOUT = {"torch": "2", "triton": "3", "gpu": "Fake GPU", "driver": "1", "date": "2026-01-01T00:00:00+00:00"}
CEILINGS = {"copy": 1000.0, "bfloat16": 100.0, "float16": 100.0, "float32": 10.0}


def tiny_model(whole: bool, B: int) -> Scale:
    model = Model(64, 96, 2 if whole else 1, 4, 2, 16, 40)
    return Scale("tiny", whole, model, B, 32)


class FakeClock:
    """Every call takes what `times` says of the provider whose turn it is."""

    cache = 1000

    def __init__(self, ms: float = 2.0) -> None:
        self.ms, self.calls = ms, []

    def ceilings(self):
        return CEILINGS

    def sampler(self, calls, by_events=None):
        self.calls.append(len(calls))
        for call in calls:
            call()
        return timing.Sampling(lambda: self.ms, "events" if by_events else "graph", by_events)

    def eager_sampler(self, step):
        step()
        return timing.Sampling(lambda: self.ms, "events")
