"""Grouped-query attention (Ainslie et al., arXiv 2305.13245), with the whole score matrix written out."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of `attention` and its variants that do not change what kind of result they return."""

    is_causal: bool
    scale: float | None
    window_size: tuple[int, int]
    softcap: float | None
    sinks: torch.Tensor | None
    kv_start: torch.Tensor | None
    kv_end: torch.Tensor | None
    kv_prefix: torch.Tensor | None
    deterministic: bool | None


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool, **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


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
    kv_prefix: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q @ k^T * scale + mask) @ v, where query head h attends with key and value head h // (Hq // Hkv).

    Args:
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Sk, D).
        v: (B, Hkv, Sk, Dv).
        is_causal: query i sees keys j <= i + Sk - Sq.
        scale: factor of the scores. Default: 1 / sqrt(D).
        window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq + right. -1: no limit.
        softcap: c replaces each score s by c tanh(s / c) (arXiv 2408.00118, section 2). None or 0: no cap.
        sinks: (Hq,), one more score in the softmax of each row, which has no value.
        kv_start, kv_end: (B, Sq) integers: row i sees keys from kv_start[i] to kv_end[i] - 1.
        kv_prefix: (B, Sq) integers: row i also sees the first kv_prefix[i] keys, whatever else hides keys.
        return_lse: return the logarithm of each row's sum of exp(score) too, sink included.
        deterministic: has no effect here.

    Returns:
        out (B, Hq, Sq, Dv) in the dtype of q, and with return_lse also lse (B, Hq, Sq) in float32, or float64 for
        float64 q. A row that sees no key gives 0, and -inf in lse if there are no sinks.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    Hkv, Sq, Sk = k.shape[1], q.shape[2], k.shape[2]
    groups = (Hkv, q.shape[1] // Hkv if Hkv else 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    # (Sq, Sk) or (B, 1, 1, Sq, Sk)
    see = visible(Sq, Sk, is_causal, window_size, kv_start, kv_end, q.device, kv_prefix)
    k, v = (x.to(wide).masked_fill(unseen(see), 0) for x in (k, v))  # keys that no query sees may hold NaN
    s = torch.einsum("bhgid,bhjd->bhgij", q.to(wide).unflatten(1, groups), k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~see, -torch.inf)

    # A sink is one more score in each row, with no value. Without sinks it is -inf.
    sink = s.new_full(groups, -torch.inf) if sinks is None else sinks.to(wide).unflatten(0, groups)
    s = torch.cat((s, sink[:, :, None, None].expand(*s.shape[:-1], 1)), -1)  # (B, Hkv, G, Sq, Sk + 1)

    m = s.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0)  # of a row that sees no key: exp(-inf - 0) is 0, exp(-inf + inf) is NaN
    p = torch.exp(s - m)
    mass = p.sum(-1)
    empty = mass == 0
    mass = mass.masked_fill(empty, 1)
    out = torch.einsum("bhgij,bhjd->bhgid", p[..., :-1] / mass.unsqueeze(-1), v).flatten(1, 2).to(q.dtype)
    lse = (m.squeeze(-1) + mass.log()).masked_fill(empty, -torch.inf).flatten(1, 2)
    return (out, lse) if return_lse else out


def unseen(see: torch.Tensor) -> torch.Tensor:
    """The keys that no query sees, (Sk, 1) or (B, 1, Sk, 1)."""
    return ~(see if see.ndim == 2 else see[:, 0]).any(-2).unsqueeze(-1)


def visible(
    Sq: int,
    Sk: int,
    is_causal: bool,
    window_size: tuple[int, int],
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    device: torch.device,
    kv_prefix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Whether query i sees key j, bool (Sq, Sk), or (B, 1, 1, Sq, Sk) with kv_start, kv_end or kv_prefix.

    Queries are aligned with the last keys: query i is at the position of key i + Sk - Sq.
    """
    left, right = window_size
    i = torch.arange(Sq, device=device)[:, None] + (Sk - Sq)  # (Sq, 1): the position of each query
    j = torch.arange(Sk, device=device)[None, :]  # (1, Sk)
    see = torch.ones(Sq, Sk, dtype=torch.bool, device=device)
    if is_causal:
        see &= j <= i
    if right >= 0:
        see &= j <= i + right
    if left >= 0:
        see &= j >= i - left
    if kv_start is not None:
        see = see & (j >= kv_start[:, None, None, :, None])
    if kv_end is not None:
        see = see & (j < kv_end[:, None, None, :, None])
    return see if kv_prefix is None else see | (j < kv_prefix[:, None, None, :, None])


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, return_lse: Literal[False] = False, **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, return_lse: Literal[True], **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, return_lse: bool, **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


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
    kv_prefix: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` of each sequence of a packed batch.

    Args:
        q: (Tq, Hq, D).
        k: (Tk, Hkv, D).
        v: (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) integers. Sequence b is the queries cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] - 1, and likewise the keys. Values outside 0 to T are clamped.
        max_seqlen_q, max_seqlen_k: the length of the longest sequence. What is longer is cut.
        kv_start, kv_end, kv_prefix: (Tq,) integers, counted from the first key of the row's own sequence.

    The other arguments are those of `attention`.

    Returns:
        out (Tq, Hq, Dv), and with return_lse also lse (Hq, Tq). Tokens of no sequence give 0 and -inf.
    """
    # 0, by which the tensors that no sequence uses have a gradient: 0.
    nothing = sum(x[:0].sum().to(q.dtype) for x in (q, k, v, sinks) if x is not None)
    out = q.new_zeros(*q.shape[:2], v.shape[-1]) + nothing
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)) + nothing
    starts_q, starts_k = spans(cu_seqlens_q, q.shape[0], max_seqlen_q), spans(cu_seqlens_k, k.shape[0], max_seqlen_k)
    for rows, keys in zip(starts_q, starts_k, strict=True):
        o, l = attention(
            *(x[span].transpose(0, 1)[None] for x, span in ((q, rows), (k, keys), (v, keys))),  # (1, H, S, D)
            is_causal=is_causal,
            scale=scale,
            window_size=window_size,
            softcap=softcap,
            sinks=sinks,
            kv_start=None if kv_start is None else kv_start[None, rows],
            kv_end=None if kv_end is None else kv_end[None, rows],
            kv_prefix=None if kv_prefix is None else kv_prefix[None, rows],
            return_lse=True,
        )
        out[rows] = o[0].transpose(0, 1)
        lse[:, rows] = l[0]
    return (out, lse) if return_lse else out


def spans(cu_seqlens: torch.Tensor, tokens: int, longest: int) -> list[slice]:
    """The tokens of each sequence. Bounds are clamped to 0 to `tokens`, lengths to `longest`."""
    bounds = cu_seqlens.clamp(0, tokens).tolist()
    return [slice(a, min(max(a, b), a + longest)) for a, b in itertools.pairwise(bounds)]
