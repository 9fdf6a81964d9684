"""Measures one piece of work after another: checks the numbers of every provider, then times all of them in turns."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from bench.measuring import machine, records, timing
from bench.measuring.capture import Calls, Lost
from bench.measuring.contain import Contained, mark_unfinished
from bench.measuring.journal import CAPTURE, Journal
from bench.measuring.kernels import kernels_of
from bench.measuring.records import NOT_RUN, Record
from bench.measuring.step import Step, put_rate
from bench.providers.provider import OURS, Provider
from bench.works.errors import disparity, errors
from bench.works.work import Call, Function, Results, Work, compute

Errors = dict[str, tuple[float, float]]  # what bench.works.errors.errors returns


class Clock(Protocol):
    """Takes the times, as `timing.GpuClock` does."""

    cache: int

    def ceilings(self) -> dict[str, float]: ...

    def sampler(self, calls: Calls, by_events: str | None = None) -> timing.Sampling: ...

    def eager_sampler(self, step: Callable[[], object]) -> timing.Sampling: ...


def run(
    works: Iterable[Work],
    providers: Sequence[Provider],
    *,
    device: str,
    clock: Clock | None,
    ceilings: Mapping[str, float],
    about: Mapping[str, Any],
    directions: Sequence[str] | None = None,
    seconds: float = 1.0,
    out_of_time: Callable[[], bool] = lambda: False,
    journal: Journal | None = None,
) -> Iterator[list[Record]]:
    """Yield the records of each of `works`. Without a clock: parity and memory, no times.

    Args:
        ceilings: as `Clock.ceilings` returns them.
        about: the machine, as machine.describe returns it.
        directions: which to measure; None for all.
        seconds: time for the samples of one direction.
        out_of_time: once it returns True, the remaining work is listed as not run.
        journal: gets the step under way, and the step that lost the process.

    An exception of a provider is the reason in its rows. Raises Lost as `one_after_another` does.
    """

    def start(work: Work) -> tuple[list[Record], Callable[[], None]]:
        rows = rows_of(work, providers, about, directions)
        bench = _Bench(work, rows, device, clock, ceilings, seconds, journal or Journal())
        return bench.every, lambda: bench.run(providers)

    return one_after_another(works, start, clock is not None, out_of_time)


def one_after_another(
    works: Iterable[Any],
    start: Callable[[Any], tuple[list[Record], Callable[[], None]]],
    timed: bool,
    out_of_time: Callable[[], bool],
) -> Iterator[list[Record]]:
    """Yield the records of each of `works`. `start` returns its empty rows, and a function that fills them in.

    Once `out_of_time` returns True, the remaining work is listed as not run. Raises Lost, after yielding the records
    of the work, if the process can no longer use its GPU.
    """
    for work in works:
        rows, measure = start(work)
        lost = None
        try:
            if out_of_time():
                for r in rows:
                    r.reason = f"{NOT_RUN}: out of time"
            else:
                measure()
        except Lost as e:
            lost = e
            mark_unfinished(rows, timed)
        yield records.with_ratios(rows)
        if lost is not None:
            raise lost


def rows_of(
    work: Work, providers: Sequence[Provider], about: Mapping[str, Any], directions: Sequence[str] | None = None
) -> dict[str, list[Record]]:
    """For each provider that has the op, an empty record for each direction."""
    chosen = [d for d in work.directions if directions is None or d in directions]
    same = {"op": work.op, "shape": work.shape, "sizes": work.sizes, "dtype": str(work.dtype)[6:]}
    same |= machine.repeated(about)
    return {p.name: [Record(direction=d, provider=p.name, **same) for d in chosen] for p in providers if p.has(work.op)}


@dataclasses.dataclass
class _Bench:
    """Measures one piece of work and fills in `rows`."""

    work: Work
    rows: Mapping[str, list[Record]]
    device: str
    clock: Clock | None
    ceilings: Mapping[str, float]
    seconds: float
    journal: Journal

    def __post_init__(self) -> None:
        self.every = [r for own in self.rows.values() for r in own]
        self.backward = "backward" in self.work.directions

    def run(self, providers: Sequence[Provider]) -> None:
        if not self.every:
            return
        self.contained = Contained(self.every[0].work, self.device, self.journal)
        prepared = self.contained.attempt("", "inputs", self.every, self.prepare)
        if prepared is None:
            return
        call, truth, plain = prepared
        functions = {}
        for p in providers:
            if p.name in self.rows:
                check = functools.partial(self.checked, p, call, truth, plain)
                functions[p.name] = self.contained.attempt(p.name, "numbers and memory", self.rows[p.name], check)
        functions = {name: f for name, f in functions.items() if f is not None}
        del prepared, truth
        if self.clock is not None:
            for i, _ in enumerate(next(iter(self.rows.values()))):
                self.time(call, functions, {name: own[i] for name, own in self.rows.items()})

    def prepare(self) -> tuple[Call, Results, Errors]:
        """The inputs, the float64 results, and the errors of plain PyTorch."""
        torch.manual_seed(0)
        torch.compiler.reset()  # each work starts as a user's process does
        call = self.work.draw(self.device)
        truth = self.work.truth(call)
        return call, truth, errors(self.work, self.work.yardstick(call), truth)

    def checked(self, provider: Provider, call: Call, truth: Results, plain: Errors) -> Function | None:
        """The provider's function, or None if its numbers are wrong. Fills in error and memory, or the reason."""
        rows, f = self.rows[provider.name], provider.function(self.work, self.device)
        results = compute(self.work, f, call, self.backward)
        error, reason = disparity(self.work, results, truth, plain)
        del results
        for r in rows:
            r.error, r.reason = error if math.isfinite(error) else None, reason
        if reason is not None:
            return None
        self.memory(f, call, rows)
        return f

    def memory(self, f: Function, call: Call, rows: list[Record]) -> None:
        """Fill in the bytes kept for the backward and, on a GPU, the peak memory and our kernels."""
        step = Step(f, call, self.backward)
        saved = timing.saved_for_backward(step.forward) if self.backward else None
        for r in rows:
            r.saved = saved
        if torch.device(self.device).type != "cuda":
            return  # no peak is known, so nothing is run for it
        for r in rows:
            if r.direction == "backward":
                step.forward_once()
            r.memory = timing.peak_memory(step.of(r.direction), self.device)
            if r.provider.startswith(OURS):
                r.kernels = kernels_of(step.of(r.direction))
            step.forget()

    def time(self, call: Call, functions: Mapping[str, Function], rows: Mapping[str, Record]) -> None:
        """Time all of `functions` in one direction. `rows` has the row of each."""
        sampled: dict[str, timing.Sampling] = {}
        for name, f in functions.items():
            if rows[name].reason is None:
                by_events = self.journal.by_events(name)
                doing = "timing by events" if by_events else CAPTURE
                with self.contained.step(name, doing, [rows[name]]):
                    sampled[name] = self.clock.sampler(self.calls(f, call, rows[name].direction), by_events)
        for name in in_turns(sampled, self.seconds, self.contained, rows):
            put_rate(rows[name], self.work, self.ceilings)

    def calls(self, f: Function, call: Call, direction: str) -> list[Callable[[], object]]:
        """Calls that together exceed the cache, each on its own tensors, which some peers write over."""
        sets = timing.sets_needed(self.work.bytes(direction), self.clock.cache)
        steps = [Step(f, call, self.backward) for _ in range(sets)]
        if direction == "backward":
            for step in steps:
                step.forward_once(getattr(self.clock, "stream", None))
        return [step.of(direction) for step in steps]


def in_turns(
    sampled: Mapping[str, timing.Sampling], seconds: float, contained: Contained, rows: Mapping[str, Record]
) -> list[str]:
    """Take the samples in turns, and fill in time and method, or the reason. Returns the names that have a time."""

    def noted(name: str) -> timing.Sampler:
        def sample() -> float:
            contained.begin(name, "sampling")
            return sampled[name].sampler()

        return sample

    if not sampled:
        return []
    samplers = {name: noted(name) for name in sampled}
    timings = timing.in_turns(samplers, seconds, failed=lambda name, e: contained.failed(e, [rows[name]]))
    contained.journal.end()
    mhz = machine.clock(contained.device)
    for name, timed in timings.items():
        r = rows[name]
        if timed.ms <= 0:
            r.reason = "took no time: it does not work on the current stream"
            continue
        r.ms, r.spread, r.samples, r.clock = timed.ms, timed.spread, timed.samples, mhz
        r.method, r.reason = sampled[name].method, sampled[name].reason
    return [name for name in timings if rows[name].ms is not None]
