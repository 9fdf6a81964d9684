"""flash-attn's own tests of attention, RoPE and RMSNorm, with our ops under them. None of their code is here.

    git clone https://github.com/Dao-AILab/flash-attention && python -m pip install einops
    TRITON_INTERPRET=0 SUITE=flash-attention python -m pytest -o addopts= tests/regressions/witness/flash_attention.py

SUITE is a checkout; tests/test_flash_attn.py, tests/test_rotary.py and tests/ops/triton/test_layer_norm.py are loaded
from it, and the PyTorch references of the last two. TRITON_INTERPRET=1 runs fewer sets of parameters through the
kernels themselves; CASES=40 says how many a test: tests/regressions/witness/shims.py. Without a GPU only lengths and
widths that a CPU can do are run, and nothing that uses an option which we lack. With one, those are skipped by name,
and the tests of races and determinism come in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange, repeat

import llama_kernels as lk
from llama_kernels.core.language import INTERPRETED
from tests.regressions.witness import shims
from tests.regressions.witness.shims import on_suite_device, pick  # noqa: F401  the fixture

_SUITE = shims.checkout("flash-attention, https://github.com/Dao-AILab/flash-attention")


# --- attention -------------------------------------------------------------------------------------------------------


def _options(
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> dict[str, Any]:
    """What follows the tensors in every function of theirs, as our options."""
    shims.lacking(dropout=dropout_p > 0, ALiBi=alibi_slopes is not None, paged_KV_cache=block_table is not None)
    return {
        "is_causal": causal,
        "scale": softmax_scale,
        "window_size": tuple(int(side) for side in window_size),  # a tensor in some tests
        "softcap": softcap or None,
        "deterministic": deterministic or None,
        "return_lse": return_attn_probs,
    }


def _flash_attn_func(q, k, v, *args: Any, **kwargs: Any) -> Any:
    options = _options(*args, **kwargs)
    results = lk.attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    if not options["return_lse"]:
        return results.transpose(1, 2)
    out, lse = results
    return out.transpose(1, 2), lse, None


def _flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args: Any, **kwargs: Any
) -> Any:
    options = _options(*args, **kwargs)
    results = lk.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    return (*results, None) if options["return_lse"] else results


def _flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, *args: Any, **kwargs: Any) -> Any:
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _flash_attn_varlen_func(*qkv.unbind(-3), *lengths, *args, **kwargs)


def _absent(name: str) -> Any:
    return lambda *args, **kwargs: pytest.skip(f"llama_kernels has no {name}")


def _unpad_input(x: torch.Tensor, mask: torch.Tensor, unused_mask: torch.Tensor | None = None) -> tuple:
    """(B, S, ...) -> the tokens under the mask, their indices in B * S, cu_seqlens, the longest, tokens a sequence."""
    held = mask if unused_mask is None else mask + unused_mask
    lengths = held.sum(-1, dtype=torch.int32)
    indices = held.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()), mask.sum(-1, dtype=torch.int32)


def _pad_input(x: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    padded = x.new_zeros(batch * seqlen, *x.shape[1:])
    return padded.index_put((indices,), x).unflatten(0, (batch, seqlen))


shims.stub(
    "flash_attn",
    flash_attn_func=_flash_attn_func,
    flash_attn_kvpacked_func=lambda q, kv, *args, **kwargs: _flash_attn_func(q, *kv.unbind(-3), *args, **kwargs),
    flash_attn_qkvpacked_func=lambda qkv, *args, **kwargs: _flash_attn_func(*qkv.unbind(-3), *args, **kwargs),
    flash_attn_varlen_func=_flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func=lambda q, kv, *args, **kwargs: _flash_attn_varlen_func(
        q, *kv.unbind(-3), *args, **kwargs
    ),
    flash_attn_varlen_qkvpacked_func=_flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache=_absent("cache that it writes itself"),
)
shims.stub("flash_attn.bert_padding", pad_input=_pad_input, unpad_input=_unpad_input)
shims.stub("flash_attn.flash_attn_interface", _get_block_size_n=_absent("dropout"), USE_TRITON_ROCM=False)


# --- RoPE and RMSNorm ------------------------------------------------------------------------------------------------


def _layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
) -> Any:
    shims.lacking(
        LayerNorm=not is_rms_norm,
        bias=bias is not None,
        dropout=dropout_p > 0,
        rowscale=rowscale is not None,
        second_addend_x1=x1 is not None,
        second_weight_weight1=weight1 is not None,
    )
    offset = 1.0 if zero_centered_weight else 0.0
    if residual is None:
        y = lk.rms_norm(x, weight, eps, offset=offset)
        residual_out = x.float() if residual_in_fp32 else x
    else:
        y, residual_out = lk.add_rms_norm(x, residual, weight, eps, offset=offset)
    results = (y, *((residual_out,) if prenorm else ()), *((None, None) if return_dropout_mask else ()))
    return results if len(results) > 1 else y


shims.stub(
    "flash_attn.layers.rotary",
    apply_rotary_emb=shims.apply_rotary_emb,
    apply_rotary_emb_qkv_=shims.apply_rotary_emb_qkv_,
    apply_rotary_emb_kv_=shims.apply_rotary_emb_kv_,
    **shims.functions_of(
        _SUITE / "flash_attn/layers/rotary.py", "rotate_half", "apply_rotary_emb_torch",
        rearrange=rearrange, repeat=repeat, Optional=None,
    ),
)  # fmt: skip
shims.stub(
    "flash_attn.ops.triton.layer_norm",
    layer_norm_fn=_layer_norm_fn,
    layer_norm_linear_fn=_absent("norm fused with a linear layer"),
    **shims.functions_of(
        _SUITE / "flash_attn/ops/triton/layer_norm.py", "layer_norm_ref", "rms_norm_ref", F=torch.nn.functional
    ),
)


# --- their tests -----------------------------------------------------------------------------------------------------

_attention = shims.load(_SUITE / "tests/test_flash_attn.py", "flash_attention_tests")
_rotary = shims.load(_SUITE / "tests/test_rotary.py", "flash_attention_rotary_tests")
_layer_norm = shims.load(_SUITE / "tests/ops/triton/test_layer_norm.py", "flash_attention_layer_norm_tests")


def _attention_fits(
    d, seqlen=1, seqlen_q=1, seqlen_k=1, dropout_p=0.0, alibi=False, paged_kv_block_size=None, deterministic=False, **_
) -> bool:
    ours = not dropout_p and not alibi and paged_kv_block_size is None and not deterministic  # always deterministic
    return ours and max(seqlen, seqlen_q, seqlen_k) <= 256 and d <= 128


def _rotary_fits(compiled=False, **_) -> bool:
    return not compiled  # tests/contracts/test_compile.py compiles ours on a CPU; here it would be most of the time


def _layer_norm_fits(is_rms_norm, dropout_p, has_rowscale, has_x1, has_weight1, hidden_size, **_) -> bool:
    ours = is_rms_norm and not (dropout_p or has_rowscale or has_x1 or has_weight1)
    return ours and (hidden_size < 1000 or not INTERPRETED)


test_flash_attn_qkvpacked = pick(_attention.test_flash_attn_qkvpacked, _attention_fits)
test_flash_attn_varlen_qkvpacked = pick(_attention.test_flash_attn_varlen_qkvpacked, _attention_fits)
test_flash_attn_output = pick(_attention.test_flash_attn_output, _attention_fits)
test_flash_attn_varlen_output = pick(_attention.test_flash_attn_varlen_output, _attention_fits)
test_flash_attn_causal = pick(_attention.test_flash_attn_causal, _attention_fits)
test_flash_attn_varlen_causal = pick(_attention.test_flash_attn_varlen_causal, _attention_fits)
test_flash_attn_bwd_overflow = pick(_attention.test_flash_attn_bwd_overflow, _attention_fits)
test_flash_attn_bwd_transpose = pick(_attention.test_flash_attn_bwd_transpose, _attention_fits)
test_flash_attn_bwd_varlen_overflow = pick(_attention.test_flash_attn_bwd_varlen_overflow, _attention_fits)
if shims.GPU:  # hundreds of runs each, of what only a GPU does side by side
    test_flash_attn_race_condition = pick(_attention.test_flash_attn_race_condition)
    test_flash_attn_deterministic = pick(_attention.test_flash_attn_deterministic)
    test_flash_attn_varlen_deterministic = pick(_attention.test_flash_attn_varlen_deterministic)
test_rotary_emb_func = pick(_rotary.test_rotary_emb_func, _rotary_fits)
test_rotary_emb_varlen_func = pick(_rotary.test_rotary_emb_varlen_func, _rotary_fits)
if not INTERPRETED:  # a minute each there; quack's are the same and small
    test_rotary_emb_qkv = pick(_rotary.test_rotary_emb_qkv, _rotary_fits)
    test_rotary_emb_kv = pick(_rotary.test_rotary_emb_kv, _rotary_fits)
test_layer_norm = pick(_layer_norm.test_layer_norm, _layer_norm_fits)
