"""Grouped-query attention, dense and packed: registered ops, autograd, public functions.

forward.py and backward.py hold the kernels, decode.py those for few queries and many keys, masked_decode.py the op that
calls them with single keys hidden, tiles.py what they share on the device, tables.py their tile sizes, layout.py sizes
and strides of a call, and cpu.py the same in plain PyTorch.
"""

from __future__ import annotations

import itertools

import torch

from llama_kernels.core.checks import check_tensors, message, shape_of, values_are_checked
from llama_kernels.core.registry import Differentiable, needs_grad, refuse_double_backward, register, register_gradient
from llama_kernels.core.tensors import autocast_dtype, last_dim_contiguous
from llama_kernels.ops.attention.backward import launch_backward
from llama_kernels.ops.attention.cpu import plain_backward, plain_forward
from llama_kernels.ops.attention.forward import launch_forward
from llama_kernels.ops.attention.layout import empty_grads, empty_outputs

# --- registered ops --------------------------------------------------------------------------------------------------

_CALL = (
    "Tensor? sinks, Tensor? kv_start, Tensor? kv_end, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt longest_q, SymInt longest_k, float scale, float? softcap, SymInt? left, SymInt? right"
)
# -> out, lse (float32). Dense without cu_seqlens, when longest is Sq and Sk; left and right None: unlimited.
attention_forward = register(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)",
    kernel=launch_forward,
    reference=plain_forward,
    fake=lambda q, k, v, *call: empty_outputs(q, v),
)
# -> dq, dk, dv, dsinks; empty where not needed
_attention_backward = register(
    f"attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_CALL}, "
    "bool need_dq, bool need_dk, bool need_dv, bool need_dsinks, bool? deterministic) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernel=launch_backward,
    reference=plain_backward,
    fake=lambda do, dlse, q, k, v, out, lse, sinks, *rest: empty_grads(q, k, v, sinks, *rest[-5:-1]),
)


# --- autograd --------------------------------------------------------------------------------------------------------


class _Attention(Differentiable):
    """(q, k, v, sinks or None) -> (out, lse). Saves these and recomputes the probabilities."""

    @staticmethod
    def forward(op, deterministic, *call):
        return attention_forward(*call)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.deterministic, q, k, v, sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, *ctx.scalars = inputs
        ctx.save_for_backward(q, k, v, *output, sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, out, lse, sinks, *bounds = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:6]
        do = torch.zeros_like(out) if do is None else last_dim_contiguous(do)
        rest = (*bounds, *ctx.scalars, *needed, ctx.deterministic)
        grads = _attention_backward(do, dlse, q, k, v, out, lse, sinks, *rest)
        grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        grads = refuse_double_backward(ctx.op, grads, (do, dlse, q, k, v, sinks))
        return None, None, *grads, *[None] * (len(bounds) + len(ctx.scalars))


register_gradient(
    "attention_forward", ("q", "k", "v", "sinks"), by=lambda *call: _Attention.call("attention", None, *call)
)


def _apply(op, q, k, v, sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k,
           is_causal, scale, window_size, softcap, return_lse, deterministic):  # fmt: skip
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    sinks = None if sinks is None else sinks.contiguous()
    tensors = (q, k, v, sinks, kv_start, kv_end, cu_seqlens_q, cu_seqlens_k)
    scalars = (longest_q, longest_k, *numbers_of(q, is_causal, scale, window_size, softcap))
    if needs_grad(q, k, v, sinks):
        out, lse = _Attention.call(op, deterministic, *tensors, *scalars)
    else:
        out, lse = attention_forward(*tensors, *scalars)
    return (out, lse) if return_lse else out


