"""The clock of the bench: the arithmetic of samples, what may be captured, and what a failed capture leaves behind.

Without a GPU `FakeCuda` stands in for torch.cuda. It imitates what torch 2.11 keeps after a capture that failed. The
tests at the end need a GPU.
"""

from __future__ import annotations

import contextlib
import types
import warnings

import pytest
import torch

import llama_kernels as lk
from bench.measuring import capture, timing
from tests.support.environment import DEVICE

pytestmark = pytest.mark.once

# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_median_and_spread():
    timed = timing.summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timed.ms == 3.0 and timed.samples == 5
    assert timed.spread == pytest.approx((52 - 1.5) / 3)  # the quartiles that statistics.quantiles gives
    assert timing.summarise([2.0, 2.0, 2.0]) == timing.Timing(2.0, 0.0, 3)
    assert timing.summarise([5.0]).spread == 0


def test_providers_take_turns_and_warm_rounds_do_not_count():
    order, rounds = [], {"a": 0, "b": 0}

    def sampler(name):
        def sample():
            order.append(name)
            rounds[name] += 1
            return 1000.0 if rounds[name] <= timing.WARM else 1.0 if name == "a" else 2.0

        return sample

    timed = timing.in_turns({"a": sampler("a"), "b": sampler("b")}, 10, clock=lambda: 0.0)
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    assert (timed["a"].ms, timed["b"].ms) == (1.0, 2.0)
    assert timed["a"].samples == timing.ROUNDS


def test_sampling_ends_when_its_time_is_over_but_never_before_the_least():
    ticks = iter(range(10**6))
    timed = timing.in_turns({"a": lambda: 1.0}, 0, clock=lambda: float(next(ticks)))
    assert timed["a"].samples == timing.LEAST_ROUNDS


def test_a_sampler_that_fails_takes_no_further_turns():
    left, failures = iter([1.0] * 6), []

    def fails():
        return next(left)  # StopIteration at the seventh sample

    timed = timing.in_turns({"a": fails, "b": lambda: 2.0}, 10, clock=lambda: 0.0, failed=lambda *x: failures.append(x))
    assert timed.keys() == {"b"} and timed["b"].samples == timing.ROUNDS
    assert [(name, type(e)) for name, e in failures] == [("a", StopIteration)]
    with pytest.raises(ZeroDivisionError):
        timing.in_turns({"a": lambda: 1 / 0}, 10)


@pytest.mark.parametrize("touched, sets", [(10, 201), (1000, 3), (999, 4), (4000, 1), (3999, 2), (0, 512)])
def test_no_set_is_in_the_cache_when_its_turn_comes(touched, sets):
    assert timing.sets_needed(touched, 1000) == sets
    assert sets in (1, timing.MOST_SETS) or (sets - 1) * touched >= 1000


def test_what_is_saved_is_counted_once():
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    assert timing.saved_for_backward(lambda: x * weight) == x.nbytes + weight.nbytes
    assert timing.saved_for_backward(lambda: (x * weight) * weight) == 2 * x.nbytes + weight.nbytes  # one product
    assert timing.saved_for_backward(lambda: lk.rms_norm(x, weight)) == x.nbytes + weight.nbytes + 8 * 4  # rstd


# --- torch.cuda, imitated --------------------------------------------------------------------------------------------


class _Generator:
    """A generator, or a state of one: `state.capturing` is what torch 2.11 leaves set after a failed capture."""

    def __init__(self, state=None):
        self.state = state or types.SimpleNamespace(capturing=False)

    def clone_state(self):
        return _Generator()

    def graphsafe_get_state(self):
        return _Generator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state


