"""What each op must refuse: changes to the sample arguments of tests/support/ops.py, and the error wanted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

import llama_kernels as lk
from tests.support.ops import OPS, Arguments, Make, Shape, sample

F, I = torch.randn, torch.zeros


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


int32 = torch.int32
_ONE = F(2, 2, 6, 8)  # a tensor that is given twice
# Op, argument that the error names, what the error says it got (a regular expression), and the changed arguments.
VALUE_ERRORS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("rope", "q", r"of shape \(2, 8\)", {"q": F(2, 8)}),
    ("rope", "k", r"of shape \(2, 2, 5, 8\)", {"k": F(2, 2, 5, 8)}),
    ("rope", "k", r"of shape \(2, 2, 6, 10\)", {"k": F(2, 2, 6, 10)}),
    ("rope", "k", r"of shape \(6, 2, 8\)", {"k": F(6, 2, 8)}),
    ("rope", "cos", r"of shape \(9, 5\)", {"cos": F(9, 5), "sin": F(9, 5)}),
    ("rope", "cos", r"of shape \(9, 7\)", {"cos": F(9, 7), "sin": F(9, 7)}),
    ("rope", "cos", r"of shape \(9, 10\)", {"cos": F(9, 10), "sin": F(9, 10)}),
    ("rope", "cos", r"of shape \(9, 0\)", {"cos": F(9, 0), "sin": F(9, 0)}),
    ("rope", "cos", r"of shape \(5, 4\)", {"cos": F(5, 4), "sin": F(5, 4)}),
    ("rope", "cos", r"of shape \(3, 6, 4\)", {"cos": F(3, 6, 4), "sin": F(3, 6, 4)}),
    ("rope", "cos", r"of shape \(0, 4\)", {"cos": F(0, 4), "sin": F(0, 4), "position_ids": I(6, dtype=int32)}),
    ("rope", "cos", "a tensor that requires grad", {"cos": F(9, 4).requires_grad_()}),
    ("attention", "scale", "a tensor that requires grad", {"scale": torch.tensor(0.3).requires_grad_()}),
    ("attention", "softcap", "a tensor that requires grad", {"softcap": torch.tensor(0.0).requires_grad_()}),
    ("rope_attention", "softcap", "a tensor that requires grad", {"softcap": torch.tensor(5.0).requires_grad_()}),
    ("rms_norm", "eps", "a tensor that requires grad", {"eps": torch.tensor(0.3).requires_grad_()}),
    ("qk_norm_rope", "offset", "a tensor that requires grad", {"offset": torch.tensor(0.3).requires_grad_()}),
    ("rope", "sin", r"of shape \(8, 4\)", {"sin": F(8, 4)}),
    ("rope", "position_ids", r"of shape \(5,\)", {"position_ids": I(5, dtype=int32)}),
    ("rope", "position_ids", r"of shape \(3, 6\)", {"position_ids": I(3, 6, dtype=int32)}),
    ("rope", "position_ids", "on meta", {"position_ids": I(6, dtype=int32, device="meta")}),
    (
        "rope",
        "position_ids",
        "given beside cos",
        {"cos": F(2, 6, 4), "sin": F(2, 6, 4), "position_ids": I(6, dtype=int32)},
    ),
    ("rope", "axes", r"of shape \(3,\)", {"axes": I(3, dtype=int32), "position_ids": I(3, 2, 6, dtype=int32)}),
    ("rope", "axes", "on meta", {"axes": I(4, dtype=int32, device="meta"), "position_ids": I(3, 2, 6, dtype=int32)}),
    ("rope", "axes", "given beside cos", {"cos": F(2, 6, 4), "sin": F(2, 6, 4), "axes": I(4, dtype=int32)}),
    ("rope", "position_ids", "None beside axes", {"axes": I(4, dtype=int32)}),
    ("rope", "position_ids", r"of shape \(2, 6\)", {"axes": I(4, dtype=int32), "position_ids": I(2, 6, dtype=int32)}),
    (
        "rope",
        "position_ids",
        r"of shape \(0, 2, 6\)",
        {"axes": I(4, dtype=int32), "position_ids": I(0, 2, 6, dtype=int32)},
    ),
    ("rope_qkv", "axes", r"of shape \(3,\)", {"axes": I(3, dtype=int32), "position_ids": I(3, 2, 6, dtype=int32)}),
    ("qk_norm_rope", "position_ids", "None beside axes", {"axes": I(4, dtype=int32)}),
    ("rope", "q", "a leaf that requires grad", {"q": F(2, 4, 6, 8).requires_grad_(), "inplace": True}),
    ("rope", "k", "of strides", {"k": F(2, 1, 6, 8).expand(2, 2, 6, 8), "inplace": True}),
    ("rope", "q", "of strides", {"q": F(2, 4, 8, 6).mT, "inplace": True}),
    ("rope", "k", "in the memory of q", {"q": _ONE, "k": _ONE, "inplace": True}),
    ("rope", "q", "of strides", {"q": F(400).as_strided((2, 4, 6, 8), (192, 48, 4, 1)), "inplace": True}),
    ("rope_qkv", "qkv", r"of shape \(2, 6, 60\)", {"qkv": F(2, 6, 60)}),
    ("rope_qkv", "qkv", r"of shape \(64,\)", {"qkv": F(64)}),
    ("rope_qkv", "q_heads", "0", {"q_heads": 0}),
    ("rope_qkv", "kv_heads", "2.0", {"kv_heads": 2.0}),
    ("rope_qkv", "cos", r"of shape \(9, 5\)", {"cos": F(9, 5), "sin": F(9, 5)}),
    ("rope_qkv", "cos", r"of shape \(5, 4\)", {"cos": F(5, 4), "sin": F(5, 4)}),
    ("rope_qkv", "position_ids", r"of shape \(5,\)", {"position_ids": I(5, dtype=int32)}),
    ("rope_into_cache", "q", r"of shape \(1, 4, 8\)", {"q": F(1, 4, 8), "k": F(1, 2, 8)}),
    ("rope_into_cache", "k", r"of shape \(2, 2, 2, 8\)", {"k": F(2, 2, 2, 8)}),
    ("rope_into_cache", "v", r"of shape \(2, 3, 1, 7\)", {"v": F(2, 3, 1, 7)}),
    ("rope_into_cache", "k_cache", r"of shape \(2, 2, 5, 7\)", {"k_cache": F(2, 2, 5, 7)}),
    ("rope_into_cache", "k_cache", r"of shape \(2, 5, 8\)", {"k_cache": F(2, 5, 8)}),
    ("rope_into_cache", "v_cache", r"of shape \(2, 2, 6, 7\)", {"v_cache": F(2, 2, 6, 7)}),
    ("rope_into_cache", "v_cache", "of strides", {"v_cache": F(2, 2, 8, 6).mT}),
    ("rope_into_cache", "k_cache", "of strides", {"k_cache": F(1, 2, 6, 8).expand(2, 2, 6, 8)}),
    ("rope_into_cache", "v_cache", "in the memory of k_cache", {"k_cache": _ONE, "v_cache": _ONE}),
    ("rope_into_cache", "k_cache", "of strides", {"k_cache": F(400).as_strided((2, 2, 6, 8), (96, 48, 4, 1))}),
    ("rope_into_cache", "k", "a tensor that requires grad", {"k": F(2, 2, 1, 8).requires_grad_()}),
    ("rope_into_cache", "k_cache", "a tensor that requires grad", {"k_cache": F(2, 2, 6, 8).requires_grad_()}),
    ("rope_into_cache", "cache_position", r"of shape \(2,\)", {"cache_position": ints(2, 3)}),
    ("rope_into_cache", "cache_position", "on meta", {"cache_position": I(1, dtype=int32, device="meta")}),
    ("rope_into_cache", "position_ids", r"of shape \(2,\)", {"position_ids": ints(2, 3)}),
    ("rope_into_cache", "position_ids", "None beside axes", {"axes": I(4, dtype=int32)}),
    ("rope_into_cache", "axes", r"of shape \(3,\)", {"axes": ints(0, 1, 2), "position_ids": I(3, 2, 1, dtype=int32)}),
    ("qk_norm_rope", "q", r"of shape \(2, 8\)", {"q": F(2, 8)}),
    ("qk_norm_rope", "k", r"of shape \(2, 2, 5, 8\)", {"k": F(2, 2, 5, 8)}),
    ("qk_norm_rope", "q_weight", r"of shape \(7,\)", {"q_weight": F(7)}),
    ("qk_norm_rope", "k_weight", r"of shape \(2, 8\)", {"k_weight": F(2, 8)}),
    ("qk_norm_rope", "k_weight", "given without k", {"k": None}),
    ("qk_norm_rope", "eps", "-1", {"eps": -1.0}),
    ("qk_norm_rope", "offset", "inf", {"offset": float("inf")}),
    ("qk_norm_rope", "cos", r"of shape \(9, 5\)", {"cos": F(9, 5), "sin": F(9, 5)}),
    ("qk_norm_rope", "position_ids", r"of shape \(3, 6\)", {"position_ids": I(3, 6, dtype=int32)}),
    ("rms_norm", "x", "a scalar", {"x": F(())}),
    ("rms_norm", "weight", r"of shape \(7,\)", {"weight": F(7)}),
    ("rms_norm", "weight", r"of shape \(1, 8\)", {"weight": F(1, 8)}),
    ("rms_norm", "eps", "-1e-06", {"eps": -1e-6}),
    ("rms_norm", "eps", "nan", {"eps": float("nan")}),
    ("rms_norm", "eps", "inf", {"eps": float("inf")}),
    ("rms_norm", "offset", "nan", {"offset": float("nan")}),
    ("add_rms_norm", "residual", r"of shape \(3, 1\)", {"residual": F(3, 1)}),
    ("add_rms_norm", "eps", "-1", {"eps": -1.0}),
    ("attention", "q", r"of shape \(4, 6, 8\)", {"q": F(4, 6, 8)}),
    ("attention", "k", r"of shape \(3, 2, 6, 8\)", {"k": F(3, 2, 6, 8)}),
    ("attention", "k", r"of shape \(2, 2, 6, 9\)", {"k": F(2, 2, 6, 9)}),
    ("attention", "k", "of 3 heads", {"k": F(2, 3, 6, 8), "v": F(2, 3, 6, 8)}),
    ("attention", "k", "of 0 heads", {"k": F(2, 0, 6, 8), "v": F(2, 0, 6, 8)}),
    ("attention", "v", r"of shape \(2, 2, 5, 8\)", {"v": F(2, 2, 5, 8)}),
    ("attention", "q", r"of shape \(2, 4, 6, 0\)", {"q": F(2, 4, 6, 0), "k": F(2, 2, 6, 0)}),
    ("attention", "v", r"of shape \(2, 2, 6, 513\)", {"v": F(2, 2, 6, 513)}),
    ("attention", "q", r"of shape \(2, 4, 6, 577\)", {"q": F(2, 4, 6, 577), "k": F(2, 2, 6, 577)}),
    ("attention", "window_size", r"\(-2, 0\)", {"window_size": (-2, 0)}),
    ("attention", "window_size", r"\(1.5, 0\)", {"window_size": (1.5, 0)}),
    ("attention", "window_size", r"\(True, 0\)", {"window_size": (True, 0)}),
    ("attention", "softcap", "-3", {"softcap": -3.0}),
    ("attention", "softcap", "inf", {"softcap": float("inf")}),
    ("attention", "softcap", r"1e\+39", {"softcap": 1e39}),
    ("attention", "softcap", "1e-40", {"softcap": 1e-40}),
    ("attention", "scale", r"-1e\+39", {"scale": -1e39}),
    ("attention", "scale", "inf", {"scale": float("inf")}),
    ("attention", "scale", "nan", {"scale": float("nan")}),
    ("attention", "sinks", r"of shape \(2,\)", {"sinks": F(2)}),
    ("attention", "sinks", "on meta", {"sinks": F(4, device="meta")}),
    ("attention", "kv_start", r"of shape \(6,\)", {"kv_start": I(6, dtype=int32)}),
    ("attention", "kv_end", r"of shape \(2, 5\)", {"kv_end": I(2, 5, dtype=int32)}),
    ("attention", "kv_prefix", r"of shape \(2,\)", {"kv_prefix": I(2, dtype=int32)}),
    ("attention", "kv_start", "on meta", {"kv_start": I(2, 6, dtype=int32, device="meta")}),
    ("rope_attention", "q", r"of shape \(4, 6, 8\)", {"q": F(4, 6, 8)}),
    ("rope_attention", "k", r"of shape \(2, 2, 7, 8\)", {"k": F(2, 2, 7, 8), "v": F(2, 2, 7, 8)}),
    ("rope_attention", "k", "of 3 heads", {"k": F(2, 3, 6, 8), "v": F(2, 3, 6, 8)}),
    ("rope_attention", "v", r"of shape \(2, 2, 5, 8\)", {"v": F(2, 2, 5, 8)}),
    ("rope_attention", "cos", r"of shape \(9, 5\)", {"cos": F(9, 5), "sin": F(9, 5)}),
    ("rope_attention", "cos", r"of shape \(5, 4\)", {"cos": F(5, 4), "sin": F(5, 4)}),
    ("rope_attention", "position_ids", r"of shape \(3, 6\)", {"position_ids": I(3, 6, dtype=int32)}),
    ("rope_attention", "position_ids", "None beside axes", {"axes": I(4, dtype=int32)}),
    ("rope_attention", "axes", r"of shape \(3,\)", {"axes": ints(0, 1, 2), "position_ids": I(3, 2, 6, dtype=int32)}),
    ("rope_attention", "window_size", r"\(-2, 0\)", {"window_size": (-2, 0)}),
    ("rope_attention", "kv_start", r"of shape \(6,\)", {"kv_start": I(6, dtype=int32)}),
    ("attention_varlen", "q", r"of shape \(1, 4, 6, 8\)", {"q": F(1, 4, 6, 8)}),
    ("attention_varlen", "v", r"of shape \(5, 2, 8\)", {"v": F(5, 2, 8)}),
    ("attention_varlen", "cu_seqlens_q", r"of shape \(1, 3\)", {"cu_seqlens_q": I(1, 3, dtype=int32)}),
    ("attention_varlen", "cu_seqlens_q", r"of shape \(0,\)", {"cu_seqlens_q": I(0, dtype=int32)}),
    ("attention_varlen", "cu_seqlens_k", r"of shape \(4,\)", {"cu_seqlens_k": I(4, dtype=int32)}),
    ("attention_varlen", "cu_seqlens_k", "on meta", {"cu_seqlens_k": I(3, dtype=int32, device="meta")}),
    ("attention_varlen", "max_seqlen_q", "-1", {"max_seqlen_q": -1}),
    ("attention_varlen", "kv_start", r"of shape \(1, 6\)", {"kv_start": I(1, 6, dtype=int32)}),
    ("attention_varlen", "kv_prefix", r"of shape \(1, 6\)", {"kv_prefix": I(1, 6, dtype=int32)}),
]
TYPE_ERRORS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("rope", "cos", "torch.float8_e4m3fn", {name: F(9, 4).to(torch.float8_e4m3fn) for name in ("cos", "sin")}),
    ("rope", "cos", "torch.int64", {"cos": I(9, 4, dtype=torch.int64)}),
    ("rope", "cos", "torch.complex64", {"cos": F(9, 4).to(torch.complex64)}),
    ("rope", "sin", "torch.float64", {"sin": F(9, 4).double()}),
    ("rope", "sin", "torch.bfloat16", {"sin": F(9, 4).bfloat16()}),
    ("rope", "axes", "torch.float32", {"axes": F(4), "position_ids": I(3, 2, 6, dtype=int32)}),
    ("rope", "axes", "a list", {"axes": [0, 0, 1, 2], "position_ids": I(3, 2, 6, dtype=int32)}),
    ("rope", "position_ids", "a list", {"position_ids": [0, 1, 2, 3, 4, 5]}),
    ("rope", "position_ids", "torch.float32", {"position_ids": F(6)}),
    ("rope", "position_ids", "torch.bool", {"position_ids": I(6, dtype=torch.bool)}),
    ("rope_into_cache", "cache_position", "a int", {"cache_position": 3}),
    ("rope_into_cache", "cos", "a list", {"cos": [1.0]}),
    ("rope_into_cache", "cache_position", "torch.float32", {"cache_position": F(1)}),
    ("rope_qkv", "position_ids", "torch.float32", {"position_ids": F(6)}),
    ("qk_norm_rope", "eps", r"\[1e-06\]", {"eps": [1e-6]}),
    ("attention", "window_size", "5", {"window_size": 5}),
    ("attention", "softcap", "'30'", {"softcap": "30"}),
    ("attention", "scale", "'1'", {"scale": "1"}),
    ("rms_norm", "eps", "'1e-6'", {"eps": "1e-6"}),
    ("rms_norm", "eps", "True", {"eps": True}),
    ("attention", "scale", "True", {"scale": True}),
    ("attention", "softcap", "False", {"softcap": False}),
    ("add_rms_norm", "offset", "None", {"offset": None}),
    ("attention", "sinks", "torch.float64", {"sinks": F(4).double()}),
    ("attention", "kv_prefix", "torch.int64", {"kv_prefix": I(2, 6, dtype=torch.int64)}),
    ("rope_attention", "kv_prefix", "a int", {"kv_prefix": 3}),
    ("attention", "kv_end", "torch.int64", {"kv_end": I(2, 6, dtype=torch.int64)}),
    ("attention", "kv_start", "torch.int64", {"kv_start": I(2, 6, dtype=torch.int64)}),
    ("attention", "deterministic", "'yes'", {"deterministic": "yes"}),
    ("attention", "is_causal", "None", {"is_causal": None}),
    ("attention", "return_lse", "1", {"return_lse": 1}),
    ("attention_varlen", "is_causal", "1.0", {"is_causal": 1.0}),
    ("attention_varlen", "return_lse", "'yes'", {"return_lse": "yes"}),
    ("rope_attention", "interleaved", "0", {"interleaved": 0}),
    ("rope_attention", "return_lse", "None", {"return_lse": None}),
    ("rope", "interleaved", "2.5", {"interleaved": 2.5}),
    ("rope", "inplace", "'x'", {"inplace": "x"}),
    ("rope_qkv", "interleaved", "1", {"interleaved": 1}),
    ("rope_into_cache", "interleaved", "None", {"interleaved": None}),
    ("qk_norm_rope", "interleaved", "'x'", {"interleaved": "x"}),
    ("attention_varlen", "cu_seqlens_q", "torch.int64", {"cu_seqlens_q": I(3, dtype=torch.int64)}),
    ("attention_varlen", "cu_seqlens_k", "a list", {"cu_seqlens_k": [0, 2, 6]}),
    ("attention_varlen", "cu_seqlens_q", "None", {"cu_seqlens_q": None, "cu_seqlens_k": None}),
    ("attention_varlen", "cu_seqlens_k", "None", {"cu_seqlens_k": None}),
    ("attention_varlen", "max_seqlen_k", "a Tensor", {"max_seqlen_k": torch.tensor(4)}),
]

# --- tensors that no argument takes ----------------------------------------------------------------------------------

_SQUARE = torch.ones(2, 2)


def _nested(dtype: torch.dtype, layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(n, 2, dtype=dtype) for n in (2, 3)], layout=layout)


# By name: how it is made in a dtype, and what the error says it is.
UNSUPPORTED: dict[str, tuple[Callable[[torch.dtype], torch.Tensor], str]] = {
    "sparse COO": (lambda dtype: _SQUARE.to(dtype).to_sparse(), "of layout torch.sparse_coo"),
    "sparse CSR": (lambda dtype: _SQUARE.to(dtype).to_sparse_csr(), "of layout torch.sparse_csr"),
    "nested, strided": (lambda dtype: _nested(dtype, torch.strided), "a nested tensor"),
    "nested, jagged": (lambda dtype: _nested(dtype, torch.jagged), "a nested tensor"),
    "complex": (lambda dtype: _SQUARE.to(torch.complex64), "torch.complex64"),
}
if torch.backends.mkldnn.is_available():
    UNSUPPORTED["MKL-DNN"] = lambda dtype: _SQUARE.to_mkldnn(), "of layout torch._mkldnn"
if hasattr(torch, "quantize_per_tensor"):  # PyTorch is to remove it
    UNSUPPORTED["quantised"] = lambda dtype: torch.quantize_per_tensor(_SQUARE, 0.1, 0, torch.quint8), "torch.quint8"


def all_arguments(op: str) -> Arguments:
    """Arguments of a call of op `op`, with every option that is a tensor."""
    given = {**sample(op), **OPS[op].options(Shape(), Make())}
    rows = (6,) if op == "attention_varlen" else (2, 6)
    tokens = (2, 1) if op == "rope_into_cache" else (2, 6)
    for name in inspect.signature(getattr(lk, op)).parameters:
        if name.startswith("kv_") and name != "kv_heads":
            given[name] = I(*rows, dtype=int32)
        if name == "axes":
            given |= {"axes": I(4, dtype=int32), "position_ids": I(3, *tokens, dtype=int32)}
    return given
