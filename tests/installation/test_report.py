"""`python -m llama_kernels`: the environment report has what a bug report needs, whatever is broken."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

import llama_kernels as lk
from llama_kernels.__main__ import main
from llama_kernels.core.language import INTERPRETED
from llama_kernels.diagnose import environment, kernels
from llama_kernels.ops.attention.hopper.tables import HopperTile, tile_for_width
from llama_kernels.ops.attention.tables import WIDTHS, tile
from tests.support.processes import output_of

CPU_PATH = "interpreted" if INTERPRETED else "reference"


@pytest.fixture
def report(capsys):
    """report(*arguments): what the command prints. It must succeed."""

    def report(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    return report


H100 = {"name": "NVIDIA H100", "major": 9, "minor": 0, "shared_memory_per_block_optin": 232448}
T4 = {"name": "Tesla T4", "major": 7, "minor": 5, "shared_memory_per_block_optin": 65536}


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


def test_the_report_can_be_json(report):
    found = json.loads(report("--json"))
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert found["kernels"]["CPU tensors"]["runs"] == CPU_PATH
    assert found["kernels"]["ops"].keys() == set(lk.reference.__all__)


def test_the_report_shows_the_tiles_of_a_family(report):
    lines = report("--arch", "sm_90").splitlines()
    forward = next(line for line in lines if line.split()[:1] == ["forward"])
    assert all(str(tile("sm_90", "forward", width, torch.bfloat16)) in forward for width in WIDTHS)
    assert any("backward, D <= 256: portable" in line for line in lines)


def test_the_report_shows_the_tile_family_of_each_gpu(report, pretend_gpus):
    pretend_gpus(H100, T4)
    out = report()
    gpus = [line for line in out.splitlines() if line.startswith("  device cuda:")]
    assert len(gpus) == 2
    for part in ("cuda:0", "NVIDIA H100", "compute capability 9.0", "80 GiB", "SMs 132", "227 KiB", "tiles sm_90"):
        assert part in gpus[0]
    assert "tiles none: Tesla T4 has compute capability 7.5" in gpus[1]
    assert "attention on sm_90" in out and "attention on sm_86" not in out
    assert "forward, D <= 128: portable: " in out or tile_for_width("forward", 128).measured


@pytest.mark.parametrize("measured", [False, True])
def test_the_report_shows_the_hopper_kernels_and_whether_they_are_on(measured, report, pretend_gpus, monkeypatch):
    """A kernel is on by default under the release of Triton that it was measured with."""
    pretend_gpus(H100)
    monkeypatch.setattr("llama_kernels.ops.attention.dispatch.HAS_GLUON", True)
    monkeypatch.setattr(HopperTile, "measured", measured)
    assert ("  forward, D <= 128: Hopper kernel, 128 x 128, 2 stages" in report()) == measured
    assert ("with llama_kernels.hopper_attention(): Hopper kernel, 128 x 128, 2 stages" in report()) != measured
    assert not lk.hopper_attention.enabled
    with lk.hopper_attention():
        assert "forward, D <= 128: Hopper kernel, 128 x 128, 2 stages" in report()


def _broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the driver is broken\nand a second line")


@pytest.mark.parametrize(
    "name",
    ["package", "system", "packages", "torch_build", "driver", "gpus", "triton_tools", "variables", "torch_settings"],
)
def test_a_section_that_raises_is_reported_on_one_line(name, report, monkeypatch):
    monkeypatch.setattr(environment, name, _broken)
    out = report()
    assert out.count("could not be read: RuntimeError: the driver is broken\n") == 1 and "second line" not in out
    assert "CPU tensors run" in out


@pytest.mark.parametrize("name", ["is_available", "get_device_properties", "device_count"])
def test_a_broken_driver_is_reported(name, report, monkeypatch, pretend_gpus):
    pretend_gpus(H100)
    monkeypatch.setattr(torch.cuda, name, _broken)
    if name == "device_count":  # torch's own is_available calls it
        monkeypatch.setattr(torch.cuda, "is_available", _broken)
    out = report()
    assert "RuntimeError: the driver is broken" in out and "GPU tensors run" in out
    json.loads(report("--json"))


def test_a_tile_table_that_raises_is_reported_on_one_line(report, monkeypatch):
    monkeypatch.setattr(kernels, "tile", _broken)
    assert "attention on sm_80: could not be read: RuntimeError" in report("--arch", "sm_80")


def test_the_error_of_nvidia_smi_is_reported(report, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch" in report()


def test_warnings_of_torch_are_reported(report, monkeypatch):
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
    out = output_of("-c", code)
    assert "triton: cannot be imported: " in out and "triton tools: Triton is not installed" in out
    assert "GPU tensors run: nothing (Triton is not installed" in out


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
def test_environment_variables_that_change_results_are_reported(name, report, monkeypatch):
    monkeypatch.setenv(name, "seen-7")
    assert f"  {name}: seen-7" in report()
    monkeypatch.delenv(name)
    assert f"  {name}: " not in report()
