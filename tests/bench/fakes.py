"""Replacements for the tests of the bench: small works, a clock, failing providers, and records of an imaginary GPU."""

from __future__ import annotations

from typing import Any

import torch

from bench.measuring import runner, timing
from bench.measuring.records import Record, Run
from bench.providers.eager import Eager
from bench.providers.provider import OURS, Provider
from bench.training.scale import Scale
from bench.works.attention import Attention, AttentionVarlen, Decode, RopeAttention
from bench.works.models import Model
from bench.works.norms import AddRMSNorm, RMSNorm
from bench.works.presets import small
from bench.works.rotations import QKNormRope, Rope, RopeIntoCache, RopeQKV
from tests.support.environment import DEVICE

_HEADS = {"Hq": 4, "Hkv": 2, "D": 16, "dtype": torch.float16}
NORM = RMSNorm(shape="norm", M=40, N=64, dtype=torch.float16)
ADD = AddRMSNorm(shape="add", M=10, N=32, dtype=torch.float16)
ROPE = Rope(shape="rope", B=2, S=9, **_HEADS)
DENSE = Attention(shape="dense", B=2, S=40, **_HEADS)
PACKED = AttentionVarlen(shape="packed", lengths=(12, 1, 20), **_HEADS)
_WORKS = (
    NORM,
    ADD,
    ROPE,
    QKNormRope(shape="heads", B=2, S=9, **_HEADS),
    RopeQKV(shape="projection", B=2, S=9, **_HEADS),
    RopeIntoCache(shape="cache", B=2, S=9, **_HEADS),
    DENSE,
    RopeAttention(shape="rotated", B=2, S=40, **_HEADS),
    Attention(shape="window", B=1, S=40, window=9, **_HEADS),
    PACKED,
    Decode(shape="decode", B=2, Sk=50, **_HEADS),
)
# Ops without a work above have those of the parity run.
EVERY_OP = (*_WORKS, *(work for work in small((torch.float16,)) if work.op not in {other.op for other in _WORKS}))
ABOUT = {"torch": "2", "triton": "3", "gpu": "Fake GPU", "driver": "1", "date": "2026-01-01T00:00:00+00:00"}
CEILINGS = {"copy": 1000.0, "bfloat16": 100.0, "float16": 100.0, "float32": 10.0}


def tiny_model(whole: bool, B: int) -> Scale:
    return Scale("tiny", whole, Model(64, 96, 2 if whole else 1, 4, 2, 16, 40), B, 32)


class FakeClock:
    """A clock for which every call takes `ms`. `calls` has the number of calls of each sampler."""

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


class FailingClock(FakeClock):
    """The sampler after the first `n` raises `e`, unless it samples by events."""

    def __init__(self, n: int, e: BaseException) -> None:
        super().__init__()
        self.n, self.e = n, e

    def sampler(self, calls, by_events=None):
        if len(self.calls) == self.n and by_events is None:
            self.calls.append(0)
            raise self.e
        return super().sampler(calls, by_events)


def options(clock: FakeClock | None = None, **more: Any) -> dict[str, Any]:
    """Keyword arguments of bench.measuring.runner.run and bench.training.runner.run."""
    return {"device": DEVICE, "clock": clock, "ceilings": CEILINGS, "about": ABOUT} | more


def run(work, *providers, clock=None, **more) -> list[Record]:
    return [r for rs in runner.run([work], providers, **options(clock, **more)) for r in rs]


def norm_provider(make: Any, name: str = "made up") -> Provider:
    """A provider of rms_norm only; `make(work, device)` returns its function."""

    class MadeUp(Provider):
        cpu = True

        def rms_norm(self, work, device):
            return make(work, device)

    MadeUp.name = name
    return MadeUp()


class Bad(Provider):
    """Plain PyTorch that also calls `does` when its function is made ("build") or called ("call")."""

    name, cpu = "bad", True

    def __init__(self, does, when="call") -> None:
        self.does, self.when = does, when

    def rms_norm(self, work, device):
        if self.when == "build":
            self.does()
        plain = Eager().any_op(work, device)

        def f(x, weight):
            if self.when == "call":
                self.does()
            return plain(x, weight)

        return f


def fail(e: BaseException):
    """A function that raises `e`."""

    def does(*_: Any, **__: Any):
        raise e

    return does


def reasons(made: list[Record], provider: str = "bad") -> set[str | None]:
    return {r.reason for r in made if r.provider == provider}


# --- records ---------------------------------------------------------------------------------------------------------

HEADS = {"B": 4, "S": 4096, "Hq": 32, "Hkv": 8, "D": 128}


def record(
    op: str = "rope", direction: str = "forward", ms: float | None = 1.0, provider: str = OURS, **more: Any
) -> Record:
    values = {"shape": "Llama 3.1 8B", "sizes": HEADS, "dtype": "bfloat16", "spread": 0.01, **more}
    return Record(op=op, direction=direction, ms=ms, provider=provider, **values)


def norm_row(N: int, percent: float, **more: Any) -> Record:
    """A record of the forward of rms_norm with rows of N, at `percent` of the bandwidth of a copy."""
    sizes = {"op": "rms_norm", "shape": f"rows of {N}", "sizes": {"M": 16384, "N": N}}
    values = {**sizes, "unit": "GB/s", "percent": percent}
    return record(**{**values, **more})


def fake_run(*rs: Record, gpu: str = "Fake GPU", **extra: Any) -> Run:
    return Run({"gpu": gpu, "torch": "2"}, CEILINGS, list(rs), extra)
