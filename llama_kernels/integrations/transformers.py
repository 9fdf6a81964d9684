"""Hugging Face models on our ops: `patch` one instance, `unpatch` it, or name the attention alone.

Importing this registers attn_implementation="llama_kernels", for `from_pretrained` and `set_attn_implementation`. Then
attention alone is ours, in any decoder. `patch(model)` also takes RMSNorm, the rotary embedding, and the sum before the
second norm of a layer. See docs/transformers.md for what is served.

How it works. Masks reach the kernel as ranges of keys, two int32 a row at most, made once a forward without a host
sync: no (S, S) matrix, no unpadding. A patched module is the same object with the same parameters; its class becomes a
subclass that overrides `forward` alone. Before any is swapped, a tiny twin of the model proves the result.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

try:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        PretrainedConfig,
        PreTrainedModel,
        masking_utils,
    )
    from transformers.masking_utils import causal_mask_function, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as missing:
    raise ImportError("llama_kernels.integrations.transformers needs transformers 4.57 or newer") from missing

from llama_kernels import reference
from llama_kernels.ops.attention import attention, attention_varlen
from llama_kernels.ops.qk_norm_rope import qk_norm_rope
from llama_kernels.ops.rms_norm import add_rms_norm, rms_norm
from llama_kernels.ops.rope import rope
from llama_kernels.runtime import message

__all__ = ["patch", "unpatch"]

NAME = "llama_kernels"  # of the attention; one with "flash" or "/" in it would be looked up elsewhere
logger = logging.getLogger(__name__)
_bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)  # Transformers 4 has none

# --- masks as ranges of keys -----------------------------------------------------------------------------------------


def row_ranges(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """The mask of one forward, as Transformers asks for it, for `attention_forward`.

    None: causal, and no more. Otherwise (B, 1, Sq, n) int32, of each row

        n = 1: the first key it sees; it is causal, and the last query stands at the last key, as below;
        n = 2: the first key and the one past its last, where there is padding;
        n = 3: also the one past its own, where the cache has room for more keys than are in it.

    4-D, since `generate` makes masks ahead, and Transformers takes what is 4-D for a finished one. A sliding window is
    in none of them: the layer tells it to `attention_forward`. A mask composed with functions of the caller's own is
    written out, (B, 1, Sq, Sk) bool.

    mask_function(b, h, i, j) says whether query i sees key j; attention_mask (B, keys) whether key j holds a token.
    Both leave each row one range of keys, or this raises: on a GPU as a device-side assertion, since nothing here waits
    for the GPU.
    """
    if cache_position is not None:  # Transformers 4
        device, q_length, q_offset = cache_position.device, cache_position.shape[0], cache_position[0]
        ends_together = q_length == kv_length
    else:
        ends_together = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if use_vmap:
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=True, device=device,
            allow_is_causal_skip=False,
        )  # fmt: skip
    if attention_mask is not None:  # as long as the keys: a static cache has room for more
        missing = max(kv_offset + kv_length - attention_mask.shape[-1], 0)
        attention_mask = F.pad(attention_mask.bool(), (0, missing))[:, kv_offset : kv_offset + kv_length]
        device = attention_mask.device
    if mask_function is _bidirectional:
        return None if attention_mask is None else _filled_range(attention_mask, q_length)

    first = None if _is_plain(mask_function) else _first(batch_size, kv_length, kv_offset, mask_function, device)
    keys = torch.arange(kv_length, device=device)
    starts = None if first is None else _latest(first, keys)  # (1 or B, Sk): the first key that a query at key j sees
    ends = None
    if attention_mask is not None:
        filled = torch.where(attention_mask, keys, -1).cummax(1).values  # (B, Sk): the last token up to key j
        ends = filled + 1
        again = F.pad(attention_mask[:, 1:] & ~attention_mask[:, :-1], (1, 0))  # padding ends before key j
        hole = (again[:, 1:] & (filled[:, :-1] >= (0 if starts is None else starts[:, 1:]))).any()
        torch._assert_async(~hole, "llama_kernels: attention_mask has padding between the tokens of one sequence")
        starts = _latest(again if first is None else first | again, keys)
    if ends_together:
        bounds = (bound[:, kv_length - q_length :] for bound in (starts, ends) if bound is not None)
        return None if starts is None else _ranges(batch_size, *bounds)
    own = torch.arange(q_length, device=device) + (q_offset - kv_offset)  # (Sq,): the key each query stands at
    if starts is None:
        starts = torch.zeros(1, kv_length, dtype=torch.int64, device=device)
    rows = own.clamp(0, kv_length - 1)
    past_own = (own + 1)[None]
    return _ranges(batch_size, starts[:, rows], past_own if ends is None else ends[:, rows], past_own)


def _ranges(batch_size: int, *bounds: torch.Tensor) -> torch.Tensor:
    """(B, 1, Sq, n) int32 of n bounds (1 or B, Sq)."""
    bounds = torch.broadcast_tensors(*bounds)
    return torch.stack(bounds, -1).int()[:, None].expand(batch_size, -1, -1, -1)


def _first(batch_size, kv_length, kv_offset, mask_function, device) -> torch.Tensor:
    """(B, Sk): whether a document or a chunk begins at key j, which is so where j does not see the key before."""
    b, h = torch.arange(batch_size, device=device)[:, None], torch.zeros((), dtype=torch.int64, device=device)
    keys = torch.arange(kv_offset, kv_offset + kv_length, device=device)[None]
    ahead = mask_function(b, h, keys[:, :-1], keys[:, 1:]).any()
    torch._assert_async(~ahead, "llama_kernels: this mask lets a query see the key after its own")
    return F.pad(~mask_function(b, h, keys[:, 1:], keys[:, :-1]), (1, 0))


def _latest(here: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """For each key the last one up to it where `here` is true, 0 where none is."""
    return torch.where(here, keys, 0).cummax(1).values


def _filled_range(attention_mask: torch.Tensor, q_length: int) -> torch.Tensor:
    """The keys from the first to the last that holds a token, for every row."""
    kv_length = attention_mask.shape[1]
    filled = attention_mask.int()
    first, end = filled.argmax(1), kv_length - filled.flip(1).argmax(1)  # (B,)
    tokens = filled.sum(1)
    message = "llama_kernels: attention_mask has padding between the tokens of one sequence"
    torch._assert_async(((end - first == tokens) | (tokens == 0)).all(), message)
    bounds = (bound[:, None].expand(-1, q_length) for bound in (first, torch.where(tokens == 0, 0, end)))
    return _ranges(attention_mask.shape[0], *bounds)


def _is_plain(mask_function: Callable[..., torch.Tensor]) -> bool:
    """Causal, with or without a sliding window: no range begins but at key 0. False where that cannot be told."""
    if mask_function is causal_mask_function:
        return True
    if torch.compiler.is_compiling():
        return False
    cells = getattr(mask_function, "__closure__", None) or ()
    parts = cells[0].cell_contents if len(cells) == 1 else ()
    return (
        isinstance(parts, tuple)
        and len(parts) == 2
        and parts[1] is causal_mask_function
        and getattr(parts[0], "__qualname__", "").startswith("sliding_window_overlay.")
    )


# --- attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention contract: q (B, Hq, S, D), k and v (B, Hkv, T, D) -> (out (B, S, Hq, D), None).

    attention_mask is what `row_ranges` made. cu_seq_lens_q and cu_seq_lens_k, where the caller of the model gave them,
    take precedence: the batch is then packed. Without any of these, position ids that start anew mark documents.
    Transformers looks at them in some models, and there only without a cache, which is made unless use_cache=False.
    A patched model finds the documents once, for all layers, and says where they begin.
    """
    if dropout:
        fix = "Set config.attention_dropout = 0; Llama has it so."
        raise ValueError(message("attention_forward", "dropout", dropout, "0: the kernels have no dropout", fix))
    for name in ("position_bias", "cache"):
        if others.get(name) is not None:
            raise ValueError(message("attention_forward", name, "given", "None: the kernels do not take it"))
    query, key = (x if x.dtype == value.dtype else x.to(value.dtype) for x in (query, key))
    options = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    left = -1 if sliding_window is None else sliding_window - 1
    if cu_seq_lens_q is not None:
        packed = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * S, H, D)
        lengths = (longest if isinstance(longest, int) else x.shape[0] * x.shape[2]
                   for longest, x in ((max_length_q, query), (max_length_k, key)))  # fmt: skip
        ends = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
        out = attention_varlen(*packed, *ends, *lengths, is_causal=causal, window_size=(left, -1), **options)
        return out.unflatten(0, (query.shape[0], query.shape[2])), None

    if attention_mask is not None and attention_mask.dtype != torch.int32:
        return _with_mask_written_out(module, query, key, value, attention_mask, scaling, options)
    if sliding_window is not None and not causal:
        fix = "attn_implementation='sdpa' has both."
        raise ValueError(message("attention_forward", "sliding_window", sliding_window, "None, or causal", fix))
    if attention_mask is None and causal and query.shape[2] == key.shape[2]:
        attention_mask = _documents(position_ids) if documents is None else documents
    if attention_mask is None:
        out = attention(query, key, value, is_causal=causal, window_size=(left, -1), **options)
        return out.transpose(1, 2), None
    kv_start, *kv_ends = attention_mask[:, 0].expand(query.shape[0], -1, -1).unbind(-1)  # (B, Sq) each
    if not kv_ends:
        out = attention(query, key, value, window_size=(left, -1), kv_start=kv_start, **options)
    else:
        if len(kv_ends) == 2 and sliding_window is not None:  # queries do not stand where the kernel has its windows
            kv_start, left = torch.maximum(kv_start, kv_ends[1] - sliding_window), -1
        out = attention(
            query, key, value, is_causal=False, window_size=(left, -1), kv_start=kv_start, kv_end=kv_ends[0], **options
        )
    return out.transpose(1, 2), None


