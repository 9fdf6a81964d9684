"""The GPUs and devices on which the ops run, the tile family of each GPU, and the errors for all others."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llama_kernels as lk
from llama_kernels.core import device as core_device
from llama_kernels.core.device import GPU, SHARED_KIB, arch_of, family_of, lanes_of, shared_bytes_of, why_not_compiled
from llama_kernels.core.registry import KERNELS
from tests.support.devices import on
from tests.support.ops import OPS, REGISTERED, Make, Shape, registered_calls, sample
from tests.support.processes import python

pytestmark = pytest.mark.once

CUDA = torch.device("cuda", 0)


def nvidia(capability: tuple[int, int], kib: int | None) -> GPU:
    return GPU("a GPU", capability, None if kib is None else 1024 * kib, 32)


def properties(name: str, capability: tuple[int, int], shared_bytes: int, **others: Any) -> dict[str, Any]:
    """What torch says of a GPU."""
    major, minor = capability
    return {"name": name, "major": major, "minor": minor, "shared_memory_per_block_optin": shared_bytes, **others}


# --- GPUs ------------------------------------------------------------------------------------------------------------


# Compute capability, shared memory that a thread block may have (CUDA C++ Programming Guide, technical specifications
# per compute capability), and the family.
@pytest.mark.parametrize(
    "capability, kib, family",
    [
        ((8, 0), 163, "sm_80"),
        ((8, 6), 99, "sm_86"),
        ((8, 7), 163, "sm_86"),
        ((8, 9), 99, "sm_86"),
        ((9, 0), 227, "sm_90"),
        ((10, 0), 227, "sm_100"),
        ((10, 3), 227, "sm_100"),
        ((11, 0), 227, "sm_86"),
        ((12, 0), 99, "sm_86"),
        ((12, 1), 99, "sm_86"),
        ((13, 0), 99, "sm_86"),
    ],
)
def test_each_nvidia_gpu_takes_a_family_that_fits_its_shared_memory(capability, kib, family):
    gpu = nvidia(capability, kib)
    assert family_of(gpu) == family and SHARED_KIB[family] <= kib
    assert why_not_compiled(gpu) is None


@pytest.mark.parametrize("arch", ["gfx908", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_each_amd_gpu_takes_the_family_gfx942(arch):
    gpu = GPU("a GPU", arch, 65536, 64)
    assert family_of(gpu) == "gfx942" and why_not_compiled(gpu) is None


@pytest.mark.parametrize("arch", ["gfx803", "gfx900", "gfx906", "gfx90c", "gfx1030"])
def test_an_amd_gpu_without_matrix_instructions_is_refused(arch):
    reason = why_not_compiled(GPU("a GPU", arch, 65536, 64))
    assert reason.startswith(f"a GPU is a {arch}; wanted an AMD GPU with matrix instructions")


def test_the_width_of_a_warp_comes_from_the_driver(pretend_gpus, monkeypatch):
    """A warp has 32 lanes on RDNA and 64 on CDNA; both take the tiles of gfx942."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for arch, lanes in (("gfx90a:sramecc+:xnack-", 64), ("gfx1100", 32)):
        amd = {"gcnArchName": arch, "warp_size": lanes, "shared_memory_per_block": 65536}
        pretend_gpus(properties("a GPU", (9, 0), 0, **amd))
        assert arch_of(CUDA) == "gfx942" and lanes_of(CUDA) == lanes
        assert core_device.gpu_of(CUDA).arch == arch.split(":")[0]


def test_a_gpu_with_too_little_shared_memory_is_refused():
    reason = why_not_compiled(nvidia((9, 0), 99))
    assert reason == "a GPU has 99 KiB of shared memory a program; the kernels for such a GPU need 227 KiB"
    assert why_not_compiled(nvidia((9, 0), None)) is None, "torch does not say how much there is"


