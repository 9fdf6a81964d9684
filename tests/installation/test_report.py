"""`python -m llama_kernels`: the environment report, which never fails, and --check, which finds what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llama_kernels as lk
from llama_kernels.__main__ import main
from llama_kernels.core import device as core_device
from llama_kernels.core.language import INTERPRETED
from llama_kernels.diagnose import cases, check, environment, kernels
from llama_kernels.diagnose.rule import compare
from llama_kernels.ops.attention.tables import WIDTHS, tile
from tests.support.environment import DEVICE
from tests.support.judge import UNIT

ROOT = Path(lk.__file__).parents[1]
CPU_PATH = "interpreted" if INTERPRETED else "reference"


@pytest.fixture
def report(capsys):
    """The output of the command with these arguments, which succeeds."""

    def report(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    return report


@pytest.fixture
def pretend_gpus(monkeypatch):
    """Make torch see GPUs with these properties, in a process that compiles kernels."""

    def pretend(*gpus: dict[str, Any]) -> None:
        shared = {"total_memory": 80 * 2**30, "multi_processor_count": 132, "warp_size": 32}
        described = [SimpleNamespace(**shared, **gpu) for gpu in gpus]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described[torch.device(device).index])
        for module in (core_device, kernels):
            monkeypatch.setattr(module, "INTERPRETED", False)
            monkeypatch.setattr(module, "HAS_TRITON", True)

    caches = (core_device.arch_of, core_device.gpu_of)
    for cache in caches:
        cache.cache_clear()
    yield pretend
    for cache in caches:
        cache.cache_clear()


H100 = {"name": "NVIDIA H100", "major": 9, "minor": 0, "shared_memory_per_block_optin": 232448}
T4 = {"name": "Tesla T4", "major": 7, "minor": 5, "shared_memory_per_block_optin": 65536}


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_has_what_a_bug_report_needs(report):
    lines = report().splitlines()
    for start in (
        "llama_kernels:", f"  version: {lk.__version__}", "  commit: ", "python: ", "system: ", "packages:",
        f"  torch: {torch.__version__}", "  triton: ", "  numpy: ", "  transformers: ", "torch build:", "driver",
        "GPUs", "triton tools:", "variables:", "torch settings:", "  float32 matmul precision: ",
        "  deterministic algorithms: ",
    ):  # fmt: skip
        assert any(line.startswith(start) for line in lines), start
    assert any(line.startswith(f"CPU tensors run: {CPU_PATH} (") for line in lines)
    for op in lk.reference.__all__:
        assert any(line.split()[:1] == [op] for line in lines), op


def test_the_report_as_json(report):
    found = json.loads(report("--json"))
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert found["kernels"]["CPU tensors"]["runs"] == CPU_PATH
    assert found["kernels"]["ops"].keys() == set(lk.reference.__all__)


def test_the_report_shows_tiles(report):
    lines = report("--arch", "sm_90").splitlines()
    forward = next(line for line in lines if line.split()[:1] == ["forward"])
    assert all(str(tile("sm_90", "forward", width, torch.bfloat16)) in forward for width in WIDTHS)
    assert any("backward, D <= 256: portable" in line for line in lines)


def test_the_report_of_gpus_says_which_kernels_each_takes(report, pretend_gpus):
    pretend_gpus(H100, T4)
    out = report()
    gpus = [line for line in out.splitlines() if line.startswith("  device cuda:")]
    assert len(gpus) == 2
    for part in ("cuda:0", "NVIDIA H100", "compute capability 9.0", "80 GiB", "SMs 132", "227 KiB", "tiles sm_90"):
        assert part in gpus[0]
    assert "tiles none: Tesla T4 has compute capability 7.5" in gpus[1]
    assert "attention on sm_90" in out and "attention on sm_86" not in out
    assert "forward, D <= 128: portable: " in out


def test_the_switched_on_hopper_kernels_are_reported(report, pretend_gpus, monkeypatch):
    pretend_gpus(H100)
    monkeypatch.setattr("llama_kernels.ops.attention.dispatch.HAS_GLUON", True)
    assert "with llama_kernels.hopper_attention(): Hopper kernel, 128 x 128, 2 stages" in report()
    assert not lk.hopper_attention.enabled
    with lk.hopper_attention():
        assert "forward, D <= 128: Hopper kernel, 128 x 128, 2 stages" in report()


def _broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the driver is broken\nand a second line")


@pytest.mark.parametrize(
    "name",
    ["package", "system", "packages", "torch_build", "driver", "gpus", "triton_tools", "variables", "torch_settings"],
)
def test_a_section_that_raises_is_a_line(name, report, monkeypatch):
    monkeypatch.setattr(environment, name, _broken)
    out = report()
    assert out.count("could not be read: RuntimeError: the driver is broken\n") == 1 and "second line" not in out
    assert "CPU tensors run" in out


@pytest.mark.parametrize("name", ["is_available", "get_device_properties", "device_count"])
def test_a_broken_driver_is_a_line(name, report, monkeypatch, pretend_gpus):
    pretend_gpus(H100)
    monkeypatch.setattr(torch.cuda, name, _broken)
    if name == "device_count":  # torch's own is_available asks for it
        monkeypatch.setattr(torch.cuda, "is_available", _broken)
    out = report()
    assert "RuntimeError: the driver is broken" in out and "GPU tensors run" in out
    json.loads(report("--json"))


def test_a_tile_table_that_raises_is_a_line(report, monkeypatch):
    monkeypatch.setattr(kernels, "tile", _broken)
    assert "attention on sm_80: could not be read: RuntimeError" in report("--arch", "sm_80")


def test_a_tool_that_fails_says_so(report, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch" in report()


def test_what_torch_warns_of_is_shown(report, monkeypatch):
    def warns() -> bool:
        import warnings

        warnings.warn("CUDA initialization: the NVIDIA driver on your system is too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warns)
    assert "too old" in report()


def test_without_triton_and_numpy_the_report_works():
    code = """