def _documents(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """As `row_ranges`: position_ids (1 or B, S) go up by one but where the next document of a row begins."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return None
    first = F.pad(position_ids[:, 1:] - position_ids[:, :-1] != 1, (1, 0))
    keys = torch.arange(position_ids.shape[1], device=position_ids.device)
    return _ranges(position_ids.shape[0], _latest(first, keys))


def _with_mask_written_out(module, query, key, value, attention_mask, scaling, options):
    """Any mask at all, by Transformers' own SDPA: the kernels take ranges."""
    if options["softcap"] is not None or options["sinks"] is not None:
        fix = "Give a 2-D attention_mask, or use attn_implementation='eager'."
        got = f"of shape {tuple(attention_mask.shape)}"
        raise ValueError(message("attention_forward", "attention_mask", got, "a range of keys a row", fix))
    _warn_of_written_out_mask()
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling)


@functools.cache
def _warn_of_written_out_mask() -> None:
    logger.warning("attention_mask is 4-D: PyTorch's SDPA runs in place of llama_kernels, which takes ranges of keys")


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, row_ranges)

# --- modules ---------------------------------------------------------------------------------------------------------


class _Patched:
    """Base of what overrides `forward` in a patched module. Its class is made on the fly: pickling names the parts."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        ours, stock = _bases_of(self)
        return (_new_patched, (stock, ours), *super().__reduce_ex__(2)[2:])


def _bases_of(module: _Patched) -> tuple[type[_Patched], type[nn.Module]]:
    """What overrides forward, and the class that `module` had."""
    ours, *stock = type(module).__bases__
    if not issubclass(ours, _Patched) or len(stock) != 1:  # FSDPModule and a patched class
        got = f"with a {type(module).__name__} of classes {type(module).__bases__}"
        raise ValueError(message("unpatch", "model", got, "as patch left it", "Unpatch before fully_shard."))
    return ours, stock[0]


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_old_forward" in module.__dict__:  # accelerate's hooks (device_map) call this in place of the class's
        module._old_forward = types.MethodType(cls.forward, module)


@functools.cache
def _patched_class(stock: type[nn.Module], ours: type[_Patched]) -> type[nn.Module]:
    return type(stock.__name__, (ours, stock), {"__module__": stock.__module__, "__qualname__": stock.__qualname__})


def _new_patched(stock: type[nn.Module], ours: type[_Patched]) -> nn.Module:
    patched = _patched_class(stock, ours)
    return patched.__new__(patched)


class RMSNorm(_Patched):
    offset = 0.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, _eps_of(self), offset=self.offset)


class GemmaRMSNorm(RMSNorm):
    """Its weights are stored less one."""

    offset = 1.0


class Rotary(_Patched):
    """What `Attention` takes: cos and sin (1 or B, S, R/2), float32 whatever the model's dtype, and the documents."""

    repeated = False

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        cos, sin = super().forward(x.new_empty(0, dtype=torch.float32), position_ids, *args, **kwargs)
        if self.repeated:
            cos, sin = (angles[..., : angles.shape[-1] // 2] for angles in (cos, sin))
        return cos, sin, _documents(position_ids)


class RepeatedRotary(Rotary):
    """The stock forward says everything twice, once for each half of a head."""

    repeated = True


class Attention(_Patched):
    """One forward for the whole family: what a layer has (q_norm and k_norm, window, softcap, sinks) it uses."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = hidden_states.shape[:-1]  # (B, S)
        q, k, v = (
            projection(hidden_states).view(*tokens, -1, self.head_dim)  # (B, S, H, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        norms = (self.q_norm, self.k_norm) if hasattr(self, "q_norm") else None
        together = norms is not None and _norm_heads_alike(*norms, self.head_dim)
        if norms is not None and not together:
            q, k = norms[0](q), norms[1](k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, S, D), in the same memory
        cos, sin, documents = position_embeddings
        if together:
            weights, options = (norm.weight for norm in norms), {"eps": _eps_of(norms[0]), "offset": norms[0].offset}
            q, k = qk_norm_rope(q, k, *weights, cos, sin, **options)
        else:
            q, k = rope(q, k, cos, sin)
        if past_key_values is not None:
            where = ()
            if "cache_position" in kwargs:  # Transformers 4
                where = ({"cache_position": kwargs["cache_position"]},)
            k, v = past_key_values.update(k, v, self.layer_idx, *where)
        attend = self._attend()
        if attend is attention_forward:
            kwargs["documents"] = documents
        out, weights = attend(
            self, q, k, v, attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self._window(),
            softcap=getattr(self, "attn_logit_softcapping", None),
            s_aux=getattr(self, "sinks", None),
            **kwargs,
        )  # fmt: skip
        return self.o_proj(out.reshape(*tokens, -1)), weights

    def _attend(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
        """Ours, unless somebody named another implementation since, for its attention weights perhaps."""
        implementation = self.config._attn_implementation
        if implementation == NAME:
            return attention_forward
        if implementation in ALL_ATTENTION_FUNCTIONS:
            return ALL_ATTENTION_FUNCTIONS[implementation]
        return sys.modules[type(self).__module__].eager_attention_forward

    def _window(self) -> int | None:
        if hasattr(self, "sliding_window"):
            return self.sliding_window
        return getattr(self.config, "sliding_window", None)  # Mistral


class DecoderLayer(_Patched):
    """The first sum goes into the second norm: one pass over the rows in place of two, of the same bits."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        norm = self.post_attention_layernorm
        hidden_states, residual = add_rms_norm(hidden_states, residual, norm.weight, _eps_of(norm), offset=norm.offset)
        hidden_states = self.mlp(hidden_states)
        if isinstance(hidden_states, tuple):  # a mixture of experts, with its router's scores
            hidden_states = hidden_states[0]
        return residual + hidden_states


def _norm_heads_alike(q_norm: nn.Module, k_norm: nn.Module, head_dim: int) -> bool:
    """Whether one call may do what both modules do: norms of ours that differ in their weights alone, and that nobody
    watches (sharding and offloading bring a weight in when its module is called)."""
    norms = (q_norm, k_norm)
    return (
        all(isinstance(norm, RMSNorm) and norm.weight.shape == (head_dim,) for norm in norms)
        and (_eps_of(q_norm), q_norm.offset) == (_eps_of(k_norm), k_norm.offset)
        and not any(norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__ for norm in norms)
    )


def _eps_of(norm: nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


# --- patch and unpatch -----------------------------------------------------------------------------------------------


def patch(model: nn.Module) -> nn.Module:
    """Put our ops under this one model: attention, RMSNorm, RoPE, and the sum before the second norm of a layer.

    Parameters, state_dict, hooks and the classes that other models use stay as they are; deepcopy, pickle, saving,
    PEFT, gradient checkpointing, torch.compile and FSDP2 work as before. Patch before `fully_shard` and before
    `torch.compile`. Whatever shares the model's config keeps it: the patched model gets a copy until `unpatch`.

    First a twin of the model, of a few small layers on the CPU, runs stock and patched; what does not compute the same
    there is left as it is, and a warning says so. Patching a patched model changes nothing.

    Args:
        model: a Transformers decoder with rotary embeddings (Llama, Mistral, Qwen2, Qwen3, Gemma, GPT-OSS and
            relatives), with any head, or wrapped, by PEFT say.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        ValueError: there is no such decoder in it, or more than one, or its twin fails even with our attention alone.
    """
    decoder = _decoder_of(model)
    if any(isinstance(module, _Patched) for module in decoder.modules()):
        return model
    plan = _plan(type(decoder), decoder.config)
    swapped = _swap(decoder, plan)
    _name_attention(model, decoder)
    logger.info("patched %s: attention, %s", type(model).__name__,
                ", ".join(f"{count} {name}" for name, count in swapped.items()))  # fmt: skip
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Take our ops out of `model` again, or of a copy of one that was patched. Returns `model`.

    Raises:
        ValueError: a patched module has been wrapped in a class of its own since, as `fully_shard` does it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message("unpatch", "model", f"a {type(model).__name__}", "a torch.nn.Module"))
    stock = {module: _bases_of(module)[1] for module in model.modules() if isinstance(module, _Patched)}
    for module in model.modules():
        if module in stock:
            _become(module, stock[module])
        if _STOCK_CONFIG in module.__dict__:
            module.config = module.__dict__.pop(_STOCK_CONFIG)
    return model


_STOCK_CONFIG = "_config_before_llama_kernels"


class Plan(NamedTuple):
    """What of a family is swapped, and what its rotary embedding returns."""

    parts: tuple[str, ...]
    rotary: type[Rotary]


# Tried one after another until the twin agrees. The fused layer needs our norm.
_CHOICES = (
    ("RMSNorm", "Attention", "DecoderLayer"), ("RMSNorm", "Attention"), ("RMSNorm", "DecoderLayer"), ("RMSNorm",),
    ("Attention",), (),
)  # fmt: skip


def _decoder_of(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, nn.Module):
        raise TypeError(message("patch", "model", f"a {type(model).__name__}", "a torch.nn.Module"))
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel) and hasattr(m, "rotary_emb")]
    if len(found) != 1:
        names = " and ".join(type(m).__name__ for m in found) or "no decoder with rotary embeddings"
        fix = "attn_implementation='llama_kernels' alone asks for less." if found else ""
        raise ValueError(message("patch", "model", f"a {type(model).__name__} with {names}", "one text decoder", fix))
    return found[0]