@pytest.mark.parametrize("name, capability", [("Tesla T4", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0))])
def test_a_gpu_without_triton_support_is_refused(pretend_gpus, name, capability):
    pretend_gpus(properties(name, capability, 65536))
    with pytest.raises(ValueError) as error:
        arch_of(CUDA)
    text = str(error.value)
    for part in ("cuda:0", name, "compute capability " + "{}.{}".format(*capability), "8.0", "llama_kernels.reference"):
        assert part in text
    for query in (lanes_of, shared_bytes_of):
        with pytest.raises(ValueError, match=name):
            query(CUDA)


def test_the_interpreter_runs_on_any_gpu(pretend_gpus, monkeypatch):
    pretend_gpus(properties("Tesla T4", (7, 5), 65536))
    monkeypatch.setattr(core_device, "INTERPRETED", True)
    assert arch_of(CUDA) in SHARED_KIB


def test_a_gpu_is_refused_if_triton_is_not_installed(pretend_gpus, monkeypatch):
    pretend_gpus(properties("NVIDIA H100", (9, 0), 232448))
    assert arch_of(CUDA) == "sm_90" and lanes_of(CUDA) == 32 and shared_bytes_of(CUDA) == 232448
    arch_of.cache_clear()
    monkeypatch.setattr(core_device, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="cuda:0: Triton is not installed"):
        arch_of(CUDA)


class Asked(Exception):
    """Raised by the `arch_of` of a test."""


# Not the backward of attention: its first kernel has no tiles, and its forward has asked before.
@pytest.mark.parametrize("name", [name for name in REGISTERED if "attention backward" not in name])
def test_a_launcher_asks_for_the_gpu_family_before_it_compiles(name, monkeypatch):
    def asked(_: torch.device) -> str:
        raise Asked

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            raise AssertionError("compiled first")

    for module in [module for path, module in sys.modules.items() if path.startswith("llama_kernels.")]:
        for attribute in [attribute for attribute in vars(module) if attribute.endswith("_kernel")]:
            monkeypatch.setattr(module, attribute, Kernel())
        if hasattr(module, "arch_of"):
            monkeypatch.setattr(module, "arch_of", asked)
    op, arguments = registered_calls(Shape(), Make())[name]
    with pytest.raises(Asked):
        KERNELS[op](*arguments)


# --- other devices ---------------------------------------------------------------------------------------------------


OTHERS = ["mps", "xpu", "vulkan"]  # for the last, torch has no autocast


@pytest.mark.parametrize("op", lk.reference.__all__)
@pytest.mark.parametrize("device", OTHERS)
def test_the_error_for_another_device_names_it(op, device):
    args = sample(op)
    with FakeTensorMode(), pytest.raises(ValueError) as error:
        getattr(lk, op)(**on(device, args))
    text = str(error.value)
    assert text.startswith(f"llama_kernels.{op}: {next(iter(args))} is on {device}")
    assert "wanted a CUDA, HIP or CPU tensor" in text and f"llama_kernels.reference.{op} is" in text


@pytest.mark.parametrize("op", lk.reference.__all__)
def test_meta_and_fake_tensors_have_the_shapes_of_real_results(op):
    def shapes(results: Any) -> list[torch.Size]:
        return [x.shape for x in (results if isinstance(results, tuple) else (results,))]

    expected, args = shapes(getattr(lk.reference, op)(**sample(op))), sample(op)
    assert shapes(getattr(lk, op)(**on("meta", args))) == expected
    for device in ("cpu", "cuda"):
        with FakeTensorMode():
            assert shapes(getattr(lk, op)(**on(device, args))) == expected


BACKEND = """
import logging, torch, llama_kernels as lk
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("npu")
"""


