"""Code of a user, for `make typecheck`: mypy checks the result types of the public functions.

A line with `# type: ignore[...]` has an error on purpose. mypy reports the comment as unused if it misses the error.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import LlamaForCausalLM
from typing_extensions import assert_type

import llama_kernels as lk
from llama_kernels import reference
from llama_kernels.integrations.transformers import patch, unpatch


class Block(nn.Module):
    """An attention block of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = lk.nn.RMSNorm(64, eps=1e-5)
        self.rotary = lk.nn.RotaryEmbedding(16, 500000.0, {"rope_type": "linear", "factor": 2.0})

    def forward(self, x: Tensor, residual: Tensor, position_ids: Tensor) -> Tensor:
        y, residual = self.norm(x, residual=residual)
        q, k, v = y.unflatten(-1, (3, -1, 16)).permute(2, 0, 3, 1, 4)
        cos, sin = self.rotary(y, position_ids)
        return assert_type(lk.attention(*lk.rope(q, k, cos, sin), v).transpose(1, 2), Tensor) + self.norm(residual)


def rope_returns_what_k_is(q: Tensor, k: Tensor, maybe: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    assert_type(lk.rope(q, k, cos, sin), tuple[Tensor, Tensor])
    assert_type(lk.rope(q, None, cos, sin), tuple[Tensor, None])
    assert_type(lk.rope(q, maybe, cos, sin, inplace=True), tuple[Tensor, Tensor | None])
    assert_type(reference.rope(q, k, cos, sin), tuple[Tensor, Tensor])
    assert_type(lk.qk_norm_rope(q, k, None, None, cos, sin), tuple[Tensor, Tensor])
    lk.rope(q, None, cos, sin)[1].transpose(0, 1)  # type: ignore[attr-defined]
    lk.rope(q, k, cos, sin, interleave=True)  # type: ignore[call-arg]


def norms_return_tensors(x: Tensor, weight: Tensor) -> None:
    assert_type(lk.rms_norm(x, weight, eps=None), Tensor)
    assert_type(lk.add_rms_norm(x, x, weight), tuple[Tensor, Tensor])
    lk.rms_norm(x, weight, "1e-6")  # type: ignore[arg-type]


def return_lse_decides_what_attention_returns(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, both: bool) -> None:
    pair = tuple[Tensor, Tensor]
    assert_type(lk.attention(q, k, v, window_size=(128, 0), softcap=50.0), Tensor)
    assert_type(lk.attention(q, k, v, is_causal=False, return_lse=True), pair)
    assert_type(lk.attention(q, k, v, return_lse=both), Tensor | pair)
    assert_type(lk.attention_varlen(q, k, v, cu, cu, 8, 8), Tensor)
    assert_type(lk.attention_varlen(q, k, v, cu, cu, 8, 8, return_lse=True), pair)
    assert_type(lk.rope_attention(q, k, v, q, q, return_lse=True, interleaved=True), pair)
    assert_type(reference.attention(q, k, v, return_lse=True), pair)
    lk.attention(q, k, v, causal=True)  # type: ignore[call-overload]
    lk.attention(q, k, v, return_lse=True).transpose(1, 2)  # type: ignore[attr-defined]


def patch_keeps_the_type_of_the_model(block: Block, model: LlamaForCausalLM) -> None:
    assert_type(patch(block), Block)
    assert_type(unpatch(patch(block)), Block)
    patch(model, strict=True).generate(max_new_tokens=8)
    patch("meta-llama/Llama-3.1-8B")  # type: ignore[type-var]
