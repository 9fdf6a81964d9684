"""Which kernel computes a call of attention, and why. The launchers ask here, and `python -m llama_kernels` prints it.

The tiles of the portable kernels are in tables.py, whose `tile_for` says which of them a call takes. CPU tensors do not
get here, except in Triton's interpreter: `core.registry.register` gives them the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_kernels.core.device import arch_of
from llama_kernels.ops.attention import decode
from llama_kernels.ops.attention.call import AttentionCall, Wanted
from llama_kernels.ops.attention.hopper import switch
from llama_kernels.ops.attention.hopper.descriptors import tokens_apart
from llama_kernels.ops.attention.hopper.gluon import HAS_GLUON, WHY_NOT
from llama_kernels.ops.attention.hopper.tables import HopperTile, tile_for_width
from llama_kernels.ops.attention.key_split import KeySplit, split_of

# The public functions that these kernels compute.
OPS = ("attention", "attention_varlen", "rope_attention")


class Choice(NamedTuple):
    """A kernel, and the reason for it."""

    kernel: str  # "portable", "decode", "masked decode" or "Hopper kernel"
    reason: str
    tile: HopperTile | None = None  # of a Hopper kernel
    split: KeySplit | None = None  # how the portable kernel splits the keys

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}" if self.tile is None else f"{self.kernel}, {self.tile}: {self.reason}"


def forward(call: AttentionCall, family: str | None = None) -> Choice:
    """The kernel for the forward of `call`. family: of GPUs; None: that of the call's device."""
    q, k, Sk = call.q, call.k, call.longest_k
    if call.cu_seqlens_q is None and decode.fits_decode(q, k) and Sk > decode.chunk_of(Sk, k.shape[1]):
        return DECODE
    if split := split_of(call):
        return Choice("portable", "few row tiles and many keys, which are split over the programs", split=split)
    if family is None and not switch.may_run("forward"):
        return PORTABLE
    return _hopper("forward", call, (q, k, call.v), family)


def backward(call: AttentionCall, do: torch.Tensor, wanted: Wanted, family: str | None = None) -> Choice:
    """The kernels for the backward of `call`, given `do`, the gradient of its output."""
    if family is None and not switch.may_run("backward"):
        return PORTABLE
    if not (wanted.dq and wanted.dk and wanted.dv):
        return Choice("portable", "not all of dq, dk and dv are wanted")
    if wanted.grad_dtype not in (None, call.q.dtype):
        return Choice("portable", f"the gradients are wanted in {str(wanted.grad_dtype)[6:]}")
    if wanted.deterministic or (wanted.deterministic is None and torch.are_deterministic_algorithms_enabled()):
        return Choice("portable", "the gradients are to repeat bit for bit")
    return _hopper("backward", call, (call.q, call.k, call.v, do), family)


def for_heads(pass_: str, family: str, D: int, dtype: torch.dtype = torch.bfloat16, Sq: int = 4096) -> Choice:
    """The kernel for a plain causal call on a GPU of `family`: dense, aligned, D wide, 4,096 keys, no other option.

    pass_: "forward" or "backward", whose gradients need not repeat bit for bit.
    """
    q, k = (torch.empty(1, H, S, D, dtype=dtype, device="meta") for H, S in ((8, Sq), (2, 4096)))
    call = AttentionCall(
        q, k, v=k, sinks=None, kv_start=None, kv_end=None, cu_seqlens_q=None, cu_seqlens_k=None, longest_q=Sq,
        longest_k=4096, scale=D**-0.5, softcap=None, left=None, right=0,
    )  # fmt: skip
    if pass_ == "forward":
        return forward(call, family)
    return backward(call, q, Wanted(dq=True, dk=True, dv=True, dsinks=False, deterministic=False), family)


DECODE = Choice("decode", "few query rows per key head and many keys, which are split over the programs")
MASKED_DECODE = Choice("masked decode", "a mask hides single keys, which no other kernel takes")
PORTABLE = Choice("portable", "no Hopper kernel is switched on")


# --- Hopper ----------------------------------------------------------------------------------------------------------