import runpy, sys
sys.modules["triton"] = sys.modules["numpy"] = None
sys.argv = ["llama_kernels"]
runpy.run_module("llama_kernels", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "triton: cannot be imported: " in done.stdout and "triton tools: Triton is not installed" in done.stdout
    assert "GPU tensors run: nothing (Triton is not installed" in done.stdout


def test_secrets_and_home_folders_are_not_printed(report, monkeypatch, tmp_path):
    home = tmp_path / "somebody"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{home}/cache")
    monkeypatch.setenv("TORCH_HOME", "/home/other/torch")
    monkeypatch.setenv("TORCH_HUB_TOKEN", "abc123")
    monkeypatch.setenv("TRITON_MIRROR", "https://user:pass@host/index")
    monkeypatch.setenv("LLAMA_CLOUD_API_KEY", "abc123")
    monkeypatch.setenv("OPENAI_API_KEY", "abc123")
    for out in (report(), report("--json")):
        for secret in ("somebody", "/home/other", "abc123", "user:pass", "LLAMA_CLOUD", "OPENAI"):
            assert secret not in out, secret
        assert "~/cache" in out and "~/torch" in out and "TORCH_HUB_TOKEN" in out and "(hidden)@host" in out


@pytest.mark.parametrize(
    "name", ["CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF",
             "TRITON_PTXAS_PATH", "TORCHINDUCTOR_CACHE_DIR"],
)  # fmt: skip
def test_variables_that_matter_are_shown(name, report, monkeypatch):
    monkeypatch.setenv(name, "seen-7")
    assert f"  {name}: seen-7" in report()
    monkeypatch.delenv(name)
    assert f"  {name}: " not in report()


# --- the check -------------------------------------------------------------------------------------------------------


def rows(capsys: Any, status: int, *ops: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["--check", *ops, "--device", DEVICE, "--json"]) == status
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["check"]  # no NaN, which is not JSON
    assert found["passed"] == (status == 0) == all(call["passed"] for call in found["calls"])
    return found["calls"]


def test_the_check_has_every_op_with_its_gradients():
    ops = {case.op: case for case in cases.CASES}
    assert ops.keys() == set(lk.reference.__all__)
    assert all(case.differentiable for case in ops.values() if case.op != "rope_into_cache")


@pytest.mark.parametrize("op", ["rope", "rope_qkv", "rope_into_cache", "rms_norm", "add_rms_norm", "qk_norm_rope"])
def test_the_check_passes(op, capsys):
    calls = rows(capsys, 0, op)
    assert [call["dtype"] for call in calls] == ["bfloat16", "float16", "float32"]
    for call in calls:
        dtype = getattr(torch, call["dtype"])
        assert 0 < call["error"] < 4 * UNIT[dtype] and call["eager"] > 0 and call["first_call"] > 0


@pytest.mark.parametrize("op", ["attention", "attention_varlen", "rope_attention"])
def test_the_check_of_attention_passes(op, capsys, monkeypatch):
    if INTERPRETED:  # which takes seconds for each
        monkeypatch.setattr(check, "DTYPES", (torch.bfloat16,))
        monkeypatch.setattr(cases, "INTERPRETED", cases.INTERPRETED._replace(q_heads=2, kv_heads=1))
    calls = rows(capsys, 0, op)
    assert {call["call"].partition(",")[0] for call in calls} == {op}


def test_the_check_prints_a_line_for_each_call(capsys):
    assert main(["--check", "rms_norm", "--device", DEVICE]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("rms_norm ")]
    assert len(lines) == 3 and all("passed" in line for line in lines) and "all 3 calls passed." in out
    assert ("against itself in float64" in out) == (DEVICE == "cpu" and not INTERPRETED)


def _mutants() -> dict[str, tuple[Any, str]]:
    """What is wrong with an rms_norm, and what the check says of it."""
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
            return y  # what was in memory before is right by chance
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
    wrong, said = _mutants()[name]
    monkeypatch.setattr(lk, "rms_norm", wrong)
    monkeypatch.setattr(check, "DTYPES", (torch.bfloat16, torch.float32))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    small = cases.Sizes(batch=1, q_heads=2, kv_heads=1, tokens=4, width=16, rows=8, columns=512)
    for sizes in ("INTERPRETED", "ON_CPU", "ON_GPU"):
        monkeypatch.setattr(cases, sizes, small)
    failed = [call for call in rows(capsys, 1, "rms_norm") if not call["passed"]]
    assert [call["dtype"] for call in failed] == (["float32"] if name == "unrepeatable" else ["bfloat16", "float32"])
    for call in failed:
        assert any(fault.startswith(said) for fault in call["faults"]), call["faults"]


def test_a_failure_is_printed(capsys, monkeypatch):
    right = lk.rms_norm
    monkeypatch.setattr(lk, "rms_norm", lambda x, weight: right(x, weight) * 1.01)
    assert main(["--check", "rms_norm", "--device", DEVICE]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: y: error") == 3 and "3 of 3 calls FAILED." in out


def test_what_is_written_in_place_is_checked(capsys, monkeypatch):
    right = lk.rope_into_cache

    def elsewhere(q, k, v, k_cache, v_cache, cache_position, cos, sin):
        return right(q, k, v, k_cache, v_cache, cache_position - 1, cos, sin, cache_position)

    monkeypatch.setattr(lk, "rope_into_cache", elsewhere)
    faults = [fault for call in rows(capsys, 1, "rope_into_cache") for fault in call["faults"]]
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
    "arguments, said",
    [
        (["--check", "softmax"], "unknown op softmax; the ops are add_rms_norm"),
        (["--check", "--device", "mps"], "wanted cuda (a CUDA or HIP GPU) or cpu"),
        (["--check", "--device", "nonsense"], "--device nonsense: "),
        (["--device", "cpu"], "--device needs --check"),
        (["--check", "--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_check_needs_nothing_but_the_package(tmp_path):
    """As installed: no tests, no bench, no repository."""
    shutil.copytree(Path(lk.__file__).parent, tmp_path / "llama_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "llama_kernels", "--check", "rms_norm", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and "all 3 calls passed." in done.stdout


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", UNIT)
def test_the_rule_passes_a_rounding_and_fails_what_is_worse(dtype):
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
