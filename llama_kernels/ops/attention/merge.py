"""Attention over disjoint sets of keys, merged into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama_kernels.core.checks import KERNEL_DTYPES, check_tensors, message, shape_of

__all__ = ["merge_attention"]


def merge_attention(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention of the same queries over disjoint sets of keys into attention over all these keys.

    lse = log(sum_i exp(lse_i)) and out = sum_i exp(lse_i - lse) out_i. This is plain PyTorch, computed in float32 and
    rounded once. It is differentiable in outs and lses. outs of bfloat16 or float16 are rounded already.

    Args:
        outs: what `attention` returned for each set of keys: (B, H, S, D), or packed (T, H, D), in one dtype.
        lses: likewise with return_lse=True: (B, H, S), or packed (H, T), float32.

    Returns:
        out in the dtype of the parts, and lse in float32. A row that saw no key in any part gives 0 and -inf.

    Raises:
        TypeError: a part is not a tensor, or has another dtype than it may have.
        ValueError: there are no parts, not one lse for each out, or shapes or devices do not fit.
    """
    op = "merge_attention"
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, Sequence) or isinstance(parts, str):
            raise TypeError(
                message(op, name, f"a {type(parts).__name__}", "a list or tuple with a tensor for each part")
            )
    if not outs:
        raise ValueError(message(op, "outs", "empty", "at least one part"))
    if len(outs) != len(lses):
        raise ValueError(message(op, "lses", f"{len(lses)} tensors", f"{len(outs)}, one for each of outs"))
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_tensors(op, KERNEL_DTYPES, **{"outs[0]": outs[0], f"outs[{i}]": out})
        check_tensors(op, (torch.float32,), **{f"lses[{i}]": lse})
        if out.shape != outs[0].shape or out.ndim not in (3, 4):
            wanted = f"the shape of outs[0], {tuple(outs[0].shape)}: (B, H, S, D), or packed (T, H, D)"
            raise ValueError(message(op, f"outs[{i}]", shape_of(out), wanted))
        if out.dtype != outs[0].dtype:
            raise TypeError(message(op, f"outs[{i}]", out.dtype, f"the dtype of outs[0], {outs[0].dtype}"))
        rows = out.shape[:-1] if out.ndim == 4 else (out.shape[1], out.shape[0])
        if lse.shape != rows or lse.device != out.device:
            got = f"{shape_of(lse)} on {lse.device}"
            raise ValueError(message(op, f"lses[{i}]", got, f"{tuple(rows)} on {out.device}"))
    return merged(outs, lses)


def merged(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_attention` of arguments that fit. It takes float64 too."""
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    parts = torch.stack([lse.to(wide) for lse in lses])
    largest = parts.detach().amax(0)
    largest = largest.masked_fill(largest == -torch.inf, 0)  # exp(-inf - 0) is 0, exp(-inf + inf) is NaN
    shares = torch.exp(parts - largest)
    mass = shares.sum(0)
    empty = mass == 0
    mass = mass.masked_fill(empty, 1)
    lse = (largest + mass.log()).masked_fill(empty, -torch.inf)
    weights = (shares / mass).unsqueeze(-1)
    if outs[0].ndim == 3:
        weights = weights.transpose(1, 2)  # (T, H, 1)
    total = weights[0] * outs[0].to(wide)
    for weight, out in zip(weights[1:], outs[1:], strict=True):
        total = torch.addcmul(total, weight, out.to(wide))  # one pass over both
    return total.to(outs[0].dtype), lse