class FakeCuda:
    """torch.cuda as far as the clock uses it. Each call takes a millisecond of a device whose time this is.

    As in torch 2.11: `graph.__exit__` restores the current stream, the generator and the allocator only if the capture
    is valid, a call that waits makes it invalid, and `empty_cache` fails while the allocator has a capture under way.
    """

    def __init__(self, monkeypatch) -> None:
        fake = self
        fake.now, fake.busy, fake.mode = 0.0, False, 0
        fake.graphs, fake.underway, fake.released = [], [], []
        fake.capturing, fake.valid, fake.empty = None, True, False
        fake.generator = _Generator()
        fake.default = fake.current = object()

        class Event:
            def __init__(self, enable_timing=False):
                pass

            def record(self):
                self.at = fake.now

            def query(self):
                return not fake.busy

            def synchronize(self):
                fake.busy = False

            def elapsed_time(self, end):
                return end.at - self.at

        class CUDAGraph:
            def __init__(self):
                self.calls = []
                fake.graphs.append(self)

            def replay(self):
                for call in self.calls:
                    call()

        class Stream:
            def wait_stream(self, other):
                pass

        class Graph:
            def __init__(self, graph, pool, stream):
                self.graph, self.pool, self.stream = graph, pool, stream

            def __enter__(self):
                fake.empty_cache()
                self.before, fake.current = fake.current, self.stream
                if fake.generator.state.capturing:
                    raise RuntimeError("the generator is in capture mode")
                fake.generator.state.capturing, fake.capturing, fake.valid = True, self.graph, True
                fake.underway.append(self.pool)

            def __exit__(self, *_):
                fake.capturing = None
                if not fake.valid:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                if fake.empty:
                    warnings.warn("The CUDA Graph is empty.", stacklevel=2)
                fake.generator.state.capturing, fake.current = False, self.before
                fake.underway.remove(self.pool)

        @contextlib.contextmanager
        def on(stream):
            before, fake.current = fake.current, stream
            yield
            fake.current = before

        def randn(*shape, device):
            if fake.generator.state.capturing:
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            return torch.ones(*shape)

        def end_allocation(device, pool):
            if pool not in fake.underway:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            fake.underway.remove(pool)

        pools = iter(range(1000))
        names = {
            "Event": Event, "CUDAGraph": CUDAGraph, "Stream": Stream, "graph": Graph, "stream": on,
            "set_stream": lambda stream: setattr(fake, "current", stream), "current_stream": lambda: fake.current,
            "default_stream": lambda: fake.default, "synchronize": lambda: setattr(fake, "busy", False),
            "current_device": lambda: 0, "_sleep": lambda cycles: fake.sleep(),
            "default_generators": (fake.generator,), "graph_pool_handle": lambda: (0, next(pools)),
            "empty_cache": fake.empty_cache, "get_sync_debug_mode": lambda: fake.mode,
            "set_sync_debug_mode": lambda mode: setattr(fake, "mode", {"default": 0, "error": 2}.get(mode, mode)),
            "get_device_properties": lambda _: types.SimpleNamespace(L2_cache_size=1000),
        }  # fmt: skip
        for name, x in names.items():
            monkeypatch.setattr(torch.cuda, name, x, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocation, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: fake.released.append(pool), raising=False)
        monkeypatch.setattr(capture.torch, "randn", randn)
        monkeypatch.setattr(capture.torch, "zeros", lambda n, device, new=torch.zeros: new(n))

    def sleep(self):
        self.now += 5
        self.busy = True

    def empty_cache(self):
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def work(self, ms: float, waits: str | None = None, fails_in_capture: bool = False):
        """A call of `ms` that waits for the device: "torch" in a way that PyTorch knows, "extension" in another."""

        def call():
            if waits == "torch" and self.mode == 2:
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.capturing is None:
                self.now += ms
                self.busy = self.busy and not waits
            elif waits or fails_in_capture:
                self.valid = False
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.capturing.calls.append(lambda: setattr(self, "now", self.now + ms))

        return call