# --- public functions ------------------------------------------------------------------------------------------------


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention: out = softmax(q @ kᵀ · scale + mask) @ v, tile by tile, without the Sq x Sk matrix.

    Query head h reads key and value head h // (Hq // Hkv); k and v are never repeated. Scores, softmax and sums are
    float32; probabilities are rounded to v's dtype before they meet v. Blocks of keys that the mask hides are skipped.
    Few queries, as in decoding, are split over the keys, with the heads that share them in one tile.
    Under autocast q, k and v are cast to its dtype. GQA: Ainslie et al., arXiv 2305.13245; the algorithm: Dao,
    FlashAttention-2, arXiv 2307.08691.

    Args:
        q: (B, Hq, Sq, D), bfloat16, float16 or float32, D from 1 to 256. Any strides, (B, S, H, D) seen through
            .transpose(1, 2) among them; a last dimension that is not contiguous is copied.
        k, v: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), of q's dtype, Hq a multiple of Hkv.
        is_causal: query i sees keys j <= i + Sk - Sq. Aligned at the bottom right, as a KV cache needs it; PyTorch's
            scaled_dot_product_attention aligns at the top left. Equal where Sq == Sk.
        scale: of the scores; None is D ** -0.5.
        window_size: (left, right), -1 for no limit: query i also sees only keys from i + Sk - Sq - left to
            i + Sk - Sq + right, both included, as in flash-attn.
        softcap: scores s become softcap · tanh(s / softcap). None or 0.0: they stay as they are.
        sinks: (Hq,), one more logit a head, which takes its share of the softmax (and of lse) and gives no value.
            Differentiable.
        kv_start, kv_end: (B, Sq) int32: row i also sees no key before kv_start[b, i], nor kv_end[b, i] or any after it.
            Padded and packed batches, and caches longer than what is in them, without unpadding, host sync or graph
            break; the blocks outside are skipped.
        return_lse: also return the log of the sum of exponentials of each row's scores. Differentiable.
        deterministic: True asks for gradients that repeat bit for bit, None follows
            torch.are_deterministic_algorithms_enabled(). Only dq of the Hopper kernels does not by itself
            (`llama_kernels.hopper_attention`); they then leave the gradients to the portable ones.

    Returns:
        out, (B, Hq, Sq, Dv) in q's dtype and memory order; with return_lse also lse, (B, Hq, Sq) float32, natural
        logarithm. A row that sees no key gives 0 and -inf (with sinks: 0 and the sink).

    Raises:
        TypeError: an argument is no tensor, or of another dtype, or the dtypes of q, k and v differ.
        ValueError: shapes, head counts, devices, window_size or softcap do not fit.
    """
    q, k, v = to_autocast(q, k, v)
    check_call("attention", q, k, v, 4, window_size, softcap, scale, sinks, kv_start, kv_end, deterministic)
    return _apply(
        "attention", q, k, v, sinks, kv_start, kv_end, None, None, q.shape[2], k.shape[2],
        is_causal, scale, window_size, softcap, return_lse, deterministic,
    )  # fmt: skip


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` of each sequence of a packed batch on its own.

    Args:
        q: (Tq, Hq, D); k, v: (Tk, Hkv, D) and (Tk, Hkv, Dv): the tokens of all sequences, one after another.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on the tensors' device: sequence b owns the tokens from
            cu_seqlens[b] to cu_seqlens[b + 1]. Sequences may be empty. Values are never trusted: what points outside of
            the tensors is clamped into them, since reading them back to check would stall the GPU
            (`llama_kernels.checked` does). Nothing is promised of sequences that overlap.
        max_seqlen_q, max_seqlen_k: no sequence is longer; what is, is cut off there.
        kv_start, kv_end: (Tq,) int32, counted from the first key of the row's own sequence.
        Others as in `attention`, Sq and Sk being the lengths of each sequence.

    Returns:
        out, (Tq, Hq, Dv); with return_lse also lse, (Hq, Tq). Tokens that no sequence owns give 0 and -inf.

    Raises:
        TypeError, ValueError: as `attention`; also for cu_seqlens and max_seqlen of another kind or shape.
    """
    op = "attention_varlen"
    q, k, v = to_autocast(q, k, v)
    check_call(op, q, k, v, 3, window_size, softcap, scale, sinks, kv_start, kv_end, deterministic)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensors(op, (torch.int32,), **{name: x})
        if x.ndim != 1 or not x.shape[0] or x.shape != cu_seqlens_q.shape:
            wanted = "(batch + 1,), the same for queries and keys"
            raise ValueError(message(op, name, shape_of(x), wanted))
        if x.device != q.device:
            raise ValueError(message(op, name, f"on {x.device}", f"the device of q, {q.device}"))
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, (int, torch.SymInt)):
            raise TypeError(message(op, name, f"a {type(longest).__name__}", "an int, known without asking the GPU"))
        if longest < 0:
            raise ValueError(message(op, name, longest, "a length"))
    for name, cu, longest, x in (("q", cu_seqlens_q, max_seqlen_q, q), ("k", cu_seqlens_k, max_seqlen_k, k)):
        if values_are_checked(cu):
            _check_bounds(op, name, cu.tolist(), longest, x.shape[0])
    return _apply(
        op, q, k, v, sinks, kv_start, kv_end, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(),
        max_seqlen_q, max_seqlen_k, is_causal, scale, window_size, softcap, return_lse, deterministic,
    )  # fmt: skip


