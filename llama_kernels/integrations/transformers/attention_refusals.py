"""The calls of `attention_forward` that raise, and the modules that it cannot serve."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llama_kernels.core.checks import message
from llama_kernels.integrations.transformers.definitions import definition_of
from llama_kernels.integrations.transformers.documents import FOLLOWS_MASK
from llama_kernels.integrations.transformers.packed_masks import documents_of, has_prefix, is_packed
from llama_kernels.integrations.transformers.source import decorated, global_names, passes_mask_on

# Kinds of layers whose arguments say which keys are visible; "hybrid" has full attention, and a recurrence beside it.
_BY_ARGUMENTS = ("full_attention", "sliding_attention", "attention", "hybrid")

# Models with is_causal=True in layers that get no mask and see all keys. They have eager attention only, which does not
# read is_causal.
SEES_ALL_WITHOUT_MASK = ("bridgetower_text_model",)

# --- calls that are refused ------------------------------------------------------------------------------------------


def check_layer(
    module: nn.Module, attention_mask: torch.Tensor | None, sliding_window: int | None, *, in_context_parallel: bool
) -> None:
    """Raise if no code here, stock or ours, computes what this layer is given."""
    _refuse_context_parallel_of_pytorch()
    _refuse_other_attention(module)
    _refuse_integers(attention_mask)
    if has_prefix(attention_mask):
        _refuse_local_attention(module, sliding_window, in_context_parallel)


def check_call(
    module: nn.Module,
    attention_mask: torch.Tensor | None,
    reason: str | None,
    *,
    causal: bool,
    sliding_window: int | None,
    cu_seq_lens_q: torch.Tensor | None,
    in_context_parallel: bool,
) -> None:
    """Raise if the arguments of a layer do not go together. reason: that of `why_stock`."""
    if documents_of(attention_mask) is not None:
        reason = reason or (None if causal else "is_causal=False") or _only_in_mask(module, sliding_window)
        if reason is not None:
            got = f"a model with this in an attention layer: {reason}"
            wanted = "causal attention that the kernels support, full or in a window that the layer passes on"
            raise ValueError(message("context_parallel", "model", got, wanted))
        if not in_context_parallel:
            fix = (
                "Run the backward inside context_parallel too, since it computes checkpointed layers again; or, if the "
                "mask is yours, pass attention_mask.bool()."
            )
            got = "that of a context_parallel, or integers, outside of context_parallel"
            raise ValueError(message("attention_forward", "attention_mask", got, "a mask of this call", fix))
        return
    if attention_mask is None and causal and in_context_parallel:
        fix = "If accelerate drops it, leave cp_size out of its ParallelismConfig."
        raise ValueError(message("context_parallel", "attention_mask", "missing in a layer", "that of the model", fix))
    if cu_seq_lens_q is not None:
        if reason is not None:
            wanted = "None, since stock attention does not read it"
            raise ValueError(message("attention_forward", "cu_seq_lens_q", f"given beside {reason}", wanted))
        if mask := _only_in_mask(module, sliding_window):
            got, wanted = f"given to a layer with {mask}", "None, since it replaces the mask of the layer"
            fix = "Leave it out: position_ids, with use_cache=False, also keep documents apart."
            raise ValueError(message("attention_forward", "cu_seq_lens_q", got, wanted, fix))


def _only_in_mask(module: nn.Module, sliding_window: int | None) -> str | None:
    """What only the mask of this layer says about the keys that are visible, or None: its other arguments say all."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None) or ()
    if isinstance(layer, int) and layer < len(kinds):
        kinds = (kinds[layer],)
    for kind in kinds:
        if kind not in _BY_ARGUMENTS:
            return str(kind)
    window = getattr(config, "sliding_window", None)
    if window and not sliding_window and (not kinds or "sliding_attention" in kinds):
        return f"a sliding window of {window} that it does not pass on"
    return None