@pytest.fixture
def fake(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("the real one is tested below")
    return FakeCuda(monkeypatch)


def test_the_clock_divides_by_the_calls_it_made(fake):
    sample, how, reason = timing.Gpu().sampler([fake.work(0.1), fake.work(0.3)])
    assert (how, reason) == ("graph", None) and sample() == pytest.approx(0.2)
    assert len(fake.graphs[0].calls) == 2 * 3  # so often that it takes a millisecond
    sample, *_ = timing.Gpu().sampler([fake.work(1e-4)])
    assert len(fake.graphs[-1].calls) == timing.MOST_CALLS and sample() == pytest.approx(1e-4)

    sample, how, reason = timing.Gpu().sampler([fake.work(0.1), fake.work(0.3)], "so asked")
    assert how == "events" and sample() == pytest.approx(0.2)  # and not the time that lets the host get ahead
    assert reason == "timed by events: so asked" and len(fake.graphs) == 2
    sample, how, _ = timing.Gpu().eager_sampler(fake.work(7.0))
    assert how == "events" and sample() == pytest.approx(7.0)


@pytest.mark.parametrize("waits", ["torch", "extension"])
def test_what_waits_is_timed_by_events_and_never_captured(fake, waits):
    sample, how, reason = timing.Gpu().sampler([fake.work(0.1, waits)])
    assert how == "events" and sample() == pytest.approx(0.1)
    assert reason.startswith("timed by events: the host waits for the GPU")
    assert fake.graphs == [] and fake.mode == 0


def test_another_error_of_a_warm_up_is_the_providers(fake):
    def fails():
        if fake.mode == 2:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        timing.Gpu().sampler([fails])
    assert fake.mode == 0 and fake.graphs == []


def test_a_failed_capture_leaves_stream_generator_and_allocator_as_before(fake):
    state, clock = fake.generator.state, timing.Gpu()
    sample, how, reason = clock.sampler([fake.work(0.1, fails_in_capture=True)])
    assert how == "events" and sample() == pytest.approx(0.1)
    assert reason.startswith("timed by events: its capture failed: RuntimeError: CUDA error: operation failed due to")
    assert fake.current is fake.default and fake.generator.state is state and not state.capturing
    assert fake.underway == [] and len(fake.released) == 1
    assert clock.sampler([fake.work(0.1)]).method == "graph"
    assert fake.generator.state is state  # the capture had a copy


def test_a_capture_that_ended_in_order_releases_its_pool_by_itself(fake):
    """Python raised inside, CUDA did not: the graph owns its pool, and a second release would end the process."""

    def fails():
        if fake.capturing:
            raise ValueError("not while capturing")

    assert (
        timing.Gpu().sampler([fails]).reason == "timed by events: its capture failed: ValueError: not while capturing"
    )
    assert fake.released == [] and fake.underway == [] and fake.current is fake.default


def test_a_process_that_cannot_be_restored_is_lost(fake, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    with pytest.raises(capture.Lost, match=r"its capture failed: .*; then RuntimeError: captures_underway.empty\(\)"):
        timing.Gpu().sampler([fake.work(0.1, fails_in_capture=True)])


def test_a_graph_without_work_is_no_measurement(fake):
    fake.empty = True
    with pytest.raises(capture.EmptyCapture, match="work on another stream"):
        timing.Gpu().sampler([fake.work(0.1)])


def test_what_keeps_a_process_from_measuring_is_found(fake, monkeypatch):
    assert capture.gpu_fault("cuda") is None and capture.gpu_fault("cpu") is None
    fake.current = object()
    assert "stayed the current stream" in capture.gpu_fault("cuda")
    fake.current, fake.generator.state.capturing = fake.default, True
    assert "Offset increment" in capture.gpu_fault("cuda")
    fake.generator.state.capturing = False
    fake.underway.append((0, 0))
    assert "INTERNAL ASSERT" in capture.gpu_fault("cuda")
    fake.underway.clear()

    def sticky():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", sticky)
    assert "illegal memory access" in capture.gpu_fault("cuda")
