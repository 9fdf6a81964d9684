"""Times of calls on a GPU: many samples of each provider, in turns, on tensors that are not in the cache.

Only `GpuClock` needs a GPU.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from bench.measuring.capture import CYCLES_A_MS, Calls, EmptyCapture, Lost, brief, capture, gpu_fault, host_wait

Sampler = Callable[[], float]  # takes one sample and returns milliseconds a call

WARM = 3  # rounds whose samples are dropped
ROUNDS, LEAST_ROUNDS = 20, 5  # rounds after those, at most and at least
SAMPLE_MS = 1.0  # a sample repeats its calls until it takes this long, since events have a resolution of 0.5 µs
MOST_CALLS = 200
MOST_SETS = 512


class Sampling(NamedTuple):
    """A sampler, its method ("graph" or "events"), and the reason if events were used in place of a graph."""

    sampler: Sampler
    method: str
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a call (the median), and the range of the middle half of the samples divided by the median."""

    ms: float
    spread: float
    samples: int


def summarise(samples: Sequence[float]) -> Timing:
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
    return Timing(median, (high - low) / median if median else 0.0, len(samples))


def in_turns(
    samplers: Mapping[str, Sampler],
    seconds: float,
    clock: Sampler = time.perf_counter,
    failed: Callable[[str, BaseException], None] | None = None,
) -> dict[str, Timing]:
    """Take samples in the order A B C, C B A, A B C, ..., so that a drift of the clock affects all alike.

    Ends after ROUNDS rounds, or once `seconds` are over and LEAST_ROUNDS rounds are done. A sampler that raises takes
    no further samples and has no timing; `failed` gets its name and the exception. Without `failed` it is raised.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    end = clock() + seconds
    for i in range(WARM + ROUNDS):
        if i >= WARM + LEAST_ROUNDS and clock() > end:
            break
        for name in list(samples) if i % 2 == 0 else list(reversed(samples)):
            try:
                samples[name].append(samplers[name]())
            except (Exception, SystemExit) as e:
                if failed is None:
                    raise
                del samples[name]
                failed(name, e)
    return {name: summarise(taken[WARM:]) for name, taken in samples.items()}


def sets_needed(touched: int, cache: int) -> int:
    """How many sets of tensors calls take in turn, so that no set is in a cache of `cache` bytes when it is used again.

    `touched` is the bytes that one call moves. At most MOST_SETS: work of a few kilobytes stays in the cache, as it
    does in a model.
    """
    return 1 if touched >= 4 * cache else min(max(2, math.ceil(2 * cache / max(touched, 1)) + 1), MOST_SETS)


class GpuClock:
    """Takes samples on the current CUDA device: a graph if the calls can be captured, else calls between events."""

    def __init__(self) -> None:
        self.cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.stream = torch.cuda.Stream()

    def sampler(self, calls: Calls, by_events: str | None = None) -> Sampling:
        """A sampler that repeats `calls`, each on its own tensors, until a sample takes SAMPLE_MS.

        by_events: the reason not to try a capture, or None. Raises Lost if a failed capture left the process unusable.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            calls[0]()  # compiles and tunes, which may wait for the GPU
        reason = by_events or host_wait(calls, self.stream)
        once = self._launched(calls, 1) * len(calls)
        repeats = max(1, min(math.ceil(SAMPLE_MS / max(once, 1e-3)), MOST_CALLS // len(calls)))
        if reason is None:
            try:
                graph = capture(lambda: _repeat(calls, repeats), self.stream)
                count = repeats * len(calls)
                return Sampling(lambda: self._between_events(graph.replay) / count, "graph")
            except EmptyCapture:
                raise  # events would measure nothing either
            except Exception as e:  # a provider may do anything that cannot be captured
                reason = f"its capture failed: {brief(e)}"
            if fault := gpu_fault("cuda"):
                raise Lost(f"{reason}; then {fault}")
        return Sampling(lambda: self._launched(calls, repeats), "events", f"timed by events: {reason}")

    def eager_sampler(self, step: Callable[[], object]) -> Sampling:
        """A sampler of one `step` on the current stream, as a user runs it: if the host is slower, its time counts."""
        step()

        def sample() -> float:
            torch.cuda.synchronize()
            return self._between_events(step, torch.cuda.current_stream())

        return Sampling(sample, "events")

    def _launched(self, calls: Calls, repeats: int) -> float:
        """Milliseconds a call. The GPU sleeps first, so that the host launches ahead of it."""
        count = repeats * len(calls)
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(int(CYCLES_A_MS * min(0.1 * count, 20.0)))
        return self._between_events(lambda: _repeat(calls, repeats)) / count

    def _between_events(self, run: Callable[[], object], stream: torch.cuda.Stream | None = None) -> float:
        with torch.cuda.stream(stream or self.stream):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def ceilings(self) -> dict[str, float]:
        """The best rates of this machine: GB/s of a copy (read plus written), TFLOP/s of a product by dtype."""
        x = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
        y = torch.empty_like(x)
        by_events = "a graph copies memory in another way, a fifth slower on an H100"
        rates = {"copy": 2 * x.numel() / self._median([lambda: y.copy_(x)], by_events) / 1e6}
        for dtype, n in ((torch.bfloat16, 8192), (torch.float16, 8192), (torch.float32, 4096)):
            a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
            rates[str(dtype)[6:]] = 2 * n**3 / self._median([lambda a=a, b=b: a @ b]) / 1e9
        return rates

    def _median(self, calls: Calls, by_events: str | None = None) -> float:
        return in_turns({"": self.sampler(calls, by_events).sampler}, 1.0)[""].ms


def _repeat(calls: Calls, repeats: int) -> None:
    for _ in range(repeats):
        for call in calls:
            call()


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """The most bytes that `run` has allocated at one time, without those allocated before. On a CPU, which does not
    know, None, and nothing is run."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_for_backward(forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps alive for the backward. Each storage counts once; inputs are among them."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage  # keeping it alive prevents a second storage at its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = forward()
    del outputs
    return sum(storage.nbytes() for storage in kept.values())