def _name_attention(model: nn.Module, decoder: PreTrainedModel) -> None:
    """Give the model a config of its own that names our attention; `unpatch` brings the old one back."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PretrainedConfig):
            module.__dict__[_STOCK_CONFIG] = config
            module.config = copy.deepcopy(config, memo)
    decoder.config._attn_implementation = NAME


def _swap(decoder: nn.Module, plan: Plan) -> dict[str, int]:
    """Swap the classes that `plan` names, all or none. Returns how many of each."""
    chosen = [(name, module, _ours_for(module, decoder, plan)) for name, module in decoder.named_modules()]
    chosen = [(name, module, ours) for name, module, ours in chosen if ours is not None]
    for name, module, _ in chosen:
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            fix = "Patch before what put it there (kernelize, use_kernels=True)."
            raise ValueError(message("patch", "model", f"with a forward of its own at {name}", "the class's", fix))
    counts: dict[str, int] = {}
    for _, module, ours in chosen:
        _become(module, _patched_class(type(module), ours))
        counts[ours.__name__] = counts.get(ours.__name__, 0) + 1
    return counts


def _ours_for(module: nn.Module, decoder: nn.Module, plan: Plan) -> type[_Patched] | None:
    if "RMSNorm" in plan.parts and type(module).__name__.endswith("RMSNorm"):
        return _norm_like(type(module))
    if "Attention" in plan.parts:
        if module is decoder.rotary_emb:
            return plan.rotary
        if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "layer_idx")):
            return Attention
    children = {name for name, _ in module.named_children()}
    if "DecoderLayer" in plan.parts and children == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return DecoderLayer
    return None


@functools.cache
def _norm_like(stock: type[nn.Module]) -> type[RMSNorm] | None:
    """Which of our norms computes what `stock` does, found by asking it: tiny rows too, where eps decides."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            norm = stock(48, eps=1e-5).float()
            with torch.no_grad():
                norm.weight.uniform_(0.5, 1.5)
                x = torch.randn(4, 48) * torch.tensor([1e-3, 1e-2, 1.0, 30.0])[:, None]
                expected = norm(x)
            for ours in (RMSNorm, GemmaRMSNorm):
                y = reference.rms_norm(x, norm.weight.detach(), _eps_of(norm), offset=ours.offset)
                if torch.allclose(y, expected, rtol=1e-5, atol=1e-6):
                    return ours
        except (TypeError, AttributeError, RuntimeError):
            pass
    logger.warning("%s is no RMSNorm that llama_kernels knows: left as it is", stock.__name__)
    return None


