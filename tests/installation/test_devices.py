"""Where each op runs and where it does not: which GPUs take which tiles, what is refused, and in which words."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llama_kernels as lk
from llama_kernels.core import device as core_device
from llama_kernels.core.device import GPU, SHARED_KIB, arch_of, family_of, lanes_of, shared_bytes_of, why_not_compiled
from llama_kernels.core.registry import KERNELS
from llama_kernels.ops import qk_norm_rope, rms_norm, rope
from llama_kernels.ops.attention import decode, forward, tables
from llama_kernels.ops.attention.call import AttentionCall
from tests.support.devices import on
from tests.support.ops import sample

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)


def nvidia(capability: tuple[int, int], kib: int | None) -> GPU:
    return GPU("a GPU", capability, None if kib is None else 1024 * kib, 32)


@pytest.fixture
def pretend(monkeypatch):
    """Make cuda:0 be this GPU, in a process that compiles kernels."""

    def pretend(name: str, capability: tuple[int, int], shared_bytes: int, **others: Any) -> None:
        properties = SimpleNamespace(
            name=name, major=capability[0], minor=capability[1], warp_size=32, shared_memory_per_block=49152,
            shared_memory_per_block_optin=shared_bytes, multi_processor_count=40, total_memory=2**34,
        )  # fmt: skip
        properties.__dict__.update(others)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(core_device, "INTERPRETED", False)
        monkeypatch.setattr(core_device, "HAS_TRITON", True)

    caches = (arch_of, core_device.gpu_of)
    for cache in caches:
        cache.cache_clear()
    yield pretend
    for cache in caches:
        cache.cache_clear()


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
def test_each_nvidia_gpu_takes_a_family_that_fits(capability, kib, family):
    gpu = nvidia(capability, kib)
    assert family_of(gpu) == family and SHARED_KIB[family] <= kib
    assert why_not_compiled(gpu) is None


@pytest.mark.parametrize("arch", ["gfx908", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_each_amd_gpu_takes_the_rows_of_gfx942(arch):
    gpu = GPU("a GPU", arch, 65536, 64)
    assert family_of(gpu) == "gfx942" and why_not_compiled(gpu) is None


@pytest.mark.parametrize("arch", ["gfx803", "gfx900", "gfx906", "gfx90c", "gfx1030"])
def test_an_amd_gpu_without_matrix_instructions_is_refused(arch):
    reason = why_not_compiled(GPU("a GPU", arch, 65536, 64))
    assert reason.startswith(f"a GPU is a {arch}; wanted an AMD GPU with matrix instructions")


def test_warps_are_as_wide_as_the_driver_says(pretend, monkeypatch):
    """RDNA has 32 lanes a warp where CDNA has 64; both take the tiles of gfx942."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for arch, lanes in (("gfx90a:sramecc+:xnack-", 64), ("gfx1100", 32)):
        arch_of.cache_clear(), core_device.gpu_of.cache_clear()
        pretend("a GPU", (9, 0), 0, gcnArchName=arch, warp_size=lanes, shared_memory_per_block=65536)
        assert arch_of(CUDA) == "gfx942" and lanes_of(CUDA) == lanes
        assert core_device.gpu_of(CUDA).arch == arch.split(":")[0]


def test_a_gpu_with_too_little_shared_memory_is_refused():
    reason = why_not_compiled(nvidia((9, 0), 99))
    assert reason == "a GPU has 99 KiB of shared memory a program; the kernels for such a GPU need 227 KiB"
    assert why_not_compiled(nvidia((9, 0), None)) is None, "a torch that does not say how much there is"


@pytest.mark.parametrize("name, capability", [("Tesla T4", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0))])
def test_a_gpu_that_triton_does_not_compile_for_is_refused(pretend, name, capability):
    pretend(name, capability, 65536)
    with pytest.raises(ValueError) as error:
        arch_of(CUDA)
    said = str(error.value)
    for part in ("cuda:0", name, "compute capability " + "{}.{}".format(*capability), "8.0", "llama_kernels.reference"):
        assert part in said
    for ask in (lanes_of, shared_bytes_of):
        with pytest.raises(ValueError, match=name):
            ask(CUDA)


def test_the_interpreter_runs_on_any_gpu(pretend, monkeypatch):
    pretend("Tesla T4", (7, 5), 65536)
    monkeypatch.setattr(core_device, "INTERPRETED", True)
    assert arch_of(CUDA) in SHARED_KIB


def test_a_gpu_without_triton_is_refused(pretend, monkeypatch):
    pretend("NVIDIA H100", (9, 0), 232448)
    assert arch_of(CUDA) == "sm_90" and lanes_of(CUDA) == 32 and shared_bytes_of(CUDA) == 232448
    arch_of.cache_clear()
    monkeypatch.setattr(core_device, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="cuda:0: Triton is not installed"):
        arch_of(CUDA)


class _Asked(Exception):
    pass


