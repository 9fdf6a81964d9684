"""A fault of a provider affects only its own rows. The providers, clocks and GPU faults here are artificial."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from bench.measuring import contain, records, runner
from bench.measuring.capture import Lost
from bench.measuring.journal import CAPTURE, Journal
from bench.providers.eager import Eager
from bench.training import runner as training_runner
from bench.training.variations import Stock
from bench.works.norms import RMSNorm
from tests.bench.fakes import (
    ABOUT,
    ADD,
    NORM,
    ROPE,
    Bad,
    FailingClock,
    FakeClock,
    fail,
    norm_provider,
    options,
    reasons,
    tiny_model,
)

pytestmark = pytest.mark.once


def run(works, *providers, clock=None, **more):
    """All records, and the Lost exception that ended the run, or None."""
    made = []
    try:
        for rs in runner.run(works, providers, **options(clock, **more)):
            made += rs
    except Lost as e:
        return made, e
    return made, None


# --- containment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["build", "call"])
@pytest.mark.parametrize(
    "e, reason",
    [
        (ValueError("no"), "ValueError: no"),
        (SystemExit(3), "SystemExit: 3"),
        (torch.cuda.OutOfMemoryError("much"), "out of memory"),
        (torch._dynamo.exc.Unsupported("a graph break"), "Unsupported: a graph break"),
        (AssertionError(), "AssertionError"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_an_exception_of_a_provider_is_the_reason_in_its_rows(e, reason, when):
    made, lost = run([NORM, ADD], Bad(fail(e), when), Eager(), clock=FakeClock())
    assert lost is None and reasons(made) == {reason}
    others = [r for r in made if r.provider == "eager"]
    assert {r.op for r in others} == {"rms_norm", "add_rms_norm"} and all(r.ms == 2.0 for r in others)


def test_a_failure_during_the_samples_affects_one_direction():
    class Failing(FakeClock):
        def sampler(self, calls, by_events=None):
            sampling = super().sampler(calls, by_events)
            return sampling._replace(sampler=fail(RuntimeError("in a sample"))) if len(self.calls) == 3 else sampling

    made, _ = run([NORM], Bad(lambda: None), Eager(), clock=Failing())
    assert [r.reason for r in made if r.provider == "bad"] == [None, "RuntimeError: in a sample", None]
    assert [r.ms for r in made] == [2.0, None, 2.0, 2.0, 2.0, 2.0]
    assert all(r.method is None for r in made if r.ms is None)


def test_a_failure_before_the_samples_affects_one_direction():
    clock = FailingClock(2, RuntimeError("in the warm-up"))
    made, _ = run([NORM], Bad(lambda: None), Eager(), clock=clock)
    assert [r.reason for r in made if r.provider == "bad"] == [None, "RuntimeError: in the warm-up", None]
    assert all(r.ms == 2.0 for r in made if r.provider == "eager")


def test_a_time_of_zero_is_not_a_measurement():
    made, _ = run([NORM], Eager(), clock=FakeClock(0.0), directions=["forward"])
    assert reasons(made, "eager") == {"took no time: it does not work on the current stream"} and made[0].ms is None


def test_the_tensors_of_a_failed_provider_are_free_before_the_gpu_is_tested(monkeypatch):
    held, left = [], []

    def f(x, weight):
        large = torch.ones(1000)
        held.append(weakref.ref(large))
        try:
            raise KeyError(large.sum())
        except KeyError:
            raise torch.cuda.OutOfMemoryError("much") from None

    monkeypatch.setattr(contain, "gpu_fault", lambda device: left.append(held[0]()) or "out of memory")
    made, lost = run([NORM], norm_provider(lambda *_: f, "bad"))
    assert left == [None] and reasons(made) == {"out of memory"}
    assert lost is None  # other providers may hold the memory


def test_a_failure_to_make_inputs_is_the_reason_of_all_rows(monkeypatch):
    monkeypatch.setattr(RMSNorm, "draw", fail(torch.cuda.OutOfMemoryError("much")))
    made, _ = run([NORM, ROPE], Eager(), clock=FakeClock())
    assert {(r.op, r.reason) for r in made} == {
        ("rms_norm", "inputs or float64 results: out of memory"), ("rope", None)}  # fmt: skip


def test_an_infinite_error_does_not_end_a_run(tmp_path):
    infinite = norm_provider(lambda *args: lambda x, weight: Eager().any_op(*args)(x, weight) * math.inf)
    made, _ = run([NORM], infinite, clock=FakeClock())
    assert all(r.reason.startswith("wrong numbers") and r.error is None for r in made)
    made[0].error = math.nan  # in case an error that is not finite reaches the file
    records.write(records.Run({}, {}, made, {}), tmp_path / "x.json")
    assert records.read(tmp_path / "x.json").records[0].error is None


def test_a_training_variation_that_fails_affects_only_its_row():
    pytest.importorskip("transformers")

    class Broken(Stock):
        def change(self, model):
            raise SystemExit("not here")

    broken = Broken(False)
    broken.name = "broken"
    made = training_runner.run([tiny_model(False, 1)], [broken, Stock(False)], **options(FakeClock(4.0), device="cpu"))
    assert [(r.reason, r.ms) for r in next(made)] == [("SystemExit: not here", None), (None, 4.0)]


# --- a process that is lost ------------------------------------------------------------------------------------------


@pytest.fixture
def sticky(monkeypatch):
    """A function that fails like a kernel with an illegal access: from then on, gpu_fault finds a fault."""
    faults = []
    monkeypatch.setattr(contain, "gpu_fault", lambda device: faults[0] if faults else None)

    def does():
        faults.append("AcceleratorError: CUDA error: an illegal memory access was encountered")
        raise RuntimeError(faults[0])

    return does


def test_a_lost_process_ends_the_run_and_its_provider_is_left_out_afterwards(sticky):
    journal = Journal()
    made, lost = run([NORM, ADD], Eager(), Bad(sticky), clock=FakeClock(), journal=journal)
    assert "illegal memory access" in str(lost) and "'numbers and memory' of bad at rms_norm, norm" in str(lost)
    assert {r.op for r in made} == {"rms_norm"}  # the run ended before add_rms_norm
    assert reasons(made, "eager") == {"not run: the process was lost"} and not any(r.finished for r in made[:3])
    assert all("illegal memory access" in r.reason and r.finished for r in made if r.provider == "bad")
    assert [i.provider for i in journal.incidents] == ["bad"] and journal.step is None

    # In the next process, the provider is left out at this work only.
    made, lost = run([NORM, ADD], Eager(), Bad(lambda: None), clock=FakeClock(), journal=journal)
    assert lost is None and all(r.ms for r in made if r.provider == "eager")
    (reason,) = reasons(made)
    assert reason.startswith("left out: RuntimeError: AcceleratorError: CUDA error") and "numbers and memory" in reason


def test_a_provider_that_ended_two_processes_is_left_out_everywhere(sticky):
    journal = Journal()
    for work in (ADD, ROPE):
        journal.begin(runner.rows_of(work, [Eager()], ABOUT)["eager"][0].work, "bad", "numbers and memory")
        journal.blame("the process ended by SIGSEGV")
    made, _ = run([NORM], Bad(sticky), Eager(), clock=FakeClock(), journal=journal)
    (reason,) = reasons(made)
    assert reason.startswith("left out: it ended 2 processes, the last one at rope, rope (")


def test_a_provider_whose_capture_ended_a_process_is_timed_by_events():
    lost = Lost("its capture failed: RuntimeError: x; then the generator fails")
    journal = Journal()
    made, e = run([NORM], Eager(), Bad(lambda: None), clock=FailingClock(1, lost), journal=journal)
    assert "'capture' of bad" in str(e) and journal.incidents[0].doing == CAPTURE
    assert [r.ms for r in made] == [None] * 6
    made, e = run([NORM], Eager(), Bad(lambda: None), clock=FailingClock(1, lost), journal=journal)
    assert e is None and all(r.ms == 2.0 for r in made)
    assert {r.method for r in made if r.provider == "bad"} == {"events"}
    assert "its earlier capture ended a process" in reasons(made).pop()
    assert {r.method for r in made if r.provider == "eager"} == {"graph"}


def test_inputs_that_ended_a_process_are_not_made_again(monkeypatch):
    journal = Journal()
    journal.begin(runner.rows_of(NORM, [Eager()], ABOUT)["eager"][0].work, "", "inputs")
    journal.blame("the process ended by SIGKILL")
    made, _ = run([NORM, ADD], Eager(), clock=FakeClock(), journal=journal)
    assert {r.reason for r in made} == {
        "inputs or float64 results: left out: the process ended by SIGKILL, in the step 'inputs'", None}  # fmt: skip
