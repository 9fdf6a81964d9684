"""`patch` and `unpatch`: make a model run the ops of this package, and undo it."""

from __future__ import annotations

import copy
import logging
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llama_kernels.core.checks import check_flag, message
from llama_kernels.integrations.transformers.attention import NAME
from llama_kernels.integrations.transformers.classes import KINDS, class_of
from llama_kernels.integrations.transformers.documents import FOLLOWS_MASK, forget_position_ids, note_position_ids
from llama_kernels.integrations.transformers.modules import Patched, parts_of
from llama_kernels.integrations.transformers.places import NEEDS, Place, mask_configs_in, places_in
from llama_kernels.integrations.transformers.report import NOT_REPLACED, Report, report, rows_of

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_STOCK_CONFIG = "_config_before_llama_kernels"


def patch(
    model: Model,
    *,
    attention: bool = True,
    rms_norm: bool = True,
    rope: bool = True,
    fuse: bool = True,
    strict: bool = False,
) -> Model:
    """Replace attention, RMSNorm and RoPE in this model by the ops of this package.

    The model's classes keep their own forwards. Inside them, `patch` replaces the attention function, RMSNorm modules
    and `apply_rotary_pos_emb`, each only where its code is known to compute the same. Everything else stays stock, and
    a warning names it. Parameters, state_dict, hooks, and the classes and configs of other models do not change. Call
    `patch` before `torch.compile`. With `fully_shard` either order works, but `unpatch` then needs `fully_shard` to
    come first. Patching a patched model has no effect if all that is requested was replaced before.

    Args:
        model: a Transformers model with any head, multimodal or wrapped (by PEFT, for example), on any device,
            including meta.
        attention: set attn_implementation="llama_kernels" in every part of the model that takes it.
        rms_norm: replace RMSNorm modules.
        rope: replace `apply_rotary_pos_emb`, in text decoders and vision towers.
        fuse: fuse the residual add with RMSNorm, and the norms of q and k with RoPE, where both parts are ours.
        strict: raise if a requested operation stays stock.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or a flag is neither True nor False.
        ValueError: no operation can be replaced, or, with strict, not all of them; or `model` is patched in part,
            and an operation that is requested and can be replaced is stock.
    """
    _check_model("patch", model)
    flags = {"attention": attention, "rms_norm": rms_norm, "rope": rope, "fuse": fuse, "strict": strict}
    for name, flag in flags.items():
        check_flag("patch", name, flag)
    wanted = {kind for kind, on in zip(KINDS, (attention, rms_norm, rope, fuse, fuse), strict=True) if on}
    places = [place for place in places_in(model, wanted) if place.kind in wanted]
    if _is_patched(model):
        _check_patched(model, places, strict)
        return model
    stock = Report(rows_of(place for place in places if not place.ours))
    if not any(place.ours for place in places):
        got = f"a {type(model).__name__}, in which nothing can be replaced" + (f":\n{stock}" if stock.rows else "")
        raise ValueError(message("patch", "model", got, "a Transformers model with attention, RMSNorm or RoPE"))
    if strict and stock.rows:
        got = f"a {type(model).__name__} of which this stays stock:\n{stock}\n"
        fix = "strict=False allows stock operations."
        raise ValueError(message("patch", "model", got, "a model in which everything can be replaced", fix))
    expected = [row for row in stock.rows if row.kind not in NEEDS]
    if expected:
        logger.warning(
            "llama_kernels.patch: some of this %s stays stock:\n%s", type(model).__name__, Report((*expected,))
        )
    _apply(model, [place for place in places if place.ours])
    if logger.isEnabledFor(logging.INFO):
        logger.info("llama_kernels.patch: %s\n%s", type(model).__name__, report(model))
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch` in `model`, which may be a copy of the model that was patched. Returns `model`.

    Changes of its config since `patch`, such as a new vocab_size, stay.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: the class of a patched module has changed since `patch`, as `fully_shard` changes it.
    """
    _check_model("unpatch", model)
    for module in model.modules():
        if isinstance(module, Patched) and "_kinds" not in vars(type(module)):
            got = f"with a {type(module).__name__} of classes {type(module).__bases__}"
            raise ValueError(message("unpatch", "model", got, "as patch left it", "Unpatch before fully_shard."))
    for module in model.modules():
        if isinstance(module, Patched):
            stock = parts_of(module)[1]
            for name, held in vars(module).items():
                if getattr(held, "__func__", None) is type(module).forward:  # accelerate's hooks keep and call it
                    vars(module)[name] = stock.forward.__get__(module)
            module.__class__ = stock  # type: ignore[assignment]
        module.__dict__.pop(FOLLOWS_MASK, None)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is note_position_ids]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [key for key, hook in module._forward_hooks.items() if hook is forget_position_ids]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    _restore_configs(model)
    return model


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(message(function, "model", f"a {type(model).__name__}", "a torch.nn.Module"))


# --- replacing them --------------------------------------------------------------------------------------------------


def _is_patched(model: nn.Module) -> bool:
    return any(isinstance(module, Patched) or _STOCK_CONFIG in module.__dict__ for module in model.modules())


def _check_patched(model: nn.Module, places: list[Place], strict: bool) -> None:
    """Raise unless what `patch` has replaced in this model is what is requested now, with strict at all `places`."""
    stock = [place for place in places if not _is_replaced(place) and (place.ours or strict)]
    if stock:
        rows = rows_of(place._replace(ours=False, why=NOT_REPLACED if place.ours else place.why) for place in stock)
        got = f"a {type(model).__name__} that is patched, and of which this is stock:\n{Report(rows)}\n"
        raise ValueError(message("patch", "model", got, "a model that is not patched", "Call unpatch first."))


def _is_replaced(place: Place) -> bool:
    module: Any = place.module
    if place.kind == "attention":
        return FOLLOWS_MASK in vars(module) and module.config._attn_implementation == NAME
    return isinstance(module, Patched) and place.kind in parts_of(module)[0]


def _apply(model: nn.Module, places: list[Place]) -> None:
    """Replace the operations at `places`."""
    kinds: dict[nn.Module, list[str]] = {}
    for place in places:
        kinds.setdefault(place.module, []).append(place.kind)
    attentions = [module for module, names in kinds.items() if "attention" in names]
    if attentions:
        _name_attention(model, attentions)
    for module, names in kinds.items():
        if swapped := tuple(name for name in names if name != "attention"):
            module.__class__ = class_of(type(module), swapped)


def _restore_configs(model: nn.Module) -> None:
    """Undo `_name_attention`. The model gets its own configs back, unless one has changed since: then it keeps the
    copies, with the attention function of its own, because other models may share its own."""
    copies = [
        (module, module.__dict__.pop(_STOCK_CONFIG)) for module in model.modules() if _STOCK_CONFIG in vars(module)
    ]
    changed = any(_have_changed(module.config, own) for module, own in copies)
    for module, own in copies:
        if not changed:
            module.config = own
        elif (config := cast("Any", module.config))._attn_implementation_internal == NAME:
            config._attn_implementation_internal = own._attn_implementation_internal


def _have_changed(settings: Any, own: Any) -> bool:
    try:
        return bool(_without_attention(settings) != _without_attention(own))
    except (RuntimeError, ValueError):  # there are tensors or arrays among them, which are not one bool
        return True


def _without_attention(config: Any) -> dict[str, Any]:
    """The settings of a config and of the configs in it, but for their attention functions."""
    return {
        name: _without_attention(value) if isinstance(value, PretrainedConfig) else value
        for name, value in vars(config).items()
        if name != "_attn_implementation_internal"
    }


def _name_attention(model: nn.Module, attentions: list[nn.Module]) -> None:
    """Give the model copies of its configs, with our attention in those of `attentions`. `unpatch` restores them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if isinstance(config, PretrainedConfig):
            module.__dict__[_STOCK_CONFIG] = config
            module.config = copy.deepcopy(config, memo)
    mask_configs = mask_configs_in(model)
    ours = {id(mask_configs[module]) for module in attentions}
    for module in attentions:
        for config in (module.config, mask_configs[module]):
            config._attn_implementation_internal = NAME  # the property would set it in sub-configs too
        module.__dict__[FOLLOWS_MASK] = True
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) in ours:
            module.register_forward_pre_hook(note_position_ids, with_kwargs=True)
            module.register_forward_hook(forget_position_ids, always_call=True)  # after an exception too
