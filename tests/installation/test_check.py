"""`python -m llama_kernels --check`: the parity check passes for every op, and finds each kind of error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_kernels as lk
from llama_kernels.__main__ import main
from llama_kernels.core.language import INTERPRETED
from llama_kernels.diagnose import cases, check
from llama_kernels.diagnose.rule import compare
from tests.support.environment import DEVICE
from tests.support.judge import UNIT
from tests.support.processes import output_of


def checked_calls(capsys: Any, status: int, *ops: str) -> list[dict[str, Any]]:
    """The rows of the check of `ops`, which must have this exit status."""
    capsys.readouterr()
    assert main(["--check", *ops, "--device", DEVICE, "--json"]) == status
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["check"]  # no NaN, which is not JSON
    assert found["passed"] == (status == 0) == all(call["passed"] for call in found["calls"])
    return found["calls"]


def test_the_check_has_a_call_for_every_op_with_its_gradients():
    ops = {case.op: case for case in cases.CASES}
    assert ops.keys() == set(lk.reference.__all__)
    assert all(case.differentiable for case in ops.values() if case.op != "rope_into_cache")


@pytest.mark.parametrize("op", ["rope", "rope_qkv", "rope_into_cache", "rms_norm", "add_rms_norm", "qk_norm_rope"])
def test_the_check_passes(op, capsys):
    calls = checked_calls(capsys, 0, op)
    assert [call["dtype"] for call in calls] == ["bfloat16", "float16", "float32"]
    for call in calls:
        dtype = getattr(torch, call["dtype"])
        assert 0 < call["error"] < 4 * UNIT[dtype] and call["eager"] > 0 and call["first_call"] > 0


@pytest.mark.parametrize("op", ["attention", "attention_varlen", "rope_attention"])
def test_the_check_of_attention_passes(op, capsys, monkeypatch):
    if INTERPRETED:  # each call takes seconds
        monkeypatch.setattr(check, "DTYPES", (torch.bfloat16,))
        monkeypatch.setattr(cases, "IN_INTERPRETER", cases.IN_INTERPRETER._replace(q_heads=2, kv_heads=1))
    calls = checked_calls(capsys, 0, op)
    assert {call["call"].partition(",")[0] for call in calls} == {op}


def test_the_check_prints_a_line_for_each_call(capsys):
    assert main(["--check", "rms_norm", "--device", DEVICE]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("rms_norm ")]
    assert len(lines) == 3 and all("passed" in line for line in lines) and "all 3 calls passed." in out
    assert ("plain PyTorch code that CPU tensors run" in out) == (DEVICE == "cpu" and not INTERPRETED)


def _mutants() -> dict[str, tuple[Any, str]]:
    """By name, a wrong rms_norm, and the beginning of the fault that the check reports."""
    right, calls = lk.rms_norm, []

    class ZeroedGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad.index_fill(0, torch.tensor([3], device=grad.device), 0)

    def unwritten(x, weight):
        y = right(x, weight)
        if not torch.utils.deterministic.fill_uninitialized_memory:
            return y  # as if the memory held the right values by chance
        return torch.where(torch.arange(y.shape[-1], device=y.device) == 5, torch.empty_like(y), y)

    def one_row(x, weight):
        return right(x, weight) * (1 + 0.05 * (torch.arange(x.shape[0], device=x.device) == 7)[:, None])

    def unrepeatable(x, weight):
        calls.append(1)
        return right(x, weight) + 1e-9 * len(calls) * (x.dtype == torch.float32)

    def raises(x, weight):
        raise ValueError("no such kernel\nand more")

    return {
        "scaled": (lambda x, weight: right(x, weight) * 1.01, "y: error"),
        "one row": (one_row, "y: "),
        "no weight": (lambda x, weight: right(x) + 0 * weight, "y: error"),
        "a gradient with a row of zeros": (lambda x, weight: right(ZeroedGradient.apply(x), weight), "gradient of x: "),
        "unwritten": (unwritten, "y: 8 elements are not written"),
        "unrepeatable": (unrepeatable, "y: two runs differ"),
        "raises": (raises, "ValueError: no such kernel"),
        "another shape": (lambda x, weight: right(x, weight)[:, :-1], ""),
    }


@pytest.mark.parametrize("name", _mutants())
def test_the_check_finds_a_wrong_op(name, capsys, monkeypatch):
    wrong, fault_starts = _mutants()[name]
    monkeypatch.setattr(lk, "rms_norm", wrong)
    monkeypatch.setattr(check, "DTYPES", (torch.bfloat16, torch.float32))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    small = cases.Sizes(batch=1, q_heads=2, kv_heads=1, tokens=4, width=16, rows=8, columns=512)
    for sizes in ("IN_INTERPRETER", "ON_CPU", "ON_GPU"):
        monkeypatch.setattr(cases, sizes, small)
    failed = [call for call in checked_calls(capsys, 1, "rms_norm") if not call["passed"]]
    assert [call["dtype"] for call in failed] == (["float32"] if name == "unrepeatable" else ["bfloat16", "float32"])
    for call in failed:
        assert any(fault.startswith(fault_starts) for fault in call["faults"]), call["faults"]


def test_the_check_prints_each_failed_call(capsys, monkeypatch):
    right = lk.rms_norm
    monkeypatch.setattr(lk, "rms_norm", lambda x, weight: right(x, weight) * 1.01)
    assert main(["--check", "rms_norm", "--device", DEVICE]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: y: error") == 3 and "3 of 3 calls FAILED." in out


def test_the_check_compares_arguments_that_are_written_in_place(capsys, monkeypatch):
    right = lk.rope_into_cache

    def elsewhere(q, k, v, k_cache, v_cache, cache_position, cos, sin):
        return right(q, k, v, k_cache, v_cache, cache_position - 1, cos, sin, cache_position)

    monkeypatch.setattr(lk, "rope_into_cache", elsewhere)
    faults = [fault for call in checked_calls(capsys, 1, "rope_into_cache") for fault in call["faults"]]
    assert {fault.split(":")[0] for fault in faults} == {"k_cache", "v_cache"}


def test_the_check_leaves_settings_as_they_were():
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.is_grad_enabled(),
        )

    torch.set_float32_matmul_precision("high")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with torch.no_grad():
            before = settings()
            assert all(row.passed for row in check.run(torch.device(DEVICE), ["rms_norm"]))
            assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--check", "softmax"], "unknown op softmax; the ops are add_rms_norm"),
        (["--check", "--device", "mps"], "wanted cuda (a CUDA or HIP GPU) or cpu"),
        (["--check", "--device", "nonsense"], "--device nonsense: "),
        (["--device", "cpu"], "--device needs --check"),
        (["--check", "--arch", "sm_90"], "--arch shows tiles; it has no effect with --check"),
        (["--check", "--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_bad_arguments_of_the_command_are_errors(arguments, error, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and error in capsys.readouterr().err


def test_the_check_needs_only_the_package(tmp_path):
    """An installed package has no tests, bench or repository around it."""
    shutil.copytree(Path(lk.__file__).parent, tmp_path / "llama_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    env = {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = ("-m", "llama_kernels", "--check", "rms_norm", "--device", "cpu")
    out = output_of(*command, cwd=tmp_path, **env)
    assert str(tmp_path) in out and "all 3 calls passed." in out


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", UNIT)
def test_the_rule_accepts_a_rounding_and_finds_larger_errors(dtype):
    truth = torch.randn(256, 128, dtype=torch.float64)
    rounded = truth.to(dtype)
    assert compare(rounded, truth, rounded).fault is None
    noise = torch.randn_like(truth) * UNIT[dtype] * (4 if dtype == torch.float32 else 1)
    assert "error" in compare((truth + noise).to(dtype), truth, rounded).fault
    row = truth.clone()
    row[5] *= 1 + 10 * UNIT[dtype]
    assert "worst row" in compare(row.to(dtype), truth, rounded).fault
    assert "shape (256, 127), not (256, 128)" in compare(rounded[:, :-1], truth, rounded).fault
    broken = rounded.clone()
    broken[3, 4] = torch.nan
    assert "1 of 32768 elements are NaN" in compare(broken, truth, rounded).fault
    truth[3, 4] = torch.nan
    assert compare(broken, truth, broken).fault is None
    assert "NaN" in compare(rounded, truth, broken).fault, "finite where the truth is not"
