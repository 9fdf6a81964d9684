"""Inputs and tables of RoPE, and the check of a call: both directions against float64."""

from __future__ import annotations

import torch

import llama_kernels as lk
from tests.support.guards import guarded, guarded_allocations, memory_order, unchanged
from tests.support.ideal import eager_rope, transposed
from tests.support.judge import DTYPES, judge

TABLE_DTYPES = (*DTYPES, torch.float64)


def tables(positions: int, R: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    inv_freq, _ = lk.rope_frequencies(R)
    return lk.rope_tables(inv_freq.to(device), positions)


def unlike_tables(
    positions: int, R: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of full width: an angle for each element. The two angles of a pair differ."""
    angles = 10 * torch.randn(positions, R, device=device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def qk(B: int, Hq: int, Hkv: int, S: int, D: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """In the memory order of a projection, (B, S, H, D)."""
    return [torch.randn(B, S, H, D, device=device).to(dtype).transpose(1, 2) for H in (Hq, Hkv)]


def rows(
    x: torch.Tensor, cos: torch.Tensor, position_ids: torch.Tensor | None, axes: torch.Tensor | None = None
) -> torch.Tensor:
    """The angles of each token, of a shape to broadcast over the heads."""
    if axes is not None:
        rows_ = position_ids.long()[axes.long()].movedim(0, -1)
        cos = cos[rows_, torch.arange(axes.shape[0], device=axes.device)]
    elif cos.ndim == 2:
        position_ids = torch.arange(x.shape[-2 if x.ndim == 4 else 0]) if position_ids is None else position_ids
        cos = cos[position_ids.to(cos.device).long()]
    return cos.unsqueeze(-2 if x.ndim == 3 else -3)


def check(q, k, cos, sin, position_ids=None, *, interleaved=False, inplace=False, eager=False) -> None:
    """Judge the rotation and its gradients. In place, judge the rotation alone, which needs no graph."""
    inputs = [None if x is None else guarded(x).requires_grad_(not inplace) for x in (q, k)]
    angles = [guarded(cos), guarded(sin), None if position_ids is None else guarded(position_ids)]
    with guarded_allocations(), unchanged(*angles, *(() if inplace else inputs)):
        outs = lk.rope(*inputs, *angles, interleaved=interleaved, inplace=inplace)
    for name, x, given, out in zip("qk", (q, k), inputs, outs, strict=True):
        if x is None:
            assert out is None
            continue
        c, s = rows(x, cos, position_ids), rows(x, sin, position_ids)
        judge_rotation(name, out, x, c, s, interleaved, eager)
        if inplace:
            assert out.data_ptr() == given.data_ptr()
        else:
            dx = torch.randn_like(x)
            (grad,) = torch.autograd.grad(out, given, dx, retain_graph=True)
            judge_rotation(f"d{name}", grad, dx, c, transposed(s, x.shape[-1], interleaved), interleaved, eager)


def judge_rotation(name, K, x, cos, sin, interleaved, eager) -> None:
    truth = eager_rope(x.double(), cos.double(), sin.double(), interleaved)
    ideal = eager_rope(x.float(), cos.float(), sin.float(), interleaved).to(x.dtype)
    judge(name, K, truth, ideal, eager_rope(x, cos, sin, interleaved) if eager else None)
    assert (K.dtype, memory_order(K)) == (x.dtype, memory_order(x))


POSITIONS = {
    "a shared row": lambda B, S: torch.randperm(60)[:S],
    "one each, batch of one": lambda B, S: torch.randperm(60)[None, :S],
    "one each": lambda B, S: torch.stack([torch.randperm(60)[:S] for _ in range(B)]),
    "every second of a wider tensor": lambda B, S: torch.stack([torch.randperm(60)[: 2 * S] for _ in range(B)])[:, ::2],
}


# How a table (positions, width) may lie in memory. Its neighbours there are NaN, by guarded().
TABLE_LAYOUTS = {
    "every second column": lambda t: t.repeat_interleave(2, -1)[:, ::2],
    "columns first": lambda t: t.mT.contiguous().mT,
    "a slice of a wider table": lambda t: torch.cat((t, t), -1)[:, : t.shape[-1]],
    "a row a token, of one batch": lambda t: t[None, :13],
    "a row a token, the batch expanded": lambda t: t[None, :13].expand(2, 13, -1),
    "a row a token, every second column": lambda t: t[:26].unflatten(0, (2, 13)).repeat_interleave(2, -1)[..., ::2],
    "one row for all": lambda t: t[:1].expand(40, -1),
    "one column for all": lambda t: t[:, :1].expand(t.shape),
}


LAYOUTS = {
    "heads first": lambda x: x.contiguous(),
    "a slice of a wider head": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "odd strides": lambda x: torch.cat((x,) * 3, -1)[..., 1 : 1 + x.shape[-1]],
    "every second token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "batch innermost": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
}


# --- a packed projection ---------------------------------------------------------------------------------------------


def packed(tokens: tuple[int, ...], Hq: int, Hkv: int, D: int, dtype: torch.dtype, device) -> torch.Tensor:
    return torch.randn(*tokens, (Hq + 2 * Hkv) * D, device=device).to(dtype)


def split(qkv: torch.Tensor, Hq: int, Hkv: int, D: int) -> list[torch.Tensor]:
    """q, k and v, as views."""
    parts = qkv.unflatten(-1, (-1, D)).split((Hq, Hkv, Hkv), -2)
    return [x if qkv.ndim == 2 else x.transpose(1, 2) for x in parts]


def check_a_packed_projection(tokens, Hq, Hkv, D, R, interleaved, dtype, device):
    qkv = packed(tokens, Hq, Hkv, D, dtype, device)
    given, angles = guarded(qkv).requires_grad_(), [guarded(x) for x in tables(60, R, device)]
    position_ids = torch.randint(0, 60, tokens, device=device)
    with unchanged(given, *angles, position_ids):
        outs = lk.rope_qkv(given, Hq, Hkv, *angles, position_ids, interleaved=interleaved)
    parts = split(qkv, Hq, Hkv, D)
    dys = [torch.randn_like(x) for x in outs]
    with guarded_allocations():
        (dqkv,) = torch.autograd.grad(outs, given, dys)
    grads = split(dqkv, Hq, Hkv, D)
    for name, x, out, dy, dx in zip("qk", parts[:2], outs[:2], dys[:2], grads[:2], strict=True):
        c, s = rows(x, angles[0], position_ids), rows(x, angles[1], position_ids)
        for what, K, given_in, sin in ((name, out, x, s), (f"d{name}", dx, dy, transposed(s, D, interleaved))):
            truth = eager_rope(given_in.double(), c.double(), sin.double(), interleaved)
            judge(what, K, truth, eager_rope(given_in.float(), c, sin, interleaved).to(dtype))
            assert K.dtype == dtype
        assert sorted(range(out.ndim), key=out.stride) == sorted(range(x.ndim), key=x.stride)
    assert torch.equal(outs[2], parts[2]) and outs[2].data_ptr() == given[..., (Hq + Hkv) * D :].data_ptr()
    assert torch.equal(grads[2], dys[2])


# --- into a cache ----------------------------------------------------------------------------------------------------

SLOTS = {
    "one for all": lambda: torch.tensor([4, 0, 9]),
    "one each": lambda: torch.tensor([[4, 0, 9], [1, 2, 3]]),
    "some outside": lambda: torch.tensor([[-1, 0, 12], [2**40, 11, -(2**40)]]),
}


def check_into_a_cache(make, slots, order, interleaved, device, A: int | None = None):
    """Bit for bit what rope and a copy give; the rest of the caches stays. A: several positions a token."""
    dtype, slots = torch.bfloat16, SLOTS[slots]().to(device)
    q, k = qk(2, 6, 2, 3, 64, dtype, device)
    v = torch.randn(2, 2, 3, 48, device=device).to(dtype)
    caches = [torch.randn(2, 2, 12, D, device=device).to(dtype) for D in (64, 48)]
    caches = [x if order == "heads first" else x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]
    given, expected = [guarded(x) for x in caches], [x.clone() for x in caches]
    angles = [guarded(x) for x in make(50, 64, device)]
    position_ids, options = torch.randint(0, 50, (2, 3), device=device), {"interleaved": interleaved}
    if A is not None:
        position_ids = torch.randint(0, 50, (A, 2, 3), device=device)
        options["axes"] = torch.randint(0, A, angles[0].shape[-1:], device=device)
    with guarded_allocations(), unchanged(q, k, v, slots, position_ids, *angles):
        out = lk.rope_into_cache(q, k, v, *given, slots, *angles, position_ids, **options)
    q_, k_ = lk.rope(q, k, *angles, position_ids, **options)
    for b, row in enumerate(slots.expand(2, 3).tolist()):
        for s, slot in enumerate(row):
            if 0 <= slot < 12:
                expected[0][b, :, slot], expected[1][b, :, slot] = k_[b, :, s], v[b, :, s]
    assert torch.equal(out, q_)
    for x, cache in zip(expected, given, strict=True):
        assert torch.equal(x, cache)


# --- several positions a token ---------------------------------------------------------------------------------------


def check_axes(D, angles, axes, A, dtype, *, interleaved=False, layout=lambda x: x) -> None:
    """Judge the rotation by `axes` of A positions a token, and its gradients. layout: of position_ids, (A, B, S)."""
    device = axes.device
    q, k = qk(2, 4, 2, 13, D, dtype, device)
    made = torch.randint(0, angles[0].shape[0], (A, 2, 13), device=device)
    position_ids = layout(made)
    position_ids = position_ids.transpose(0, 2) if position_ids.shape[0] == 13 else position_ids
    given = [guarded(x).requires_grad_() for x in (q, k)]
    tables_ = [guarded(x) for x in angles]
    with guarded_allocations(), unchanged(*given, *tables_, axes, position_ids):
        outs = lk.rope(*given, *tables_, position_ids, axes=axes, interleaved=interleaved)
    c, s = (rows(q, table, position_ids, axes) for table in angles)
    for name, x, leaf, out in zip("qk", (q, k), given, outs, strict=True):
        judge_rotation(name, out, x, c, s, interleaved, False)
        dx = torch.randn_like(x)
        (grad,) = torch.autograd.grad(out, leaf, dx, retain_graph=True)
        judge_rotation(f"d{name}", grad, dx, c, transposed(s, D, interleaved), interleaved, False)
