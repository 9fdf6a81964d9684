"""Attention of few queries with a boolean mask over the keys, for decoding a padded batch: registered op and function.

For inference, inside the package only: the public `llama_kernels.attention` takes no such mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llama_kernels.core.autograd import needs_grad
from llama_kernels.core.checks import check_tensors, message, shape_of
from llama_kernels.core.registry import register
from llama_kernels.core.tensors import last_dim_contiguous
from llama_kernels.ops.attention.call import AttentionCall, empty_outputs
from llama_kernels.ops.attention.checks import checked_call
from llama_kernels.ops.attention.cpu import plain_forward
from llama_kernels.ops.attention.decode import MOST_QUERIES, MOST_ROWS, fits_decode, launch_decode
from llama_kernels.ops.attention.flops import count_flops

__all__ = ["decode_attention", "fits_decode"]


def _by(run: Callable[[AttentionCall, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def decode(q, k, v, key_mask, sinks, kv_start, kv_end, scale, softcap):
        sequences = (None, None, q.shape[2], k.shape[2])
        return run(AttentionCall(q, k, v, sinks, kv_start, kv_end, *sequences, scale, softcap, None, None), key_mask)

    return decode


def _plain(call: AttentionCall, key_mask: torch.Tensor) -> torch.Tensor:
    """The op in plain PyTorch: one sequence at a time, without its hidden keys. The bounds are counted anew."""
    out, _ = empty_outputs(call)
    for b, visible in enumerate(key_mask):
        one = slice(b, b + 1)
        visible_before = torch.cat((visible.new_zeros(1, dtype=torch.int32), visible.cumsum(0, dtype=torch.int32)))
        kv_start, kv_end = (
            None if bound is None else visible_before[bound[one].clamp(0, visible.numel())]
            for bound in (call.kv_start, call.kv_end)
        )
        k, v = call.k[one, :, visible], call.v[one, :, visible]
        alone = call._replace(q=call.q[one], k=k, v=v, kv_start=kv_start, kv_end=kv_end, longest_k=k.shape[2])
        out[b] = plain_forward(alone)[0][0]
    return out


_decode_attention = register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor key_mask, Tensor? sinks, Tensor? kv_start, Tensor? kv_end, "
    "float scale, float? softcap) -> Tensor",
    kernel=_by(lambda call, key_mask: launch_decode(call, key_mask)[0]),
    reference=_by(_plain),
    fake=_by(lambda call, key_mask: empty_outputs(call)[0]),
)
count_flops("decode_attention", products_of_D=1, products_of_Dv=1)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
) -> torch.Tensor:
    """`llama_kernels.attention` of few queries with is_causal=False, where key_mask hides single keys.

    It neither waits for the GPU nor copies k or v. For inference: it has no gradient.

    Args:
        q, k, v, scale, softcap, sinks, kv_start, kv_end: as in `llama_kernels.attention`. There are at most 32 queries,
            and 1 to 128 query rows per key head, Hq // Hkv * Sq, as `fits_decode(q, k)` checks. Hidden keys and their
            values must be finite.
        key_mask: (B, Sk) bool, False for a key that no query of the sequence sees. A last dimension that is not
            contiguous is copied.

    Returns:
        out, (B, Hq, Sq, Dv) in q's dtype and memory order. A row that sees no key gives 0.

    Raises:
        TypeError, ValueError: As `llama_kernels.attention`; also where key_mask does not fit, there are too many rows,
            or an argument requires grad.
    """
    op = "decode_attention"
    call = checked_call(
        op, q, k, v, is_causal=False, scale=scale, window_size=(-1, -1), softcap=softcap, sinks=sinks,
        kv_start=kv_start, kv_end=kv_end, deterministic=None,
    )  # fmt: skip
    q, k, v, sinks = call.q, call.k, call.v, call.sinks
    check_tensors(op, (torch.bool,), key_mask=key_mask)
    if key_mask.shape != (k.shape[0], k.shape[2]):
        wanted = f"{(k.shape[0], k.shape[2])}, one for each key of each batch"
        raise ValueError(message(op, "key_mask", shape_of(key_mask), wanted))
    if key_mask.device != q.device:
        raise ValueError(message(op, "key_mask", f"on {key_mask.device}", f"the device of q, {q.device}"))
    if not fits_decode(q, k):
        wanted = f"1 to {MOST_ROWS} query rows per key head, Hq // Hkv * Sq, of at most {MOST_QUERIES} queries"
        raise ValueError(message(op, "q", f"{shape_of(q)} for {k.shape[1]} key heads", wanted))
    tensors = {"q": q, "k": k, "v": v, "sinks": sinks}
    if needs_grad(*tensors.values()):
        name = next(name for name, x in tensors.items() if x is not None and x.requires_grad)
        fix = "Call it under torch.no_grad(), or use llama_kernels.attention."
        raise ValueError(message(op, name, "a tensor that requires grad", "one without: it is for inference", fix))
    key_mask = last_dim_contiguous(key_mask)
    return _decode_attention(q, k, v, key_mask, sinks, call.kv_start, call.kv_end, call.scale, call.softcap)
