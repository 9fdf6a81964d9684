"""Grouped-query attention (Ainslie et al., arXiv 2305.13245), with the whole score matrix written out."""

from __future__ import annotations

import itertools

import torch


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
    """softmax(q @ k^T * scale + mask) @ v; query head h reads key and value head h // (Hq // Hkv).

    q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    Hkv, Sq, Sk = k.shape[1], q.shape[2], k.shape[2]
    groups = (Hkv, q.shape[1] // Hkv if Hkv else 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    see = visible(Sq, Sk, is_causal, window_size, kv_start, kv_end, q.device)  # (Sq, Sk) or (B, 1, 1, Sq, Sk)
    k, v = (x.to(wide).masked_fill(unseen(see), 0) for x in (k, v))  # they may hold anything, and 0 * NaN is NaN
    s = torch.einsum("bhgid,bhjd->bhgij", q.to(wide).unflatten(1, groups), k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~see, -torch.inf)

    # One more logit a row: it takes mass and gives no value. Without sinks it is -inf and takes none.
    sink = s.new_full(groups, -torch.inf) if sinks is None else sinks.to(wide).unflatten(0, groups)
    s = torch.cat((s, sink[:, :, None, None].expand(*s.shape[:-1], 1)), -1)  # (B, Hkv, G, Sq, Sk + 1)

    m = s.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0)  # a row that sees no key: exp(-inf - 0) is 0, exp(-inf + inf) is not
    p = torch.exp(s - m)
    mass = p.sum(-1)
    empty = mass == 0
    mass = mass.masked_fill(empty, 1)
    out = torch.einsum("bhgij,bhjd->bhgid", p[..., :-1] / mass.unsqueeze(-1), v).flatten(1, 2).to(q.dtype)
    lse = (m.squeeze(-1) + mass.log()).masked_fill(empty, -torch.inf).flatten(1, 2)
    return (out, lse) if return_lse else out


def unseen(see: torch.Tensor) -> torch.Tensor:
    """Keys that no query sees, (Sk, 1) or (B, 1, Sk, 1)."""
    return ~(see if see.ndim == 2 else see[:, 0]).any(-2).unsqueeze(-1)


def visible(
    Sq: int,
    Sk: int,
    is_causal: bool,
    window_size: tuple[int, int],
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """May query i see key j? Both ends are aligned at the bottom right: query Sq - 1 stands at key Sk - 1."""
    left, right = window_size
    i = torch.arange(Sq, device=device)[:, None] + (Sk - Sq)  # (Sq, 1): the key each query stands at
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
    return see if kv_end is None else see & (j < kv_end[:, None, None, :, None])


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

    q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv) -> out (Tq, Hq, Dv), lse (Hq, Tq). Sequence b owns the query tokens
    cu_seqlens_q[b] to cu_seqlens_q[b + 1] and keys likewise; kv_start and kv_end (Tq,) count from the sequence's own
    first key. Tokens that no sequence owns give 0 and -inf.
    """
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
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
            return_lse=True,
        )
        out[rows] = o[0].transpose(0, 1)
        lse[:, rows] = l[0]
    return (out, lse) if return_lse else out


def spans(cu_seqlens: torch.Tensor, tokens: int, longest: int) -> list[slice]:
    """The tokens of each sequence, kept inside the tensor and no longer than `longest` whatever the user wrote."""
    bounds = cu_seqlens.clamp(0, tokens).tolist()
    return [slice(a, min(max(a, b), a + longest)) for a, b in itertools.pairwise(bounds)]
