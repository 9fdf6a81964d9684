"""`apply_rotary_pos_emb` in patched modules, alone and fused with the norms of q and k.

Each form of known_rotaries.py has a function here with the arguments of the stock one. It runs `rope`, or the stock
function where `rope` would give another result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from llama_kernels.integrations.transformers.known_rotaries import Rotary
from llama_kernels.integrations.transformers.modules import is_plain, keeps_dtype, norm_takes, takes
from llama_kernels.integrations.transformers.source import called_by
from llama_kernels.ops.qk_norm_rope import qk_norm_rope
from llama_kernels.ops.rope import rope

Function = Callable[..., Any]


def rotary_like(replaced: Function, known: Rotary) -> Function:
    """A function with the arguments of `replaced`, which `known` describes, that runs `rope`."""
    stock = called_by(replaced)
    ours = functools.wraps(stock)(_FORMS[known.form](known, stock))
    if stock is replaced:
        return ours
    return lambda *args, **kwargs: (replaced if is_kernelized(replaced) else ours)(*args, **kwargs)


def norm_and_rotary(replaced: Function, known: Rotary) -> Function:
    """The fusion of q_norm, k_norm and `apply_rotary_pos_emb`, for q and k (B, H, S, D) before their norms."""
    rotary = rotary_like(replaced, known)

    def apply(q_norm: Any, k_norm: Any, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        weights = (q_norm.known_weight(), k_norm.known_weight())
        if (
            known.form == "rows"
            and _norms_agree(q_norm, k_norm, weights)
            and all(norm_takes(q_norm.known, x, w) for x, w in zip((q, k), weights, strict=True))
            and _can_rotate(known, q, k, cos, sin, "BHSD")
            and not is_kernelized(replaced)
        ):
            tables = _tables(known, cos, sin)
            if not _seem_to_be_of_pairs(tables, q):
                eps, offset = getattr(q_norm, q_norm.known.eps), q_norm.known.offset
                return qk_norm_rope(
                    q, k, *weights, tables.cos, tables.sin, eps=eps, offset=offset, interleaved=known.interleaved
                )
        return rotary(q_norm(q), k_norm(k), cos, sin)

    return apply


def is_kernelized(replaced: Any) -> bool:
    """Whether `replaced` is an object of the package kernels with a forward from kernelize."""
    return isinstance(replaced, nn.Module) and "forward" in replaced.__dict__


def _norms_agree(q_norm: Any, k_norm: Any, weights: tuple[Any, Any]) -> bool:
    """Whether one call can compute both norms: they differ in their weights only."""
    known, other = q_norm.known, k_norm.known
    same_eps = getattr(q_norm, known.eps) == getattr(k_norm, other.eps)
    return known == other and same_eps and (weights[0] is None) == (weights[1] is None)


# --- a rotation of q and k -------------------------------------------------------------------------------------------

# The layouts of q and k: the order of their dimensions. "SHD" is that of vision towers, whose tokens are packed. Tables
# have a row for each token: (B, S, R), or (S, R) in "SHD". "shared" is "BHSD" whose sequences all have the same rows,
# (S, R). Stock code unsqueezes the tables in the dimension of the heads, or in that of the batch where rows are shared.
_BY_UNSQUEEZE_DIM = {0: "shared", 1: "BHSD", 2: "BSHD", -2: "SHD"}


def _layout(known: Rotary, unsqueeze_dim: Any = 1) -> str | None:
    """The layout of q and k, or None for any other. unsqueeze_dim: the caller's, where `known` does not have it."""
    return _BY_UNSQUEEZE_DIM.get(unsqueeze_dim if known.heads is None else known.heads)


def _can_rotate(known: Rotary, q: Any, k: Any, cos: Any, sin: Any, layout: str | None) -> bool:
    """Whether `rope` returns what stock code does for these arguments."""
    if not (takes(q) and takes(k) and is_plain(cos) and is_plain(sin)):
        return False
    if layout is None or q.ndim != (3 if layout == "SHD" else 4):
        return False
    H = 2 if layout == "BSHD" else 1  # the dimension of the heads
    if layout == "SHD":
        tokens = q.shape[:1]
    elif layout == "shared":
        tokens = q.shape[2:3]
    else:
        tokens = (q.shape[0], q.shape[3 - H])
    R = _rotated_width(known, cos)
    return (
        k.ndim == q.ndim
        and k.dtype == q.dtype
        and [n for d, n in enumerate(k.shape) if d != H] == [n for d, n in enumerate(q.shape) if d != H]
        and cos.ndim == len(tokens) + 1
        and sin.shape == cos.shape
        and sin.dtype == cos.dtype
        and cos.dtype.is_floating_point
        and q.device == k.device == cos.device == sin.device
        and (cos.shape[:-1] == tokens or (len(tokens) == 2 and cos.shape[:-1] == (1, tokens[1])))
        and R % 2 == 0
        and (0 < R <= q.shape[-1] if known.partial else 0 < R == q.shape[-1])
        and not (cos.requires_grad or sin.requires_grad)
        and (not known.promotes or keeps_dtype(q, cos))
    )


