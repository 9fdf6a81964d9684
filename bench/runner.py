"""One piece of work after another: everyone's numbers are checked, then everyone is timed, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from bench import records, timing
from bench.providers import Provider, Unsupported
from bench.records import Record
from bench.work import Call, Function, Results, Work, as_tuple, compute, disparity, errors


class Clock(Protocol):
    """What takes the time. `timing.Gpu` is one."""

    cache: int

    def ceilings(self) -> dict[str, float]: ...

    def sampler(self, calls: Sequence[Callable[[], object]]) -> tuple[timing.Sampler, str]: ...

    def eager_sampler(self, step: Callable[[], object]) -> tuple[timing.Sampler, str]: ...


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
) -> Iterator[list[Record]]:
    """The records of each of `works`. Without a clock: parity and memory, no time.

    seconds: for the samples of one direction. Work that comes after `out_of_time` is listed as not run.
    """
    for work in works:
        bench = _Bench(work, device, clock, ceilings, about, directions, seconds)
        if out_of_time():
            yield [r for p in providers if p.has(work.op) for r in bench.rows(p.name, "not run: out of time")]
        else:
            yield bench.run(providers)


class _Bench:
    def __init__(self, work, device, clock, ceilings, about, directions, seconds) -> None:
        self.work, self.device, self.clock, self.ceilings, self.seconds = work, device, clock, ceilings, seconds
        self.about = records.repeated(about)
        self.directions = [d for d in work.directions if directions is None or d in directions]

    def rows(self, provider: str, reason: str | None = None) -> list[Record]:
        """One for each direction."""
        work = self.work
        return [
            Record(op=work.op, direction=direction, shape=work.shape, sizes=work.sizes, dtype=str(work.dtype)[6:],
                   provider=provider, reason=reason, **self.about)
            for direction in self.directions
        ]  # fmt: skip

    def run(self, providers: Sequence[Provider]) -> list[Record]:
        torch.manual_seed(0)
        torch.compiler.reset()  # each work starts as a user's process does
        try:
            call = self.work.draw(self.device)
            truth, plain = self.work.truth(call), self.work.yardstick(call)
        except torch.cuda.OutOfMemoryError:
            return [r for p in providers if p.has(self.work.op) for r in self.rows(p.name, "not run: inputs too large")]
        theirs = errors(self.work, plain, truth)
        del plain

        by_provider: dict[str, list[Record]] = {}
        functions: dict[str, Function] = {}
        for provider in providers:
            if provider.has(self.work.op):
                rows = by_provider[provider.name] = self.rows(provider.name)
                if f := self.checked(provider, call, truth, theirs, rows):
                    functions[provider.name] = f
        del truth
        if self.clock is not None:
            for i, direction in enumerate(self.directions):
                self.time(direction, call, functions, {name: rows[i] for name, rows in by_provider.items()})
        return records.with_ratios(r for rows in by_provider.values() for r in rows)

    def checked(
        self, provider: Provider, call: Call, truth: Results, theirs: dict[str, tuple[float, float]], rows: list[Record]
    ) -> Function | None:
        """The provider's function, if it gives right numbers. Fills in error and memory, or the reason."""
        backward = "backward" in self.work.directions
        reason = None
        try:
            f = provider.function(self.work, self.device)
            results = compute(self.work, f, call, backward)
            error, reason = disparity(self.work, results, truth, theirs)
            del results
            for r in rows:
                r.error = error if error == error else None
            if reason is None:
                self.memory(f, call, backward, rows)
                return f
        except Unsupported as e:
            reason = str(e)
        except Exception as e:  # a peer may raise anything; the run goes on
            reason = brief(e)
        for r in rows:
            r.reason = reason
        return None

    def memory(self, f: Function, call: Call, backward: bool, rows: list[Record]) -> None:
        step = Step(f, call, backward)
        saved = timing.saved_for_backward(step.forward) if backward else None
        for r in rows:
            r.saved = saved
            if r.direction == "backward":
                step.forward_once()
            r.memory = timing.peak_memory(step.of(r.direction))
            step.forget()

    def time(self, direction: str, call: Call, functions: Mapping[str, Function], rows: Mapping[str, Record]) -> None:
        backward = "backward" in self.work.directions
        touched = self.work.bytes(direction)
        samplers = {}
        for name, f in functions.items():
            if rows[name].reason is not None:
                continue
            try:
                # Tensors of its own: some peers write over their arguments.
                steps = [Step(f, call, backward) for _ in range(timing.sets_needed(touched, self.clock.cache))]
                if direction == "backward":
                    for step in steps:
                        step.forward_once(getattr(self.clock, "stream", None))
                samplers[name], rows[name].method = self.clock.sampler([step.of(direction) for step in steps])
            except Exception as e:
                rows[name].reason = brief(e)
        if not samplers:
            return
        for name, timed in timing.in_turns(samplers, self.seconds).items():
            r = rows[name]
            r.ms, r.spread, r.samples = timed.ms, timed.spread, timed.samples
            put_rate(r, self.work, self.ceilings)
            r.clock = records.clock()


class Step:
    """One call on tensors of its own, forward, backward or both."""

    def __init__(self, f: Function, call: Call, backward: bool) -> None:
        self.f, self.outputs = f, ()
        self.args = tuple(_same_layout(x).requires_grad_(backward) for x in call.args)
        self.grads = tuple(_same_layout(g) for g in call.grads)

    def of(self, direction: str) -> Callable[[], object]:
        return getattr(self, direction)

    def forward(self) -> object:
        return self.f(*self.args)

    def forward_once(self, stream: torch.cuda.Stream | None = None) -> None:
        """What `backward` goes back through; on the stream on which it will be captured."""
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.outputs = as_tuple(self.forward())

    def backward(self) -> object:
        return torch.autograd.grad(self.outputs, self.args, self.grads, retain_graph=True)

    def both(self) -> object:
        return torch.autograd.grad(as_tuple(self.forward()), self.args, self.grads)

    def forget(self) -> None:
        self.outputs = ()


def _same_layout(x: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of `x`."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x.detach())


def put_rate(r: Record, work: Work, ceilings: Mapping[str, float]) -> None:
    """Rate, unit, ceiling and percent, by whichever of bytes and FLOPs takes this machine longer."""
    size, flops = work.bytes(r.direction), work.flops(r.direction)
    copy, matmul = ceilings["copy"] * 1e6, ceilings[str(work.dtype)[6:]] * 1e9  # a millisecond
    by_flops = flops / matmul > size / copy
    done, r.unit, scale = (flops, "TFLOP/s", 1e9) if by_flops else (size, "GB/s", 1e6)
    r.ceiling = ceilings[str(work.dtype)[6:] if by_flops else "copy"]
    r.rate = done / r.ms / scale
    r.percent = 100 * r.rate / r.ceiling


def brief(e: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(e, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    text = f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__
    return text if len(text) <= 160 else text[:157] + "..."