def _launches() -> dict[str, Any]:
    x, weight, rstd = torch.ones(4, 64), torch.ones(64), torch.ones(4, 1)
    q, k, angles = torch.ones(1, 2, 4, 64), torch.ones(1, 1, 4, 64), (torch.ones(4, 32), torch.ones(4, 32), None)
    scores = (0.1, None, None, 0)
    return {
        "rms_norm": lambda: KERNELS["rms_norm_forward"](x, None, weight, 1e-6, 0.0),
        "rms_norm, backward": lambda: KERNELS["rms_norm_backward"](
            x, None, x, weight, rstd, 1e-6, 0.0, x.dtype, True, True
        ),
        "rope": lambda: KERNELS["rope"](q, k, *angles, False, False),
        "qk_norm_rope": lambda: KERNELS["qk_norm_rope"](q, k, weight, weight, *angles, 1e-6, 0.0, False),
        "attention": lambda: KERNELS["attention_forward"](
            torch.ones(1, 2, 64, 64), torch.ones(1, 1, 64, 64), torch.ones(1, 1, 64, 64),
            None, None, None, None, None, 64, 64, *scores,
        ),
        "attention, decoding": lambda: decode.launch_decode(
            AttentionCall(q[:, :, :1], k, k, *[None] * 5, 1, 4, *scores)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _launches())
def test_no_launcher_compiles_before_it_asks_for_the_family(name, monkeypatch):
    def asked(_: torch.device) -> str:
        raise _Asked

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            raise AssertionError("compiled first")

    monkeypatch.setattr(core_device, "arch_of", asked)
    monkeypatch.setattr(tables, "arch_of", asked)
    for module in (rms_norm, rope, qk_norm_rope, forward, decode):
        for kernel in [key for key in vars(module) if key.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Kernel())
    with pytest.raises(_Asked):
        _launches()[name]()


# --- other devices ---------------------------------------------------------------------------------------------------


OTHERS = ["mps", "xpu", "vulkan"]  # for the last, torch has no autocast


@pytest.mark.parametrize("op", lk.reference.__all__)
@pytest.mark.parametrize("device", OTHERS)
def test_other_devices_are_refused_by_name(op, device):
    args = sample(op)
    with FakeTensorMode(), pytest.raises(ValueError) as error:
        getattr(lk, op)(**on(device, args))
    said = str(error.value)
    assert said.startswith(f"llama_kernels.{op}: {next(iter(args))} is on {device}")
    assert "wanted a CUDA, HIP or CPU tensor" in said and f"llama_kernels.reference.{op} is" in said


@pytest.mark.parametrize("op", lk.reference.__all__)
def test_meta_and_fake_tensors_give_shapes(op):
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


def in_a_backend(code: str) -> str:
    """What `code` prints where torch has a backend "npu", of the dispatch key PrivateUse1. A process of its own, since
    a backend cannot be taken back."""
    done = subprocess.run([sys.executable, "-c", BACKEND + code], capture_output=True, text=True, cwd=ROOT)
    if "cannot import name" in done.stderr:
        pytest.skip(f"torch {torch.__version__} cannot define a backend in Python")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_backend_of_its_own_is_refused_and_has_the_reference():
    """Real dispatch, of public functions and of registered ops."""
    out = in_a_backend("""
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
for name in set(lk.reference.__all__) - {"attention_varlen", "rope_into_cache"}:  # which read values: a fake has none
    with FakeTensorMode():
        results = getattr(lk.reference, name)(**on("npu", sample(name)))
    results = results if isinstance(results, tuple) else (results,)
    assert all(x.device.type == "npu" for x in results), name
""")
    taken = "wanted a CUDA, HIP or CPU tensor. llama_kernels.reference.rms_norm is the same in plain PyTorch"
    public, second, op, op_second = out.splitlines()
    assert public.startswith(f"ValueError llama_kernels.rms_norm: x is on npu:0; {taken}")
    assert second == "ValueError llama_kernels.rms_norm: weight is on npu:0; wanted the device of x, cpu."
    assert op.startswith(f"ValueError llama_kernels.rms_norm_forward: x is on npu:0; {taken}")
    assert op_second.startswith(f"ValueError llama_kernels.rms_norm_forward: weight is on npu:0; {taken}")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_a_patched_model_on_such_a_device_runs_stock_code_and_says_so():
    out = in_a_backend("""
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
    assert rows.startswith("llama_kernels: tensors on npu: stock code runs in place of the kernels")
    assert attention.endswith("on npu: stock attention (SDPA or eager) runs in place of the kernels")


def test_registered_ops_refuse_other_layouts():
    with pytest.raises(ValueError, match=r"rms_norm_forward: x is of layout torch.sparse_coo; wanted torch.strided"):
        torch.ops.llama_kernels.rms_norm_forward(torch.ones(3, 8).to_sparse(), None, None, 1e-6, 0.0)


# --- two devices in one call -----------------------------------------------------------------------------------------

BESIDE = {  # what tests/contracts/test_errors.py does not move away from the first tensor
    "rope": ["position_ids"],
    "qk_norm_rope": ["position_ids"],
    "rope_qkv": ["position_ids"],
    "rope_attention": ["position_ids", "sinks", "kv_start", "kv_end"],
    "rope_into_cache": ["cache_position", "position_ids"],
    "attention": ["sinks", "kv_start", "kv_end"],
    "attention_varlen": ["cu_seqlens_q", "cu_seqlens_k", "sinks", "kv_start", "kv_end"],
    "rms_norm": [],
    "add_rms_norm": [],
}


@pytest.mark.parametrize("op, argument", [(op, name) for op, names in BESIDE.items() for name in names])
def test_a_tensor_on_another_device_is_refused_by_both_names(op, argument):
    args = sample(op)
    rows = args["q"].shape[:1] if op == "attention_varlen" else (2, 6)
    tensors = {
        "position_ids": torch.zeros(1 if op == "rope_into_cache" else 6, dtype=torch.int64),
        "sinks": torch.zeros(4),
        "kv_start": torch.zeros(rows, dtype=torch.int32),
        "kv_end": torch.zeros(rows, dtype=torch.int32),
        **{name: x for name, x in args.items() if isinstance(x, torch.Tensor)},
    }
    first = next(iter(args))
    with pytest.raises(ValueError, match=rf"{op}: {argument} is on meta; wanted the device of {first}, cpu"):
        getattr(lk, op)(**{**args, argument: tensors[argument].to("meta")})
