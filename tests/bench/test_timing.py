"""The clock of the bench: the arithmetic of samples, what is captured, and the state after a failed capture.

tests/bench/test_gpu.py has the tests that need a GPU.
"""

from __future__ import annotations

import pytest
import torch

import llama_kernels as lk
from bench.measuring import capture, timing
from tests.bench.fake_cuda import FakeCuda
from tests.support.environment import DEVICE

pytestmark = pytest.mark.once

# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_a_timing_is_the_median_and_the_spread_of_the_samples():
    timed = timing.summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timed.ms == 3.0 and timed.samples == 5
    assert timed.spread == pytest.approx((52 - 1.5) / 3)  # the quartiles of statistics.quantiles
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


def test_sampling_ends_at_its_time_limit_after_the_least_rounds():
    ticks = iter(range(10**6))
    timed = timing.in_turns({"a": lambda: 1.0}, 0, clock=lambda: float(next(ticks)))
    assert timed["a"].samples == timing.LEAST_ROUNDS


def test_a_sampler_that_fails_takes_no_further_samples():
    left, failures = iter([1.0] * 6), []

    def fails():
        return next(left)  # StopIteration at the seventh sample

    timed = timing.in_turns({"a": fails, "b": lambda: 2.0}, 10, clock=lambda: 0.0, failed=lambda *x: failures.append(x))
    assert timed.keys() == {"b"} and timed["b"].samples == timing.ROUNDS
    assert [(name, type(e)) for name, e in failures] == [("a", StopIteration)]
    with pytest.raises(ZeroDivisionError):
        timing.in_turns({"a": lambda: 1 / 0}, 10)


@pytest.mark.parametrize("touched, sets", [(10, 201), (1000, 3), (999, 4), (4000, 1), (3999, 2), (0, 512)])
def test_the_sets_of_tensors_exceed_the_cache(touched, sets):
    assert timing.sets_needed(touched, 1000) == sets
    assert sets in (1, timing.MOST_SETS) or (sets - 1) * touched >= 1000


def test_each_saved_storage_is_counted_once():
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    assert timing.saved_for_backward(lambda: x * weight) == x.nbytes + weight.nbytes
    assert timing.saved_for_backward(lambda: (x * weight) * weight) == 2 * x.nbytes + weight.nbytes
    assert timing.saved_for_backward(lambda: lk.rms_norm(x, weight)) == x.nbytes + weight.nbytes + 8 * 4  # rstd


# --- on an imitation of torch.cuda ------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("tests/bench/test_gpu.py tests the real one")
    return FakeCuda(monkeypatch)


def test_a_sample_is_the_time_of_one_call(fake):
    sample, how, reason = timing.GpuClock().sampler([fake.work(0.1), fake.work(0.3)])
    assert (how, reason) == ("graph", None) and sample() == pytest.approx(0.2)
    assert len(fake.graphs[0].calls) == 2 * 3  # as many as take a millisecond
    sample, *_ = timing.GpuClock().sampler([fake.work(1e-4)])
    assert len(fake.graphs[-1].calls) == timing.MOST_CALLS and sample() == pytest.approx(1e-4)

    sample, how, reason = timing.GpuClock().sampler([fake.work(0.1), fake.work(0.3)], "so asked")
    assert how == "events" and sample() == pytest.approx(0.2)  # without the time in which the GPU sleeps
    assert reason == "timed by events: so asked" and len(fake.graphs) == 2
    sample, how, _ = timing.GpuClock().eager_sampler(fake.work(7.0))
    assert how == "events" and sample() == pytest.approx(7.0)


@pytest.mark.parametrize("waits", ["torch", "extension"])
def test_calls_that_wait_are_timed_by_events_and_never_captured(fake, waits):
    sample, how, reason = timing.GpuClock().sampler([fake.work(0.1, waits)])
    assert how == "events" and sample() == pytest.approx(0.1)
    assert reason.startswith("timed by events: the host waits for the GPU")
    assert fake.graphs == [] and fake.mode == 0


def test_other_errors_of_a_warm_up_are_raised(fake):
    def fails():
        if fake.mode == 2:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        timing.GpuClock().sampler([fails])
    assert fake.mode == 0 and fake.graphs == []


def test_a_failed_capture_restores_stream_generator_and_allocator(fake):
    state, clock = fake.generator.state, timing.GpuClock()
    sample, how, reason = clock.sampler([fake.work(0.1, fails_in_capture=True)])
    assert how == "events" and sample() == pytest.approx(0.1)
    assert reason.startswith("timed by events: its capture failed: RuntimeError: CUDA error: operation failed due to")
    assert fake.current is fake.default and fake.generator.state is state and not state.capturing
    assert fake.underway == [] and len(fake.released) == 1
    assert clock.sampler([fake.work(0.1)]).method == "graph"
    assert fake.generator.state is state  # the capture had a copy


def test_the_pool_of_a_capture_that_ended_is_not_released_again(fake):
    """The exception is from Python and not from CUDA: the graph owns its pool, and a second release is an error."""

    def fails():
        if fake.capturing:
            raise ValueError("not while capturing")

    reason = timing.GpuClock().sampler([fails]).reason
    assert reason == "timed by events: its capture failed: ValueError: not while capturing"
    assert fake.released == [] and fake.underway == [] and fake.current is fake.default


def test_a_process_that_cannot_be_restored_raises_lost(fake, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    with pytest.raises(capture.Lost, match=r"its capture failed: .*; then RuntimeError: captures_underway.empty\(\)"):
        timing.GpuClock().sampler([fake.work(0.1, fails_in_capture=True)])


def test_an_empty_graph_is_an_error(fake):
    fake.empty = True
    with pytest.raises(capture.EmptyCapture, match="work on another stream"):
        timing.GpuClock().sampler([fake.work(0.1)])


def test_gpu_fault_finds_each_state_in_which_nothing_can_be_measured(fake, monkeypatch):
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
