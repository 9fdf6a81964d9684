"""One attention call as a structure, dense and packed alike: `AttentionCall`, and what a backward adds to it.

The registered op builds it once, of its own arguments; launchers, reference and shape functions take it whole. What the
kernels are launched with, such as sizes, scoring and window, is derived from it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from llama_kernels.core.tensors import empty_in_order_of, next_power_of_2, require_contiguous, sizes_of

# --- what the kernels are launched with ------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """The sizes of a call. Packed, Sq and Sk count the tokens of all sequences."""

    B: int  # sequences
    Hq: int
    group: int  # query heads per key head
    Sq: int
    Sk: int
    longest_q: int  # the length of the longest sequence of queries; dense, Sq
    longest_k: int

    @property
    def Hkv(self) -> int:
        return self.Hq // self.group

    def as_arguments(self) -> Sizes:
        """The sizes as the kernels take them: Sk, longest_q and longest_k less 2^31, which tiles.py's `length` adds.

        Triton makes an integer argument of 1 a constant. With a length known to be 1 or less, loops and branches fold
        into code on which ptxas crashes (Triton 3.6, sm_90, D = 32 and 64). A negative number is never 1, and still
        shows the compiler a multiple of 16, which @triton.jit's do_not_specialize would hide. It is not -n, since ptxas
        drops the minus in min(min(-n, x), y), see bench/codegen/dropped_signs.py. Sq stays as it is: at D = 128 there
        is no register left for more.
        """
        return self._replace(**{name: getattr(self, name) - 2**31 for name in ("Sk", "longest_q", "longest_k")})


class Scoring(NamedTuple):
    """From qk = q @ k^T to logits: s = softcap * tanh(qk * prescale / softcap), and exp(logit) is exp2(s * unit)."""

    scale: float  # of the call; the gradients of q and k are multiplied by it
    prescale: float | None  # None: s is qk, and `unit` includes the scale, which then costs no instruction
    softcap: float | None  # None: s is not capped
    unit: float  # from s to the logit in base 2


class Window(NamedTuple):
    """How many keys a query sees before and after its own position; None: all of them. right=0 is causal."""

    left: int | None
    right: int | None


# --- the call --------------------------------------------------------------------------------------------------------


class AttentionCall(NamedTuple):
    """The arguments of `llama_kernels::attention_forward`, in their order."""

    q: torch.Tensor  # (B, Hq, Sq, D), or packed (Tq, Hq, D)
    k: torch.Tensor  # (B, Hkv, Sk, D), or packed (Tk, Hkv, D)
    v: torch.Tensor  # (B, Hkv, Sk, Dv), or packed (Tk, Hkv, Dv)
    sinks: torch.Tensor | None  # (Hq,)
    kv_start: torch.Tensor | None  # (B, Sq) int32, or packed (Tq,); likewise kv_end
    kv_end: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None  # (B + 1,) int32; None: dense
    cu_seqlens_k: torch.Tensor | None
    longest_q: int  # Sq, or packed the length of the longest sequence of queries; likewise longest_k
    longest_k: int
    scale: float
    softcap: float | None
    left: int | None  # of the window
    right: int | None
    out_dtype: torch.dtype | None = None  # of out; None: that of q
    kv_prefix: torch.Tensor | None = None  # in the shape of kv_start: how many first keys each row also sees

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def sizes(self) -> Sizes:
        _, Hq, Sq = sizes_of(self.q)
        _, Hkv, Sk = sizes_of(self.k)
        return Sizes(self.sequences, Hq, max(Hq // max(Hkv, 1), 1), Sq, Sk, self.longest_q, self.longest_k)

    @property
    def scoring(self) -> Scoring:
        log2e = math.log2(math.e)
        if self.softcap is None and self.scale > 0:
            return Scoring(self.scale, None, None, self.scale * log2e)
        return Scoring(self.scale, self.scale, self.softcap, log2e)

    @property
    def window(self) -> Window:
        """Without the sides that hide no key of any sequence: for them no mask is computed."""
        left = None if self.left is None or self.left >= self.longest_k - 1 else self.left
        right = None if self.right is None or self.right >= self.longest_q - 1 else self.right
        return Window(left, right)

    @property
    def widths(self) -> dict[str, int]:
        """The kernels' compile-time widths: of a head of q and k, of v, and the powers of two that hold them."""
        D, DV = self.q.shape[-1], self.v.shape[-1]
        return {"D": D, "DV": DV, "BLOCK_D": width_class(D), "BLOCK_DV": width_class(DV)}

    @property
    def bound_strides(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Strides of kv_start, kv_end and kv_prefix: of batch, head (all heads share them) and token."""
        return _bound_strides(self.kv_start), _bound_strides(self.kv_end), _bound_strides(self.kv_prefix)

    @property
    def has_options(self) -> bool:
        """Whether options are on that take registers in the forward and in dq."""
        options = (self.softcap, self.kv_start, self.kv_end, self.kv_prefix)
        return self.limits_left or any(x is not None for x in options)

    @property
    def limits_left(self) -> bool:
        """Whether the window has a left side that counts where a tile is chosen.

        It counts where it hides a key. In a packed batch that would depend on the longest sequence, and with it the
        tile, and so the bits of the others. There it always counts.
        """
        return (self.left if self.packed else self.window.left) is not None

    def require_contiguous_vectors(self) -> None:
        """Raise NotContiguous unless the tensors that the kernels read without a stride are contiguous."""
        require_contiguous(self.sinks, self.cu_seqlens_q, self.cu_seqlens_k)


class Wanted(NamedTuple):
    """What a backward is to compute."""

    dq: bool
    dk: bool
    dv: bool
    dsinks: bool
    deterministic: bool | None = None  # as in `llama_kernels.attention`
    grad_dtype: torch.dtype | None = None  # of dq, dk and dv; None: that of q


class Results(NamedTuple):
    """What the forward returned, and the gradients of it.

    The keys of the call may be a part of those that out and lse belong to. The backward then gives this part's
    gradients, and its share of dq.
    """

    out: torch.Tensor
    lse: torch.Tensor
    do: torch.Tensor
    dlse: torch.Tensor | None


class RowInputs(NamedTuple):
    """What the kernels of dq, dk and dv read of the query rows beside q. delta.py has the formulas and the padding."""

    do: torch.Tensor  # the gradient of out
    lse2: torch.Tensor  # (B, Hq, padded Sq), or packed (Hq, padded Tq), float32; likewise delta
    delta: torch.Tensor


class Grads(NamedTuple):
    """The gradients that the kernels write, in the shapes of q, k and v; None where one is not wanted."""

    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None


# --- shapes and strides ----------------------------------------------------------------------------------------------


@functools.cache
def width_class(D: int) -> int:
    """The columns of a tile that holds a head of width D: a power of two, at least 16."""
    return max(next_power_of_2(D), 16)


def far(*tensors: torch.Tensor) -> bool:
    """Whether offsets inside a tile of at most 256 rows need 64 bits, because a stride between rows is so large."""
    return any(x.stride(-2 if x.ndim == 4 else 0) >= 2**23 for x in tensors)


def lse_strides(lse: torch.Tensor) -> tuple[int, ...]:
    """Of batch, head and token of (B, Hq, Sq) or packed (Hq, Tq)."""
    return lse.stride() if lse.ndim == 3 else (0, *lse.stride())


def _bound_strides(bound: torch.Tensor | None) -> tuple[int, int, int] | None:
    if bound is None:
        return None
    return (bound.stride(0), 0, bound.stride(1)) if bound.ndim == 2 else (0, 0, bound.stride(0))


# --- results ---------------------------------------------------------------------------------------------------------


def empty_outputs(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """out in q's memory order with v's width, and lse (B, Hq, Sq) or (Hq, Tq), float32."""
    q, shape = call.q, call.q.shape
    out = empty_in_order_of(q, (*shape[:-1], call.v.shape[-1]), call.out_dtype)
    return out, q.new_empty(shape[:-1] if len(shape) == 4 else (shape[1], shape[0]), dtype=torch.float32)


def outputs_to_fill(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """`empty_outputs`; in a packed call they hold 0 and -inf, as for tokens that no sequence owns."""
    out, lse = empty_outputs(call)
    if call.packed:
        out.zero_()
        lse.fill_(-math.inf)
    return out, lse


def empty_grads(call: AttentionCall, wanted: Wanted) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dsinks, each in its tensor's memory order; without elements where it is not wanted."""
    tensors, dtype = (call.q, call.k, call.v), wanted.grad_dtype
    pairs = zip(tensors, (wanted.dq, wanted.dk, wanted.dv), strict=True)
    grads = (empty_in_order_of(x, dtype=dtype) if need else x.new_empty(0) for x, need in pairs)
    sinks = call.sinks if wanted.dsinks else None
    return *grads, call.q.new_empty(0) if sinks is None else empty_in_order_of(sinks)
