"""quack's own tests of RMSNorm and RoPE, with our ops under them. None of their code is here.

    git clone https://github.com/Dao-AILab/quack
    TRITON_INTERPRET=0 SUITE=quack python -m pytest -o addopts= tests/regressions/witness/quack.py

SUITE is a checkout; tests/test_rmsnorm.py and tests/test_rotary.py are loaded from it, and the PyTorch reference of the
first. Left out is what tests quack's compiler, tuner, kernel count and messages. How much runs without a GPU, and what
CASES is: tests/regressions/witness/shims.py. torch.compile is left to a GPU, and bias, weights of a head each and
another output dtype, which we lack, are skipped by name. One check is not theirs: that a leaf which requires grad was
itself rotated in place. Ours refuses that, as autograd does, so a copy of it is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llama_kernels as lk
from llama_kernels.core.language import INTERPRETED
from tests.regressions.witness import shims
from tests.regressions.witness.shims import on_suite_device, pick  # noqa: F401  the fixture

_SUITE = shims.checkout("quack, https://github.com/Dao-AILab/quack")


def _rmsnorm(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False,
    weight_offset=0.0,
) -> Any:  # fmt: skip
    shims.lacking(
        bias=bias is not None,
        weight_of_a_head_each=weight is not None and weight.ndim == 2,
        output_of_another_dtype=out_dtype not in (None, x.dtype),
    )
    if residual is None:
        y, residual_out = lk.rms_norm(x, weight, eps, offset=weight_offset), x.to(residual_dtype or x.dtype)
    else:
        residual = residual.to(residual_dtype or residual.dtype)  # ours returns the sum in the dtype of what it added
        y, residual_out = lk.add_rms_norm(x, residual, weight, eps, offset=weight_offset)
    return (y, residual_out) if prenorm else y


def _rmsnorm_fwd(x, weight=None, *args: Any, store_rstd: bool = False, **kwargs: Any) -> tuple:
    shims.lacking(rstd_output=store_rstd)
    return *_rmsnorm(x, weight, *args, prenorm=True, **kwargs), None


def _apply_rotary(x, cos, sin, *args: Any, conjugate: bool = False, **kwargs: Any) -> torch.Tensor:
    return shims.apply_rotary_emb(x, cos, -sin if conjugate else sin, *args, **kwargs)


def _absent(*args: Any, **kwargs: Any) -> None:
    pytest.skip("a kernel of quack's, called past its public function")


_reference = shims.functions_of(_SUITE / "quack/rmsnorm.py", "rmsnorm_ref", "rmsnorm_bwd_ref")
# This module is itself named quack: only the submodules can be stood in for, and nobody asks for more.
shims.stub("quack.cute_dsl_utils", get_device_capacity=torch.cuda.get_device_capability)
shims.stub("quack.rmsnorm_config", RmsNormBwdConfig=_absent, RmsNormFwdConfig=_absent)
shims.stub(
    "quack.rmsnorm",
    rmsnorm=_rmsnorm,
    rmsnorm_fwd=_rmsnorm_fwd,
    **dict.fromkeys(("_compile_rmsnorm_fwd", "rmsnorm_bwd", "rmsnorm_bwd_tuned", "rmsnorm_fwd_tuned"), _absent),
    **_reference,
)
shims.stub(
    "quack.rotary",
    apply_rotary=_apply_rotary,
    apply_rotary_emb=shims.apply_rotary_emb,
    apply_rotary_emb_qkv_=shims.apply_rotary_emb_qkv_,
    apply_rotary_emb_kv_=shims.apply_rotary_emb_kv_,
)

_norm = shims.load(_SUITE / "tests/test_rmsnorm.py", "quack_rmsnorm_tests")
_rotary = shims.load(_SUITE / "tests/test_rotary.py", "quack_rotary_tests")
_assert_aliased = _rotary.assert_aliased
_rotary.assert_aliased = lambda out, given: shims.refused_in_place(given) or _assert_aliased(out, given)


def _fits(use_compile=False, M=1, N=1, **_) -> bool:
    most = 2**18 if INTERPRETED else 2**22
    return not use_compile and most >= M * N


test_rmsnorm_forward_backward = pick(_norm.test_rmsnorm_forward_backward, _fits)
test_rmsnorm_weight_offset = pick(_norm.test_rmsnorm_weight_offset, _fits)
test_rmsnorm_noncontiguous_grad = pick(_norm.test_rmsnorm_noncontiguous_grad, _fits)
test_rmsnorm_qk = pick(_norm.test_rmsnorm_qk, _fits)
test_rmsnorm_with_bias = pick(_norm.test_rmsnorm_with_bias, _fits)
test_rmsnorm_with_residual = pick(_norm.test_rmsnorm_with_residual, _fits)
test_rmsnorm_prenorm_false = pick(_norm.test_rmsnorm_prenorm_false, _fits)
test_rmsnorm_residual_dtype_override = pick(_norm.test_rmsnorm_residual_dtype_override, _fits)
test_rmsnorm_fwd_empty = pick(_norm.test_rmsnorm_fwd_empty)
if not INTERPRETED:  # 32,768 rows
    test_rmsnorm_strided_tensor = pick(_norm.test_rmsnorm_strided_tensor, _fits)
if shims.GPU:  # 8 GiB and more
    test_rmsnorm_large_tensor = pick(_norm.test_rmsnorm_large_tensor)

test_rotary_emb_func = pick(_rotary.test_rotary_emb_func)
test_rotary_emb_vector_width_selection = pick(_rotary.test_rotary_emb_vector_width_selection)
test_rotary_emb_dim_dtype_grid = pick(_rotary.test_rotary_emb_dim_dtype_grid)
test_rotary_emb_strided_x_qkv_view = pick(_rotary.test_rotary_emb_strided_x_qkv_view)
test_rotary_emb_strided_cos_sin = pick(_rotary.test_rotary_emb_strided_cos_sin)
test_rotary_emb_odd_nheads_block_h = pick(_rotary.test_rotary_emb_odd_nheads_block_h)
test_rotary_emb_varlen_func = pick(_rotary.test_rotary_emb_varlen_func)
test_rotary_emb_qkv = pick(_rotary.test_rotary_emb_qkv, _fits)
test_rotary_emb_kv = pick(_rotary.test_rotary_emb_kv)
test_apply_rotary_empty = pick(_rotary.test_apply_rotary_empty)
test_apply_rotary_bwd_empty = _rotary.test_apply_rotary_bwd_empty
if shims.GPU:
    test_rotary_emb_compile = _rotary.test_rotary_emb_compile