def _refuse_local_attention(module: nn.Module, sliding_window: int | None, in_context_parallel: bool) -> None:
    """Raise where the mask of shared prompts would show a layer more or fewer keys than repeated prompts would."""
    if in_context_parallel:
        raise ValueError(message("share_prompts", "model", "inside context_parallel", "one process with all tokens"))
    kinds = set(getattr(getattr(module, "config", None), "layer_types", None) or ()) - {"full_attention"}
    local = f"sliding_window={sliding_window}" if sliding_window else _only_in_mask(module, sliding_window)
    if kinds or local:
        layers = ", ".join(sorted(kinds)) or f"sliding attention: {local}"
        got = f"a model with layers of {layers}"
        fix = "Repeat the prompt for each completion with this model."
        raise ValueError(message("share_prompts", "model", got, "layers that attend to all earlier tokens", fix))


def _refuse_context_parallel_of_pytorch() -> None:
    """Raise inside PyTorch's context_parallel, where key has the keys of this rank only."""
    sdpa = F.scaled_dot_product_attention  # builtin, until context_parallel replaces it with a Python function
    if isinstance(sdpa, types.FunctionType) and sdpa.__module__.startswith("torch.distributed.tensor.experimental"):
        fix = "Use attn_implementation='sdpa' with torch's context_parallel."
        got = "one rank's part of the keys, inside context_parallel"
        raise ValueError(message("attention_forward", "key", got, "all keys of the sequence", fix))


def _refuse_other_attention(module: nn.Module) -> None:
    """Raise if `why_other_attention` names a reason. In a patched module it did not."""
    if torch.compiler.is_compiling() or hasattr(module, FOLLOWS_MASK):
        return
    fix = "Use attn_implementation='eager' or 'sdpa' for this model."
    if getattr(getattr(module, "config", None), "model_type", None) in SEES_ALL_WITHOUT_MASK:
        got = f"a {type(module).__name__}, which sees all keys where it gets no mask"
        wanted = "a layer whose is_causal says what it sees without a mask"
        raise ValueError(message("attention_forward", "module", got, wanted, fix))
    if reason := why_other_attention(decorated(type(module).forward)[-1]):
        wanted = "a layer that passes its attention_mask on unchanged, and arguments that every attention function has"
        raise ValueError(message("attention_forward", "module", f"a {type(module).__name__}: {reason}", wanted, fix))


def _refuse_integers(mask: torch.Tensor | None) -> None:
    """Raise if `mask` is the caller's, of integers: neither a packed mask nor one that SDPA takes. Eager attention
    would add 0 and 1 to the scores."""
    if mask is None or mask.dtype == torch.bool or mask.is_floating_point() or is_packed(mask):
        return
    got = f"{mask.dtype} of shape {tuple(mask.shape)}"
    wanted = "bool, or numbers to add to the scores"
    raise TypeError(message("attention_forward", "attention_mask", got, wanted, "Pass attention_mask.bool()."))


# --- modules whose attention is another than ours --------------------------------------------------------------------


def why_other_attention(forward: Any) -> str | None:
    """Why the forward of a module that calls AttentionInterface computes another attention than ours, or None.

    A packed mask has no element for each query and key. Arguments that are not known, such as the sinks of each query
    in Inkling 2, would be ignored.
    """
    return _why_other_attention(forward, tuple(eager_functions(forward)))


@functools.lru_cache(maxsize=1024)  # every layer of a model with our attention by name asks in every call
def _why_other_attention(forward: Any, eager: tuple[Any, ...]) -> str | None:
    """`why_other_attention`. eager: the eager attention functions that the forward names."""
    if definition_of(forward) is None:
        return "the source of its forward is missing, or has changed since the import"
    if not passes_mask_on(forward):
        return "its forward computes with attention_mask"
    if unknown := [name for function in eager for name in _unknown_arguments(function)]:
        return f"its attention function takes {', '.join(unknown)}"
    return None


def eager_functions(forward: Any) -> list[Any]:
    """The eager attention functions that a forward names."""
    names = (name for name in sorted(global_names(forward)) if name.endswith("eager_attention_forward"))
    return [forward.__globals__[name] for name in names if name in forward.__globals__]


def _unknown_arguments(eager: Any) -> list[str]:
    """The arguments of an eager attention function that `attention_forward` does not have.

    The first five, up to the mask, are passed by position. SDPA adds position_bias.
    """
    from llama_kernels.integrations.transformers.attention import attention_forward  # which imports this file

    known = {*inspect.signature(attention_forward).parameters, "position_bias"}
    parameters = list(inspect.signature(eager).parameters.values())[5:]
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in known]
