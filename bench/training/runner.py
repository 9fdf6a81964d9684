"""Measures a training step of decoder layers and Llama models of Transformers: checks each variation, then times all.

All variations have the same weights and tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bench.measuring import machine, timing
from bench.measuring.contain import Contained
from bench.measuring.journal import Journal
from bench.measuring.records import Record
from bench.measuring.runner import Clock, in_turns, one_after_another
from bench.training.scale import Scale, put_rate
from bench.training.step import Step, disparity, llama
from bench.training.variations import Stock, Variation
from bench.works.errors import relative_errors


def run(
    scales: Iterable[Scale],
    variations: Sequence[Variation],
    *,
    device: str,
    clock: Clock | None,
    ceilings: Mapping[str, float],
    about: Mapping[str, Any],
    seconds: float = 4.0,
    out_of_time: Callable[[], bool] = lambda: False,
    journal: Journal | None = None,
) -> Iterator[list[Record]]:
    """Yield the records of each scale: time of a step, tokens a second, memory, and parity on its first 256 tokens.

    An exception of a variation is the reason in its row. The arguments are those of bench.measuring.runner.run.
    """

    def start(scale: Scale) -> tuple[list[Record], Callable[[], None]]:
        rows = rows_of(scale, variations, about)
        every = list(rows.values())
        contained = Contained(every[0].work, device, journal or Journal())
        bench = _Bench(scale, rows, device, clock, ceilings, seconds, contained)
        return every, lambda: bench.run(variations)

    return one_after_another(scales, start, clock is not None, out_of_time)


def rows_of(scale: Scale, variations: Sequence[Variation], about: Mapping[str, Any]) -> dict[str, Record]:
    """An empty record for each variation."""
    return {v.name: row_of(scale, v.name, about) for v in variations}


def row_of(scale: Scale, name: str, about: Mapping[str, Any]) -> Record:
    return Record(op=scale.op, direction=scale.direction, shape=scale.shape, sizes=scale.sizes,
                  dtype=str(scale.dtype)[6:], provider=name,
                  **machine.repeated(about))  # fmt: skip


@dataclasses.dataclass
class _Bench:
    """Measures one scale and fills in `rows`."""

    scale: Scale
    rows: Mapping[str, Record]
    device: str
    clock: Clock | None
    ceilings: Mapping[str, float]
    seconds: float
    contained: Contained

    def run(self, variations: Sequence[Variation]) -> None:
        prepared = self.contained.attempt("", "inputs", self.rows.values(), self.prepare)
        if prepared is None:
            return
        sampled: dict[str, timing.Sampling] = {}
        for variation in variations:
            name, rows = variation.name, [self.rows[variation.name]]
            check = functools.partial(self.checked, variation, *prepared)
            step = self.contained.attempt(name, "numbers and memory", rows, check)
            if step is not None and self.clock is not None:
                with self.contained.step(name, "timing by events", rows):
                    sampled[name] = self.clock.eager_sampler(step)
        del prepared
        for name in in_turns(sampled, self.seconds, self.contained, self.rows):
            put_rate(self.rows[name], self.scale, self.ceilings)

    def prepare(self) -> tuple[Scale, nn.Module, list[torch.Tensor], list[float]]:
        """A scale of the first tokens, the stock model, and on that scale its float64 gradients and its errors."""
        torch.compiler.reset()
        short = dataclasses.replace(self.scale, B=1, S=min(self.scale.S, 256))
        stock = llama(self.scale, self.device, self.scale.dtype)
        truth = Step(short, Stock(False), self.device, torch.float64, stock).gradients()
        plain = Step(short, Stock(False), self.device, self.scale.dtype, stock).gradients()
        return short, stock, truth, [relative_errors(g, exact)[0] for g, exact in zip(plain, truth, strict=True)]

    def checked(
        self, variation: Variation, short: Scale, stock: nn.Module, truth: list[torch.Tensor], theirs: list[float]
    ) -> Step | None:
        """A step of `variation`, or None if its gradients are wrong. Fills in error and memory, or the reason."""
        r, dtype = self.rows[variation.name], self.scale.dtype
        r.error, r.reason = disparity(Step(short, variation, self.device, dtype, stock), truth, theirs)
        if r.reason is not None:
            return None
        step = Step(self.scale, variation, self.device, dtype, stock)
        step()  # compiles the model and allocates the state of the optimizer
        with variation.active():
            r.saved = timing.saved_for_backward(step.forward)
        r.memory = timing.peak_memory(step, self.device)
        return step