def _rotated_width(known: Rotary, cos: torch.Tensor) -> int:
    """R, the number of rotated elements of a head."""
    return cos.shape[-1] * (2 if known.tables == "pairs" else 1)


def _rotate(
    known: Rotary, q: Any, k: Any, cos: Any, sin: Any, layout: str | None, position_ids: Any = None, axes: Any = None
) -> Any:
    """q and k rotated, as `_can_rotate` describes them; k may be None. position_ids and axes are those of `rope`."""
    tables = _tables(known, cos, sin)
    given = [x if layout != "BSHD" else x.transpose(1, 2) for x in (q, k) if x is not None]
    interleaved = known.interleaved
    if known.sorted_first:
        given = [x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in given]
        interleaved = False
    parts, separate = given, _seem_to_be_of_pairs(tables, q)
    if separate:
        parts = [x[..., : tables.width] for x in given]
    first, second = (*parts, None)[:2]
    rotated: Any = rope(first, second, tables.cos, tables.sin, position_ids, axes=axes, interleaved=interleaved)
    if separate:
        rotated = [torch.cat((y, x[..., tables.width :]), -1) for x, y in zip(given, rotated, strict=False)]
    q, k = (*rotated, None)[:2]
    return tuple(x.transpose(1, 2) if layout == "BSHD" and x is not None else x for x in (q, k))


class _Tables(NamedTuple):
    """cos and sin for `rope`."""

    cos: torch.Tensor
    sin: torch.Tensor
    width: int  # of the part of a head that is rotated


