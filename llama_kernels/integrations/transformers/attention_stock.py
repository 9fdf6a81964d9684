"""Stock attention, for the calls of `attention_forward` that the kernels do not support.

These are dropout, a position_bias, output_attentions, heads too wide for a program, and masks that are not one range of
keys per query.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_kernels.core.checks import KERNEL_DTYPES, message
from llama_kernels.integrations.transformers.intervals import WindowSize, starts_in_window
from llama_kernels.integrations.transformers.modules import is_plain
from llama_kernels.integrations.transformers.packed_masks import pack_window, unpack, written_out
from llama_kernels.ops.attention.tables import fits

logger = logging.getLogger(__name__)


def why_stock(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> str | None:
    """Why the kernels do not support this call, or None where they do."""
    if dropout:
        return "dropout of attention probabilities"
    if others.get("position_bias") is not None:
        return "position_bias"
    if _wants_weights(module, others):
        return "output_attentions"
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        return "a 4-D attention_mask that is not one range of keys for each query"
    if not all(is_plain(x) for x in (query, key, value)):
        return f"a {type(query).__name__} on {query.device.type}"
    if value.dtype not in KERNEL_DTYPES:
        return str(value.dtype)
    if query.shape[-1] > 576 or value.shape[-1] > 512 or (value.is_cuda and not fits(query, value)):
        return f"heads {max(query.shape[-1], value.shape[-1])} wide"
    return None


def _wants_weights(module: nn.Module, others: dict[str, Any]) -> bool:
    """Whether the call, or the config from before the patch, asks for the attention weights, which no kernel stores."""
    config = getattr(module, "config", None)
    return bool(others.get("output_attentions") or getattr(config, "output_attentions", False))


def with_documents(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, window: WindowSize, Sq: int, Sk: int
) -> torch.Tensor | None:
    """attention_mask for stock attention: where it is a window, it also hides other documents, as the kernels do.

    window: what a query sees where attention_mask is None. position_ids: None where the mask has their documents.
    """
    if position_ids is None:
        return attention_mask
    mask = pack_window(window, position_ids.device) if attention_mask is None else attention_mask
    if mask.dtype != torch.int32 or not isinstance(seen := unpack(mask, Sq, Sk), WindowSize):
        return attention_mask
    starts = starts_in_window(position_ids, seen, Sq, Sk)
    if starts is None:
        return attention_mask
    return written_out(mask, Sq, Sk) & (torch.arange(Sk, device=mask.device) >= starts[..., None])[:, None]


def run_stock(
    reason: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    window: WindowSize,
    *,
    is_causal: bool,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    **others: Any,
) -> Any:
    """Run the call in SDPA, or in the model's eager function where it has a softcap, sinks or wants the weights, which
    SDPA lacks.

    window: what a query sees where attention_mask is None.
    """
    if not torch.compiler.is_compiling():
        _warn_of_stock(reason)
    Sq, Sk = query.shape[2], key.shape[2]
    if attention_mask is None and (window.left >= 0 or (is_causal and 1 < Sq != Sk)):
        attention_mask = pack_window(window, query.device)
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        attention_mask = written_out(attention_mask, Sq, Sk)
    eager = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    weights = eager is not None and _wants_weights(module, others)
    if softcap is None and s_aux is None and not weights:
        causal = Sq > 1 and attention_mask is None and is_causal  # not checked in Transformers 4
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, is_causal=causal, **others)
    if attention_mask is None and is_causal and Sq > 1:
        attention_mask = written_out(pack_window(WindowSize(-1, 0), query.device), Sq, Sk)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = hidden.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    if eager is None:
        fix = "Use attn_implementation='eager'."
        raise ValueError(message("attention_forward", "attention_mask", reason, "a range of keys for each query", fix))
    return eager(module, query, key, value, attention_mask, softcap=softcap, s_aux=s_aux, **others)


@functools.cache
def _warn_of_stock(reason: str) -> None:
    """Warn, once per reason."""
    logger.warning("llama_kernels: %s: stock attention (SDPA or eager) runs instead of the kernels", reason)
