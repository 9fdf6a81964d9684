"""Valid arguments of every op, and changes to them that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def rope_args() -> dict[str, Any]:
    return {
        "q": torch.randn(2, 4, 6, 8),
        "k": torch.randn(2, 2, 6, 8),
        "cos": torch.randn(9, 4),
        "sin": torch.randn(9, 4),
    }


def qkv_args() -> dict[str, Any]:
    return {
        "qkv": torch.randn(2, 6, 64),
        "q_heads": 4,
        "kv_heads": 2,
        "cos": torch.randn(9, 4),
        "sin": torch.randn(9, 4),
    }


def cache_args() -> dict[str, Any]:
    caches = {"k_cache": torch.randn(2, 2, 5, 8), "v_cache": torch.randn(2, 2, 5, 7)}
    token = {"q": torch.randn(2, 4, 1, 8), "k": torch.randn(2, 2, 1, 8), "v": torch.randn(2, 2, 1, 7)}
    return {**token, **caches, "cache_position": ints(3), "cos": torch.randn(9, 4), "sin": torch.randn(9, 4)}


def qk_args() -> dict[str, Any]:
    return {**rope_args(), "q_weight": torch.randn(8), "k_weight": torch.randn(8)}


def norm_args() -> dict[str, Any]:
    return {"x": torch.randn(3, 8), "weight": torch.randn(8)}


def add_args() -> dict[str, Any]:
    return {"x": torch.randn(3, 8), "residual": torch.randn(3, 8), "weight": torch.randn(8)}


def attention_args() -> dict[str, Any]:
    return {"q": torch.randn(2, 4, 6, 8), "k": torch.randn(2, 2, 7, 8), "v": torch.randn(2, 2, 7, 8)}


def rope_attention_args() -> dict[str, Any]:
    return {**rope_args(), "v": torch.randn(2, 2, 6, 7)}


def varlen_args() -> dict[str, Any]:
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    return {"q": torch.randn(6, 4, 8), "k": torch.randn(6, 2, 8), "v": torch.randn(6, 2, 8), "cu_seqlens_q": cu,
            "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4}  # fmt: skip


ARGS: dict[str, Callable[[], dict[str, Any]]] = {
    "rope": rope_args, "rms_norm": norm_args, "add_rms_norm": add_args, "attention": attention_args,
    "attention_varlen": varlen_args, "rope_qkv": qkv_args, "rope_into_cache": cache_args, "qk_norm_rope": qk_args,
    "rope_attention": rope_attention_args,
}  # fmt: skip


# --- each argument ---------------------------------------------------------------------------------------------------

F, I = torch.randn, torch.zeros


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


int32 = torch.int32
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
    ("rope", "q", "a leaf that requires grad", {"q": F(2, 4, 6, 8).requires_grad_(), "inplace": True}),
    ("rope", "k", "of strides", {"k": F(2, 1, 6, 8).expand(2, 2, 6, 8), "inplace": True}),
    ("rope", "q", "of strides", {"q": F(2, 4, 8, 6).mT, "inplace": True}),
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
    ("rope_into_cache", "v_cache", "of strides", {"v_cache": F(2, 2, 7, 5).mT}),
    ("rope_into_cache", "k", "a tensor that requires grad", {"k": F(2, 2, 1, 8).requires_grad_()}),
    ("rope_into_cache", "k_cache", "a tensor that requires grad", {"k_cache": F(2, 2, 5, 8).requires_grad_()}),
    ("rope_into_cache", "cache_position", r"of shape \(2,\)", {"cache_position": ints(2, 3)}),
    ("rope_into_cache", "cache_position", "on meta", {"cache_position": I(1, dtype=int32, device="meta")}),
    ("rope_into_cache", "position_ids", r"of shape \(2,\)", {"position_ids": ints(2, 3)}),
    ("qk_norm_rope", "q", r"of shape \(2, 8\)", {"q": F(2, 8)}),
    ("qk_norm_rope", "k", r"of shape \(2, 2, 5, 8\)", {"k": F(2, 2, 5, 8)}),
    ("qk_norm_rope", "q_weight", r"of shape \(7,\)", {"q_weight": F(7)}),
    ("qk_norm_rope", "k_weight", r"of shape \(2, 8\)", {"k_weight": F(2, 8)}),
    ("qk_norm_rope", "k_weight", "given without k", {"k": None}),
    ("qk_norm_rope", "eps", "-1", {"eps": -1.0}),
    ("qk_norm_rope", "cos", r"of shape \(9, 5\)", {"cos": F(9, 5), "sin": F(9, 5)}),
    ("qk_norm_rope", "position_ids", r"of shape \(3, 6\)", {"position_ids": I(3, 6, dtype=int32)}),
    ("rms_norm", "x", "a scalar", {"x": F(())}),
    ("rms_norm", "weight", r"of shape \(7,\)", {"weight": F(7)}),
    ("rms_norm", "weight", r"of shape \(1, 8\)", {"weight": F(1, 8)}),
    ("rms_norm", "eps", "-1e-06", {"eps": -1e-6}),
    ("rms_norm", "eps", "nan", {"eps": float("nan")}),
    ("add_rms_norm", "residual", r"of shape \(3, 1\)", {"residual": F(3, 1)}),
    ("add_rms_norm", "eps", "-1", {"eps": -1.0}),
    ("attention", "q", r"of shape \(4, 6, 8\)", {"q": F(4, 6, 8)}),
    ("attention", "k", r"of shape \(3, 2, 7, 8\)", {"k": F(3, 2, 7, 8)}),
    ("attention", "k", r"of shape \(2, 2, 7, 9\)", {"k": F(2, 2, 7, 9)}),
    ("attention", "k", "of 3 heads", {"k": F(2, 3, 7, 8), "v": F(2, 3, 7, 8)}),
    ("attention", "k", "of 0 heads", {"k": F(2, 0, 7, 8), "v": F(2, 0, 7, 8)}),
    ("attention", "v", r"of shape \(2, 2, 6, 8\)", {"v": F(2, 2, 6, 8)}),
    ("attention", "q", r"of shape \(2, 4, 6, 257\)", {"q": F(2, 4, 6, 257), "k": F(2, 2, 7, 257)}),
    ("attention", "q", r"of shape \(2, 4, 6, 0\)", {"q": F(2, 4, 6, 0), "k": F(2, 2, 7, 0)}),
    ("attention", "v", r"of shape \(2, 2, 7, 257\)", {"v": F(2, 2, 7, 257)}),
    ("attention", "window_size", r"\(-2, 0\)", {"window_size": (-2, 0)}),
    ("attention", "window_size", r"\(1.5, 0\)", {"window_size": (1.5, 0)}),
    ("attention", "softcap", "-3", {"softcap": -3.0}),
    ("attention", "scale", "inf", {"scale": float("inf")}),
    ("attention", "scale", "nan", {"scale": float("nan")}),
    ("attention", "sinks", r"of shape \(2,\)", {"sinks": F(2)}),
    ("attention", "sinks", "on meta", {"sinks": F(4, device="meta")}),
    ("attention", "kv_start", r"of shape \(6,\)", {"kv_start": I(6, dtype=int32)}),
    ("attention", "kv_end", r"of shape \(2, 5\)", {"kv_end": I(2, 5, dtype=int32)}),
    ("attention", "kv_start", "on meta", {"kv_start": I(2, 6, dtype=int32, device="meta")}),
    ("rope_attention", "q", r"of shape \(4, 6, 8\)", {"q": F(4, 6, 8)}),
    ("rope_attention", "k", r"of shape \(2, 2, 7, 8\)", {"k": F(2, 2, 7, 8), "v": F(2, 2, 7, 8)}),
    ("rope_attention", "k", "of 3 heads", {"k": F(2, 3, 6, 8), "v": F(2, 3, 6, 8)}),
    ("rope_attention", "v", r"of shape \(2, 2, 5, 8\)", {"v": F(2, 2, 5, 8)}),
    ("rope_attention", "cos", r"of shape \(9, 5\)", {"cos": F(9, 5), "sin": F(9, 5)}),
    ("rope_attention", "cos", r"of shape \(5, 4\)", {"cos": F(5, 4), "sin": F(5, 4)}),
    ("rope_attention", "position_ids", r"of shape \(3, 6\)", {"position_ids": I(3, 6, dtype=int32)}),
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
]
TYPE_ERRORS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("rope", "cos", "torch.float8_e4m3fn", {name: F(9, 4).to(torch.float8_e4m3fn) for name in ("cos", "sin")}),
    ("rope", "cos", "torch.int64", {"cos": I(9, 4, dtype=torch.int64)}),
    ("rope", "cos", "torch.complex64", {"cos": F(9, 4).to(torch.complex64)}),
    ("rope", "sin", "torch.float64", {"sin": F(9, 4).double()}),
    ("rope", "sin", "torch.bfloat16", {"sin": F(9, 4).bfloat16()}),
    ("rope", "position_ids", "a list", {"position_ids": [0, 1, 2, 3, 4, 5]}),
    ("rope", "position_ids", "torch.float32", {"position_ids": F(6)}),
    ("rope", "position_ids", "torch.bool", {"position_ids": I(6, dtype=torch.bool)}),
    ("rope_into_cache", "cache_position", "a int", {"cache_position": 3}),
    ("rope_into_cache", "cache_position", "torch.float32", {"cache_position": F(1)}),
    ("rope_qkv", "position_ids", "torch.float32", {"position_ids": F(6)}),
    ("attention", "window_size", "5", {"window_size": 5}),
    ("attention", "sinks", "torch.float64", {"sinks": F(4).double()}),
    ("attention", "kv_end", "torch.int64", {"kv_end": I(2, 6, dtype=torch.int64)}),
    ("attention", "kv_start", "torch.int64", {"kv_start": I(2, 6, dtype=torch.int64)}),
    ("attention", "deterministic", "'yes'", {"deterministic": "yes"}),
    ("attention_varlen", "cu_seqlens_q", "torch.int64", {"cu_seqlens_q": I(3, dtype=torch.int64)}),
    ("attention_varlen", "cu_seqlens_k", "a list", {"cu_seqlens_k": [0, 2, 6]}),
    ("attention_varlen", "max_seqlen_k", "a Tensor", {"max_seqlen_k": torch.tensor(4)}),
]