# --- the twin --------------------------------------------------------------------------------------------------------


def _plan(family: type[PreTrainedModel], config: PretrainedConfig) -> Plan:
    """How much of `family` can be swapped: the most that leaves the hidden states of a small model what they were."""
    tiny = _tiny(config)
    return _proven(family, _Frozen(tiny.to_json_string(use_diff=False), tiny))


class _Frozen(NamedTuple):
    """A config as a key of a cache: by its text."""

    text: str
    config: PretrainedConfig

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self.text == other.text


@functools.cache
def _proven(family: type[PreTrainedModel], frozen: _Frozen) -> Plan:
    with _quiet_cpu():
        twin = family(copy.deepcopy(frozen.config)).eval()
        for parameter in twin.parameters():  # norms of ones and biases of zeros would hide what they do
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        ids = torch.randint(3, 60, (2, 9))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0

        def run(model: PreTrainedModel) -> torch.Tensor:
            return model(ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]

        expected = run(twin)
        rotary = _rotary_like(twin)
        for parts in _CHOICES:
            plan = Plan(parts, rotary)
            patched = copy.deepcopy(twin)
            _swap(patched, plan)
            patched.config._attn_implementation = NAME
            try:
                off = (run(patched) - expected).abs().max() / expected.abs().max()
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # of another build altogether
                continue
            if off < 1e-4:
                left = [part for part in _CHOICES[0] if part not in parts]
                if left:
                    logger.warning("%s: %s left as it is, since ours computes something else", family.__name__,
                                   " and ".join(left))  # fmt: skip
                return plan
    raise ValueError(
        message("patch", "model", f"a {family.__name__}", "a decoder whose attention is q, k, v and a mask")
    )