def _tables(known: Rotary, cos: torch.Tensor, sin: torch.Tensor) -> _Tables:
    if torch.compiler.is_exporting():  # a stage of an exported pipeline gets them as tensors that require grad
        cos, sin = cos.detach(), sin.detach()
    if known.inverse:
        sin = -sin
    if known.tables == "first half":
        R = cos.shape[-1]
        return _Tables(cos[..., : R // 2], sin[..., : R // 2], R)
    return _Tables(cos, sin, _rotated_width(known, cos))


def _seem_to_be_of_pairs(tables: _Tables, q: torch.Tensor) -> bool:
    """Whether `rope` would read these tables, with an angle for each element, as if they had one for each pair."""
    return tables.cos.shape[-1] == tables.width and 2 * tables.width <= q.shape[-1]


# --- the forms of known_rotaries.py ----------------------------------------------------------------------------------


def _of_rows(known: Rotary, stock: Function) -> Function:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        layout = _layout(known, kwargs.get("unsqueeze_dim", 1))
        if args or not _can_rotate(known, q, k, cos, sin, layout):
            return stock(q, k, cos, sin, *args, **kwargs)
        return _rotate(known, q, k, cos, sin, layout)

    return rotate


def _of_complex(known: Rotary, stock: Function) -> Function:
    def rotate(xq: Any, xk: Any, freqs_cis: Any) -> Any:
        cos, sin = freqs_cis.real, freqs_cis.imag
        if not _can_rotate(known, xq, xk, cos, sin, _layout(known)):
            return stock(xq, xk, freqs_cis)
        return _rotate(known, xq, xk, cos, sin, _layout(known))

    return rotate


def _of_complex_grid(known: Rotary, stock: Function) -> Function:
    def rotate(query: Any, key: Any, freqs_ci: Any) -> Any:
        cos, sin = freqs_ci.real.squeeze(1)[None], freqs_ci.imag.squeeze(1)[None]  # (1, S, pairs)
        if not _can_rotate(known, query, key, cos, sin, _layout(known)):
            return stock(query, key, freqs_ci)
        return _rotate(known, query, key, cos, sin, _layout(known))

    return rotate


def _of_one(known: Rotary, stock: Function) -> Function:
    def rotate(x: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        layout = _layout(known, unsqueeze_dim)
        if not _can_rotate(known, x, x, cos, sin, layout):
            return stock(x, cos, sin, unsqueeze_dim)
        return _rotate(known, x, None, cos, sin, layout)[0]

    return rotate


def _of_one_sin_first(known: Rotary, stock: Function) -> Function:
    def rotate(tensor: Any, sin: Any, cos: Any) -> Any:
        if not _can_rotate(known, tensor, tensor, cos, sin, _layout(known)):
            return stock(tensor, sin, cos)
        return _rotate(known, tensor, None, cos, sin, _layout(known))[0]

    return rotate


def _of_last_elements(known: Rotary, stock: Function) -> Function:
    def rotate(x: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        layout = _layout(known, unsqueeze_dim)
        R = _rotated_width(known, cos)
        part = x[..., -R:]
        if part.shape[-1] != R or not _can_rotate(known, part, part, cos, sin, layout):
            return stock(x, cos, sin, unsqueeze_dim)
        return torch.cat((x[..., :-R], _rotate(known, part, None, cos, sin, layout)[0]), -1)

    return rotate


def _of_last_tokens(known: Rotary, stock: Function) -> Function:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        layout = _layout(known, unsqueeze_dim)
        S = q.shape[-2]
        of_q = (cos[..., -S:, :], sin[..., -S:, :])
        if not (_can_rotate(known, q, q, *of_q, layout) and _can_rotate(known, k, k, cos, sin, layout)):
            return stock(q, k, cos, sin, unsqueeze_dim)
        if _can_rotate(known, q, k, cos, sin, layout):
            return _rotate(known, q, k, cos, sin, layout)
        q, _ = _rotate(known, q, None, *of_q, layout)
        return q, _rotate(known, k, None, cos, sin, layout)[0]

    return rotate


def _of_grid(known: Rotary, stock: Function) -> Function:
    def rotate(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        tables = _shared_rows(cos), _shared_rows(sin)
        if not _can_rotate(known, q, k, *tables, "shared"):
            return stock(q, k, cos, sin)
        return _rotate(known, q, k, *tables, "shared")

    return rotate


def _of_patches(known: Rotary, stock: Function) -> Function:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, **kwargs: Any) -> Any:
        first = q.shape[-2] - cos.shape[-2]
        if first < 0 or cos.ndim != 2:
            return stock(q, k, cos, sin, **kwargs)
        tables = F.pad(cos, (0, 0, first, 0), value=1.0), F.pad(sin, (0, 0, first, 0))
        if not _can_rotate(known, q, k, *tables, "shared"):
            return stock(q, k, cos, sin, **kwargs)
        return _rotate(known, q, k, *tables, "shared")

    return rotate


def _of_memory(known: Rotary, stock: Function) -> Function:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, num_k_exclude_rope: int = 0, repeat_freqs_k: bool = False) -> Any:
        of_q = of_k = _shared_rows(cos), _shared_rows(sin)
        S, rotated = q.shape[-2], k.shape[-2] - num_k_exclude_rope
        repeated = S > 0 and repeat_freqs_k and rotated != S
        if repeated:
            of_k = of_k[0].repeat(rotated // S, 1), of_k[1].repeat(rotated // S, 1)
        if num_k_exclude_rope:
            last = (0, 0, 0, num_k_exclude_rope)
            of_k = F.pad(of_k[0], last, value=1.0), F.pad(of_k[1], last)
        can = rotated > 0 and _can_rotate(known, q, q, *of_q, "shared") and _can_rotate(known, k, k, *of_k, "shared")
        if not can:
            return stock(q, k, cos, sin, num_k_exclude_rope, repeat_freqs_k)
        if not (repeated or num_k_exclude_rope) and _can_rotate(known, q, k, *of_q, "shared"):
            return _rotate(known, q, k, *of_q, "shared")
        q, _ = _rotate(known, q, None, *of_q, "shared")
        return q, _rotate(known, k, None, *of_k, "shared")[0]

    return rotate


def _shared_rows(table: torch.Tensor) -> torch.Tensor:
    """A table (1, ..., 1, S, R) as (S, R). Any other is returned as it is."""
    return table.flatten(0, -2) if table.ndim > 2 and table.shape[:-2].numel() == 1 else table


def _of_sections(known: Rotary, stock: Function) -> Function:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, mrope_section: Any, unsqueeze_dim: int = 1) -> Any:
        layout = _layout(known, unsqueeze_dim)
        if cos.ndim != 4 or not _can_rotate(known, q, k, cos[0], sin[0], layout):
            return stock(q, k, cos, sin, mrope_section, unsqueeze_dim)
        positions = torch.arange(cos.shape[:3].numel(), device=cos.device).view(cos.shape[:3])
        plain = type(cos) is torch.Tensor and not torch.compiler.is_compiling()
        axes = (_kept_axes if plain else _axes_of)((*mrope_section,), cos.device)
        tables = cos.flatten(0, 2), sin.flatten(0, 2)  # a row for each position of each token
        return _rotate(known, q, k, *tables, layout, positions, axes)

    return rotate


def _axes_of(sections: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Which of the three positions each element of a head takes its angle from."""
    return torch.tensor([i % 3 for i, n in enumerate(sections * 2) for _ in range(n)], device=device)


@functools.cache
def _kept_axes(sections: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The same, made once: making them waits for the GPU."""
    with torch.inference_mode(False):
        return _axes_of(sections, device)


_FORMS: dict[str, Callable[[Rotary, Function], Function]] = {
    "rows": _of_rows,
    "complex": _of_complex,
    "complex grid": _of_complex_grid,
    "sections": _of_sections,
    "x, cos, sin": _of_one,
    "x, sin, cos": _of_one_sin_first,
    "last elements": _of_last_elements,
    "last tokens": _of_last_tokens,
    "grid": _of_grid,
    "patches": _of_patches,
    "memory": _of_memory,
}