def with_backend(code: str) -> str:
    """What `code` prints in a process where torch has a backend "npu", with the dispatch key PrivateUse1."""
    done = python("-c", BACKEND + code)
    if "cannot import name" in done.stderr:
        pytest.skip(f"torch {torch.__version__} cannot define a backend in Python")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_backend_outside_torch_gets_errors_from_the_ops_and_results_from_the_reference():
    """Through torch's dispatcher, for public functions and registered ops."""
    out = with_backend("""
from tests.support.devices import on
from tests.support.ops import sample

there, here = torch._C._acc.create_empty_tensor((3, 8), torch.float32), torch.ones(3, 8)
op = torch.ops.llama_kernels.rms_norm_forward
for call in (lambda: lk.rms_norm(there), lambda: lk.rms_norm(here, there), lambda: op(there, None, None, 1e-6, 0.0),
             lambda: op(here, None, there, 1e-6, 0.0)):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
for name in set(lk.reference.__all__) - {"attention_varlen", "rope_into_cache"}:  # they read values
    with FakeTensorMode():
        results = getattr(lk.reference, name)(**on("npu", sample(name)))
    results = results if isinstance(results, tuple) else (results,)
    assert all(x.device.type == "npu" for x in results), name
""")
    taken = "wanted a CUDA, HIP or CPU tensor. llama_kernels.reference.rms_norm is the same in plain PyTorch"
    public, second, op, op_second = out.splitlines()
    assert public.startswith(f"ValueError llama_kernels.rms_norm: x is on npu:0; {taken}")
    assert second.endswith("weight is on npu:0; wanted the device of x, cpu. Pass weight.to(x.device).")
    assert op.startswith(f"ValueError llama_kernels.rms_norm_forward: x is on npu:0; {taken}")
    assert op_second.startswith(f"ValueError llama_kernels.rms_norm_forward: weight is on npu:0; {taken}")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_a_patched_model_on_such_a_backend_runs_stock_code_and_warns():
    out = with_backend("""
from transformers import LlamaConfig, LlamaForCausalLM
from llama_kernels.integrations.transformers import patch
from llama_kernels.integrations.transformers.attention import attention_forward

class Print(logging.Handler):
    def emit(self, record):
        print(record.getMessage())

logging.getLogger("llama_kernels").addHandler(Print())
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1)
layer = patch(LlamaForCausalLM(config)).model.layers[0]
norm, attention = layer.input_layernorm, layer.self_attn
with FakeTensorMode():
    norm.weight = torch.nn.Parameter(torch.empty(32, device="npu"))
    q, k = torch.empty(1, 2, 5, 16, device="npu"), torch.empty(1, 1, 5, 16, device="npu")
    for _ in range(2):
        assert norm(torch.empty(1, 5, 32, device="npu")).device.type == "npu"
        assert attention_forward(attention, q, k, k, None)[0].device.type == "npu"
""")
    rows, attention = out.splitlines()
    assert rows.startswith("llama_kernels: tensors on npu: stock code runs instead of the kernels")
    assert attention.endswith("on npu: stock attention (SDPA or eager) runs instead of the kernels")


def test_registered_ops_refuse_sparse_tensors():
    with pytest.raises(TypeError, match=r"rms_norm_forward: x is of layout torch.sparse_coo; wanted a dense tensor"):
        torch.ops.llama_kernels.rms_norm_forward(torch.ones(3, 8).to_sparse(), None, None, 1e-6, 0.0)


# --- two devices in one call -----------------------------------------------------------------------------------------

# tests/contracts/test_errors.py has the other tensors.
NAMES = ("position_ids", "cache_position", "sinks", "kv_start", "kv_end", "cu_seqlens_q", "cu_seqlens_k")
ARGUMENTS = [(op, name) for op in OPS for name in inspect.signature(getattr(lk, op)).parameters if name in NAMES]


@pytest.mark.parametrize("op, argument", ARGUMENTS)
def test_an_error_for_tensors_on_two_devices_names_both(op, argument):
    args = sample(op)
    tokens = args["q"].shape[:1] if op == "attention_varlen" else (2, 6)
    tensors = {
        "position_ids": torch.zeros(1 if op == "rope_into_cache" else 6, dtype=torch.int64),
        "sinks": torch.zeros(4),
        "kv_start": torch.zeros(tokens, dtype=torch.int32),
        "kv_end": torch.zeros(tokens, dtype=torch.int32),
        **args,
    }
    first = next(iter(args))
    with pytest.raises(ValueError, match=rf"{op}: {argument} is on meta; wanted the device of {first}, cpu"):
        getattr(lk, op)(**{**args, argument: tensors[argument].to("meta")})
