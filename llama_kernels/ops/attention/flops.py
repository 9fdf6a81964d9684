"""FLOPs of the attention ops, for torch.utils.flop_counter.FlopCounterMode.

The other ops count as 0 FLOPs, as PyTorch's own pointwise operations do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula


def count_flops(name: str, *, products_of_D: int, products_of_Dv: int) -> None:
    """Register the FLOPs of the attention op `name`, which multiplies each query with each key of its sequence.

    They are counted as PyTorch counts those of scaled_dot_product_attention: pairs that a mask hides count too.

    Args:
        products_of_D: products of D elements for each pair, such as the score.
        products_of_Dv: those of Dv elements.
    """
    op = getattr(torch.ops.llama_kernels, name)
    parameters = [argument.name for argument in op.default._schema.arguments]

    @register_flop_formula(op, get_raw=True)
    def flops(*args: Any, out_val: Any = None, **options: Any) -> int:
        given = dict(zip(parameters, args, strict=False), **options)
        widths = products_of_D * given["q"].shape[-1] + products_of_Dv * given["v"].shape[-1]
        return 2 * widths * _pairs(given)


def _pairs(given: dict[str, Any]) -> int:
    """Queries times keys, of all query heads."""
    q, k = given["q"], given["k"]
    if given.get("cu_seqlens_q") is None:
        return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    lengths = (_lengths(given[f"cu_seqlens_{x}"], given[f"longest_{x}"]) for x in "qk")
    return q.shape[1] * sum(rows * keys for rows, keys in zip(*lengths, strict=True))


def _lengths(cu_seqlens: torch.Tensor, longest: int) -> list[int]:
    """The length of each sequence; `longest` for all where cu_seqlens has no values. Reading them waits for a GPU."""
    if cu_seqlens.is_meta or is_fake(cu_seqlens):
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().clamp(0, longest).tolist()