@contextlib.contextmanager
def _quiet_cpu() -> Iterator[None]:
    """Where a twin lives: on the CPU, in float32, outside autograd and autocast, and without moving the user's seed."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(dtype)


def _rotary_like(twin: PreTrainedModel) -> type[Rotary]:
    positions = torch.arange(4)[None]
    kinds = getattr(twin.config, "layer_types", None) or [None]
    try:
        cos, _ = twin.rotary_emb(torch.zeros(1), positions)
    except TypeError:  # a table for each kind of layer
        cos, _ = twin.rotary_emb(torch.zeros(1), positions, kinds[0])
    half = cos.shape[-1] // 2
    return RepeatedRotary if torch.equal(cos[..., :half], cos[..., half:]) else Rotary


def _tiny(config: PretrainedConfig) -> PretrainedConfig:
    """The same family in small: as many layers as it takes to have one of each kind, the head width as it is."""
    tiny = copy.deepcopy(config)
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    Hkv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or [None] * min(2, config.num_hidden_layers)
    layers = max(kinds.index(kind) for kind in set(kinds)) + 1
    heads = (4, min(2, Hkv)) if Hkv < config.num_attention_heads else (2, 2)
    small = {
        "num_hidden_layers": max(layers, 1), "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "hidden_size": heads[0] * D, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 64,
        "vocab_size_per_layer_input": 64, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for name, value in small.items():
        if getattr(tiny, name, None) is not None:
            setattr(tiny, name, value)
    if kinds[0] is not None:
        tiny.layer_types = kinds[:layers]
    for name in ("sliding_window", "attention_chunk_size"):  # shorter than the twin's sequence, so that it matters
        if getattr(tiny, name, None) is not None:
            setattr(tiny, name, 5)
    if hasattr(tiny, "quantization_config"):
        del tiny.quantization_config
    tiny._attn_implementation = "eager"
    return tiny