def _hopper(pass_: str, call: AttentionCall, copied: tuple[torch.Tensor, ...], family: str | None) -> Choice:
    """The Hopper kernel, or the portable one and why. copied: the tensors that the copy engine reads."""
    tile = tile_for_width(pass_, call.q.shape[-1])
    refusal = (
        _refusal(pass_, call, tile, family or arch_of(call.q.device)) or _layout_refusal(copied) or _apart_refusal(call)
    )
    if refusal or tile is None:
        return Choice("portable", str(refusal))
    return Choice("Hopper kernel", tile.record.run if tile.record and tile.measured else "switched on", tile)


def _refusal(pass_: str, call: AttentionCall, tile: HopperTile | None, family: str) -> str | None:
    """Why the Hopper kernel does not compute `call`, wherever its tensors lie in memory. None: it does."""
    D, DV, dtype = call.q.shape[-1], call.v.shape[-1], call.q.dtype
    if call.out_dtype not in (None, dtype):
        return f"out is wanted in {str(call.out_dtype)[6:]}"
    if family != "sm_90":
        return f"{family} is not Hopper"
    if not HAS_GLUON:
        return WHY_NOT
    if dtype not in (torch.bfloat16, torch.float16):
        return f"tensor cores do not multiply {str(dtype)[6:]} at full precision"
    if tile is None:
        return f"there is no Hopper kernel for head_dim {D}"
    if D != DV:
        return f"v is {DV} wide, q and k are {D}"
    if pass_ in switch.failures:
        return f"the Hopper kernel failed here: {switch.failures[pass_]}"
    if not tile.measured and not switch.hopper_attention.enabled:
        why = tile.why_off
        if tile.record is not None:
            why = f"it was measured with Triton {'.'.join(map(str, tile.record.triton))} alone"
        return f"the Hopper kernel is off, since {why}; llama_kernels.hopper_attention() switches it on"
    if call.kv_prefix is not None:
        return "kv_prefix is given"
    if _has_bounds(call):
        if pass_ == "backward":
            return "kv_start or kv_end is given"
        if not switch.hopper_attention.enabled:
            return (
                "kv_start or kv_end is given, with which the Hopper kernel has not run on a GPU; "
                "llama_kernels.hopper_attention() switches it on"
            )
    if pass_ == "backward" and call.softcap is not None and tile.width == 128:
        return "softcap needs more registers than there are at this width"
    if pass_ == "backward" and _hides_keys_from_all(call):
        return "the window may hide keys from every row, and these may be NaN"
    return None


def _has_bounds(call: AttentionCall) -> bool:
    return call.kv_start is not None or call.kv_end is not None


def _hides_keys_from_all(call: AttentionCall) -> bool:
    """Whether the window may hide the first keys of a sequence from all its rows: where keys outnumber queries."""
    if call.window.left is None:
        return False
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        # Sequences are cut off at `longest_q` and `longest_k`.
        return call.cu_seqlens_q.data_ptr() != call.cu_seqlens_k.data_ptr() or call.longest_q < call.longest_k
    return call.longest_k - call.longest_q > call.window.left


def _layout_refusal(tensors: tuple[torch.Tensor, ...]) -> str | None:
    """Why the copy engine cannot read one of these tensors. None: it reads them all."""
    for x in tensors:
        if not x.numel():
            return "a tensor is empty"
        if x.stride(-1) != 1:
            return "the last dimension is not contiguous"
        if x.data_ptr() % 16:
            return "an address is not a multiple of 16 bytes"
        for size, stride in zip(x.shape[:-1], x.stride(), strict=False):
            if size > 1 and not (stride % 8 == 0 and 0 < stride < 2**38):
                return "strides are 0 or not a multiple of 16 bytes"
        if x.shape[0 if x.ndim == 3 else 2] > 2**30:
            return "there are more than 2^30 tokens"
    return None


def _apart_refusal(call: AttentionCall) -> str | None:
    """Why k and v cannot be addressed as packed tensors, as bounds need; they have passed `_layout_refusal`."""
    if _has_bounds(call) and not call.packed and None in (tokens_apart(call.k), tokens_apart(call.v)):
        return "kv_start or kv_end is given, and the sequences of k or v do not lie a whole number of tokens apart"
    return None