def numbers_of(
    q: torch.Tensor, is_causal: bool, scale: float | None, window_size: tuple[int, int], softcap: float | None
) -> tuple[float, float | None, int | None, int | None]:
    """scale, softcap, left and right as the registered ops take them."""
    left, right = (None if side < 0 else min(side, _UNLIMITED) for side in window_size)
    return q.shape[-1] ** -0.5 if scale is None else float(scale), softcap or None, left, 0 if is_causal else right


# A window this wide sees everything; wider ones would overflow where positions are added to it.
_UNLIMITED = 2**30


def to_autocast(*tensors):
    """q, k and v in the dtype of autocast, where it is on: as PyTorch's own attention has it."""
    if not isinstance(tensors[0], torch.Tensor):
        return tensors
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors)


def _check_bounds(op: str, name: str, bounds: list[int], longest: int, tokens: int) -> None:
    """Of the sequences in q or in k: what the kernels would clamp, or cut off."""
    if bounds[0] < 0:
        raise ValueError(message(op, f"cu_seqlens_{name}", f"{bounds[0]} at its start", "0 or more"))
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            got = f"{end} at index {i + 1}, after {start}"
            raise ValueError(message(op, f"cu_seqlens_{name}", got, "bounds that never decrease"))
        if end - start > longest:
            wanted = f"at least {end - start}, the length of sequence {i}"
            raise ValueError(message(op, f"max_seqlen_{name}", longest, wanted))
    if bounds[-1] > tokens:
        got, wanted = f"{bounds[-1]} at its end", f"at most the {tokens} tokens of {name}"
        raise ValueError(message(op, f"cu_seqlens_{name}", got, wanted))


def check_call(op, q, k, v, ndim, window_size, softcap, scale, sinks, kv_start, kv_end, deterministic):
    check_tensors(op, q=q, k=k, v=v)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            fix = "Cast them alike; under autocast with its dtype this happens by itself."
            raise TypeError(message(op, name, x.dtype, f"the dtype of q, {q.dtype}", fix))
    dims = "(B, H, S, D)" if ndim == 4 else "(tokens, H, D)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != ndim:
            raise ValueError(message(op, name, shape_of(x), dims))
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    tokens = 2 if ndim == 4 else 0
    if ndim == 4 and of_k[0] != of_q[0]:
        raise ValueError(message(op, "k", shape_of(k), f"the batch size of q, {of_q[0]}"))
    if of_k[-1] != of_q[-1]:
        raise ValueError(message(op, "k", shape_of(k), f"the head width of q, {of_q[-1]}"))
    if of_v[:-1] != of_k[:-1]:
        raise ValueError(message(op, "v", shape_of(v), f"k's shape {tuple(of_k)} but for the last dimension"))
    Hq, Hkv = of_q[1], of_k[1]
    if Hq != 0 if Hkv == 0 else Hq % Hkv:
        fix = f"Got q {tuple(of_q)}, k {tuple(of_k)}."
        raise ValueError(message(op, "k", f"of {Hkv} heads", f"a divisor of q's {Hq} heads", fix))
    for name, x, D in (("q", q, of_q[-1]), ("v", v, of_v[-1])):
        if not 1 <= D <= 256:
            raise ValueError(message(op, name, shape_of(x), "a head width from 1 to 256"))

    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(message(op, "window_size", repr(window_size), "(left, right)"))
    for side in window_size:
        if not isinstance(side, (int, torch.SymInt)) or isinstance(side, bool) or side < -1:
            raise ValueError(message(op, "window_size", tuple(window_size), "two ints, each -1 (no limit) or more"))
    if softcap is not None and not softcap >= 0:
        raise ValueError(message(op, "softcap", softcap, "a positive number, or 0 or None for none"))
    if scale is not None and not abs(scale) < float("inf"):
        raise ValueError(message(op, "scale", scale, "a finite number, or None"))
    if deterministic not in (None, True, False):
        raise TypeError(message(op, "deterministic", repr(deterministic), "True, False or None"))
    if sinks is not None:
        check_tensors(op, q=q, sinks=sinks)
        if sinks.shape != (Hq,):
            raise ValueError(message(op, "sinks", shape_of(sinks), f"({Hq},), one a query head"))
    for name, bound in (("kv_start", kv_start), ("kv_end", kv_end)):
        if bound is None:
            continue
        rows = (of_q[0], of_q[tokens]) if ndim == 4 else (of_q[tokens],)
        check_tensors(op, (torch.int32,), **{name: bound})
        if bound.shape != rows:
            raise ValueError(message(op, name, shape_of(bound), f"{rows}, one a query row"))
        if bound.device != q.device:
            raise ValueError(message(op, name, f"on {bound.device}", f"the device of q, {q.device}"))
