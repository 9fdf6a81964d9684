"""A provider is timed only if its numbers are right. Every provider has rows; one without a time has a reason."""

from __future__ import annotations

import math

import pytest
import torch

import llama_kernels as lk
from bench.providers import provider as provider_module
from bench.providers.eager import Eager
from bench.providers.ours import Ours
from bench.providers.provider import OURS, Provider, Unsupported
from bench.providers.registry import PROVIDERS
from bench.works.norms import EPS
from tests.bench.fakes import DENSE, EVERY_OP, NORM, FakeClock, norm_provider, run

once = pytest.mark.once


@pytest.mark.parametrize("work", EVERY_OP, ids=lambda w: w.shape)
def test_our_ops_and_plain_pytorch_give_right_numbers(work):
    """Of PyTorch's kernels, only those that run at every shape and on every GPU."""
    made = run(work, *(p for p in PROVIDERS if p.module is None and p.cpu))
    assert {r.provider for r in made} >= {OURS, "eager"}
    for r in made:
        assert r.reason in (None, "has no window but a mask written out"), f"{r.provider}: {r.reason}"
        assert r.reason or r.error > 0


def wrong(change) -> Provider:
    """A provider of rms_norm whose result is our result after `change`."""
    return norm_provider(lambda work, device: lambda x, w: change(lk.rms_norm(x, w, EPS), x, w), "wrong")


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight):
        ctx.N = weight.shape[0]
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, dy.new_zeros(ctx.N)


WRONG = {
    "scaled": (lambda y, *_: y * 1.02, "wrong numbers: y is off by 2.0e-02"),
    "nan": (lambda y, *_: y.masked_fill(torch.arange(64, device=y.device) == 3, math.nan),
            "wrong numbers: y is off by nan"),
    "a row": (lambda y, *_: torch.cat((y[:-1], y[-1:] * 0)), "wrong numbers"),
    "a gradient": (lambda y, x, weight: y + x * 0.1 - (x * 0.1).detach(), "wrong numbers: dx"),
    "no gradient": (lambda y, x, weight: _NoGradient.apply(y.detach() + 0 * y, weight), "wrong numbers: dx"),
    "shape": (lambda y, *_: y[:, :-1], "RuntimeError: Mismatch in shape"),
    "raises": (lambda y, *_: 1 / 0, "ZeroDivisionError: division by zero"),
    "not differentiable": (lambda y, *_: y.detach(), "RuntimeError: "),
}  # fmt: skip


@once
@pytest.mark.parametrize("change, reason", WRONG.values(), ids=WRONG)
def test_a_provider_with_wrong_numbers_has_a_reason_and_is_not_timed(change, reason):
    clock = FakeClock()
    made = run(NORM, wrong(change), Ours(), clock=clock)
    rows = [r for r in made if r.provider == "wrong"]
    assert [r.direction for r in rows] == ["forward", "backward", "both"]
    for r in rows:
        assert r.reason.startswith(reason), r.reason
        assert r.ms is None and r.rate is None
    assert all(r.ms == 2.0 and r.reason is None for r in made if r.provider == OURS)
    assert len(clock.calls) == 3


@once
def test_attention_that_drops_its_last_key_head_is_found_wrong():
    class Dropping(Provider):
        name, cpu = "dropping", True

        def attention(self, work, device):
            def f(q, k, v):
                o = lk.attention(q, k, v)
                return torch.cat((o[:, :-1], o[:, :1]), 1)

            return f

    assert all(r.reason.startswith("wrong numbers") for r in run(DENSE, Dropping()))


@once
def test_a_provider_that_writes_over_its_arguments_changes_no_other_row():
    def writes(y, x, weight):
        with torch.no_grad():
            x.data.fill_(math.nan)
        return y + 0

    made = run(NORM, wrong(writes), Ours(), Eager(), clock=FakeClock())
    assert all(r.reason is None and r.ms for r in made if r.provider in (OURS, "eager"))
    assert all(r.reason for r in made if r.provider == "wrong")  # its own gradient is wrong, since x is gone


# --- rows ------------------------------------------------------------------------------------------------------------


@once
@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p.module], ids=lambda p: p.name)
def test_the_rows_of_a_peer_that_is_not_installed_say_so(provider, monkeypatch):
    """The test is independent of what is installed here."""
    monkeypatch.setattr(provider_module, "_importable", lambda module: False)
    work = next(w for w in EVERY_OP if provider.has(w.op))
    assert {r.reason for r in run(work, provider)} == {f"not installed (pip install {provider.package})"}


@once
def test_a_provider_that_cannot_do_the_work_says_why():
    class Missing(Ours):
        name, module, package = "missing", "no_such_module_anywhere", "no-such-package"

    class WithoutNorm(Provider):
        name = "without"

    def refuse(work, device):
        raise Unsupported("rows of at least 128")

    made = run(NORM, Missing(), norm_provider(refuse, "refusing"), WithoutNorm(), Ours())
    assert {r.provider: r.reason for r in made} == {
        "missing": "not installed (pip install no-such-package)", "refusing": "rows of at least 128", OURS: None,
    }  # fmt: skip
    assert WithoutNorm().why_not("rms_norm", "cpu") == "has no rms_norm"


@once
def test_work_after_the_time_limit_is_listed_as_not_run():
    made = run(NORM, Ours(), Eager(), clock=FakeClock(), out_of_time=lambda: True)
    assert [r.reason for r in made] == ["not run: out of time"] * 6


@once
def test_rate_percent_and_ratio_follow_from_the_time():
    for r in run(NORM, Ours(), Eager(), clock=FakeClock(0.001), directions=["forward"]):
        assert r.unit == "GB/s" and r.ceiling == 1000 and r.method == "graph" and r.ratio == 1
        assert r.rate == pytest.approx(NORM.bytes("forward") / 1e-6 / 1e9)
        assert r.percent == pytest.approx(r.rate / 10)
    slow = {"copy": 1000.0, "float16": 1.0}
    (r,) = run(DENSE, Ours(), clock=FakeClock(0.01), directions=["forward"], ceilings=slow)
    assert r.unit == "TFLOP/s" and r.rate == pytest.approx(DENSE.flops("forward") / 1e-5 / 1e12) and r.ratio is None


@once
def test_providers_have_distinct_names_and_at_least_one_op():
    names, ops = [p.name for p in PROVIDERS], {w.op for w in EVERY_OP}
    assert len(set(names)) == len(names) and names[0] == OURS
    assert all(any(p.has(op) for op in ops) for p in PROVIDERS)
    assert all(Ours().has(op) and Eager().has(op) for op in ops)
