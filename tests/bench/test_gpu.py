"""The bench on a GPU: what is timed by graphs, what by events, and the state after a failed capture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.measuring import records, timing
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from bench.providers.provider import OURS
from bench.providers.registry import PROVIDERS
from tests.bench.child import supervised
from tests.bench.fakes import EVERY_OP, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("work", EVERY_OP, ids=lambda w: w.shape)
def test_kernels_of_pytorch_give_right_numbers(work):
    """A kernel may refuse a shape or this GPU, but it may not give wrong numbers."""
    for r in run(work, *[p for p in PROVIDERS if p.module is None and not p.cpu]):
        assert not (r.reason or "").startswith("wrong"), f"{r.provider}: {r.reason}"


@pytest.mark.parametrize("work", EVERY_OP, ids=lambda w: w.shape)
def test_every_op_is_timed_on_a_gpu_and_ours_by_graphs(work):
    made = run(work, Ours(), Eager(), clock=timing.GpuClock(), seconds=0.05)
    assert all(r.ms > 0 and r.memory is not None and r.percent < 110 for r in made), made
    assert all(r.method == "graph" and r.kernels for r in made if r.provider == OURS), [r.reason for r in made]


def test_the_clock_measures_plausible_times_on_a_gpu():
    clock = timing.GpuClock()
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy, how, _ = clock.sampler([lambda: y.copy_(x)])
    product, *_ = clock.sampler([lambda: x @ x])
    timed = timing.in_turns({"copy": copy, "product": product}, 0.2)
    assert how == "graph" and 0.002 < timed["copy"].ms < timed["product"].ms < 50
    assert 100 < clock.ceilings()["copy"] < 20_000


def _waiting_calls(x: torch.Tensor) -> dict[str, object]:
    def by_event():
        event, y = torch.cuda.Event(), x + 1
        event.record()
        event.synchronize()
        return y

    return {
        "item": lambda: x.sum().item(),
        "cpu": lambda: x.cpu(),
        "nonzero": lambda: x.nonzero(),
        "device": lambda: (x + 1, torch.cuda.synchronize()),
        "event": by_event,
    }


@pytest.mark.parametrize("how", ["item", "cpu", "nonzero", "device", "event"])
def test_calls_that_wait_are_never_captured_on_a_gpu(how, monkeypatch):
    captured = []
    monkeypatch.setattr(timing, "capture", lambda *args: captured.append(args))
    sample, method, reason = timing.GpuClock().sampler([_waiting_calls(torch.randn(1000, device="cuda"))[how]])
    assert captured == [] and method == "events" and "the host waits for the GPU" in reason
    assert 0 < sample() < 1000
    assert torch.cuda.get_sync_debug_mode() == 0


# Waits only during a capture, so that no test before the capture finds it and the capture fails.
FAILING_CAPTURE = """
import torch
from bench.measuring import capture, timing

clock = timing.GpuClock()
x = torch.randn(1000, device="cuda")

def waits_when_captured():
    y = x + 1
    if torch.cuda.is_current_stream_capturing():
        y.sum().item()
    return y

torch.manual_seed(0)
expected = torch.randn(4, device="cuda")
try:
    sample, method, reason = clock.sampler([waits_when_captured])
except capture.Lost as e:  # this torch cannot be restored; the bench continues in a new process
    print("lost:", e)
    raise SystemExit(0)
assert method == "events" and "its capture failed" in reason, (method, reason)
assert sample() > 0
assert torch.cuda.current_stream() == torch.cuda.default_stream()
assert not torch.cuda.is_current_stream_capturing()
torch.cuda.empty_cache()
torch.manual_seed(0)
assert torch.equal(torch.randn(4, device="cuda"), expected)
sample, method, reason = clock.sampler([lambda: torch.add(x, x)])
assert method == "graph" and sample() > 0, (method, reason)
print("restored")
"""


def test_a_process_is_restored_or_known_as_lost_after_a_failed_capture_on_a_gpu():
    """Runs in a new process, which may be unable to use the GPU afterwards."""
    command, root = [sys.executable, "-c", FAILING_CAPTURE], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("restored", "lost:"))


def test_a_provider_whose_kernel_fails_on_a_gpu_is_left_out(tmp_path):
    """After a device-side assertion, no call on the GPU succeeds in the process."""
    status, said = supervised(tmp_path, "read outside")
    run = records.read(tmp_path / "records.json")
    assert status == 0 and len(said) == 1 and "of bad at rms_norm, norm" in said[0], said
    assert all(r.reason.startswith("left out: ") for r in run.records if r.provider == "bad")
    others = [r for r in run.records if r.provider != "bad"]
    assert len(others) == 18 and all(r.ms > 0 for r in others), others
