"""Liger-Kernel's own tests of RMSNorm, residual add with RMSNorm, and RoPE, with our ops under them. None of their code
is here.

    git clone https://github.com/linkedin/Liger-Kernel
    TRITON_INTERPRET=0 SUITE=Liger-Kernel python -m pytest -o addopts= tests/regressions/witness/liger.py

SUITE is a checkout; needs transformers. test/transformers/{test_rms_norm,test_fused_add_rms_norm,test_rope}.py are
loaded from it, and the modules LigerRMSNorm and LigerFusedAddRMSNorm, which call what we put under them. How much runs
without a GPU, and what CASES is: tests/regressions/witness/shims.py.

Ours computes in float32 and rounds once, which is their casting mode "gemma". "llama" rounds before the weight as well
and "none" computes in the input's dtype: in float32 all are one, and without a weight the first two; the rest is
skipped. Their in_place (the backward may write into dy) is taken and does nothing.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig

import llama_kernels as lk
from llama_kernels.core.language import INTERPRETED
from tests.regressions.witness import shims
from tests.regressions.witness.shims import on_suite_device, pick  # noqa: F401  the fixture

_SUITE = shims.checkout("Liger-Kernel, https://github.com/linkedin/Liger-Kernel")
_PACKAGE = _SUITE / "src/liger_kernel"


def _check_casting(x: torch.Tensor, weight: torch.Tensor | None, casting_mode: str) -> None:
    if x.dtype == torch.float32 or casting_mode == "gemma":
        return
    if casting_mode == "none":
        pytest.skip(f"casting mode none computes in {x.dtype}")
    if weight is not None:
        pytest.skip("casting mode llama rounds twice")


def _rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None) -> torch.Tensor:
    _check_casting(X, W, casting_mode)
    return lk.rms_norm(X, W, eps, offset=offset)


def _add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True) -> tuple[torch.Tensor, torch.Tensor]:
    _check_casting(X, W, casting_mode)
    return lk.add_rms_norm(X, R, W, eps, offset=offset)


def _rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables hold every angle twice, as Hugging Face's do. Of an odd head's width the last element stays."""
    half = q.shape[-1] // 2
    return lk.rope(q, k, cos[..., :half], sin[..., :half])


# Their modules are in packages whose own __init__ imports all of Liger: these are empty, and find only what is asked.
shims.stub("liger_kernel", path=_PACKAGE)
shims.stub("liger_kernel.transformers", path=_PACKAGE / "transformers")
shims.stub(
    "liger_kernel.ops",
    LigerRMSNormFunction=types.SimpleNamespace(apply=_rms_norm),
    LigerFusedAddRMSNormFunction=types.SimpleNamespace(apply=_add_rms_norm),
    LigerRopeFunction=types.SimpleNamespace(apply=_rope),
)
shims.stub(
    "liger_kernel.transformers.functional",
    liger_rms_norm=_rms_norm,
    liger_fused_add_rms_norm=_add_rms_norm,
    liger_rope=_rope,
)
_utils = shims.load(_PACKAGE / "utils.py", "liger_kernel.utils")
_utils.infer_device = lambda: "cuda"  # by itself it finds the CPU, with which their tests leave out bfloat16
# Of LlamaRotaryEmbedding, to which they give a device; newer versions of Transformers take none.
_utils.transformers_version_dispatch = lambda version, old, new, before_kwargs, after_kwargs: new(
    after_kwargs["config"]
).to(after_kwargs["device"])
shims.stub("test", path=_SUITE / "test")  # else the standard library's


def _tests(name: str) -> types.ModuleType:
    return shims.load(_SUITE / f"test/transformers/{name}.py", f"liger_{name}")


_norm, _add_norm, _rotary = _tests("test_rms_norm"), _tests("test_fused_add_rms_norm"), _tests("test_rope")
# Newer versions of Transformers refuse an odd head width; the next even one has as many angles.
_rotary.LlamaConfig = lambda head_dim, **others: LlamaConfig(head_dim=head_dim + head_dim % 2, **others)


@pytest.fixture(autouse=True)
def _seeded_as_theirs(on_suite_device: None) -> Iterator[None]:  # noqa: F811
    _norm.set_seed(42)
    yield


def _fits(bsz=1, seq_len=1, num_q_heads=1, num_kv_heads=0, num_heads=0, head_dim=1, **_) -> bool:
    elements = bsz * seq_len * (num_q_heads + num_kv_heads + 2 * num_heads) * head_dim
    return elements <= (2**20 if INTERPRETED else 2**25)


test_rms_norm = pick(_norm.test_correctness, _fits)
test_rms_norm_functional = pick(_norm.test_correctness_functional, _fits)
test_add_rms_norm = pick(_add_norm.test_correctness, _fits)
test_add_rms_norm_functional = pick(_add_norm.test_correctness_functional, _fits)
test_rope = pick(_rotary.test_correctness, _fits)
test_rope_functional = pick(_rotary.test_functional_correctness, _fits)
test_rope_vision_2d_cos_sin = pick(_rotary.test_vision_2d_cos_sin, _fits)
