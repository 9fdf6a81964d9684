"""`patch`, `unpatch` and `report`: make a model run the ops of this package, and say what runs in it and why."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llama_kernels.core.checks import message
from llama_kernels.integrations.transformers.attention import FOLLOWS_MASK, NAME
from llama_kernels.integrations.transformers.classes import KINDS, class_of, found_in
from llama_kernels.integrations.transformers.fusions import ADD_NORM, QK_NORM_ROPE
from llama_kernels.integrations.transformers.masks import forget_position_ids, note_position_ids
from llama_kernels.integrations.transformers.modules import Patched, parts_of

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_STOCK_CONFIG = "_config_before_llama_kernels"
_NEEDS = {ADD_NORM: ("rms_norm",), QK_NORM_ROPE: ("rms_norm", "rope")}  # the kinds that each fusion combines


class Row(NamedTuple):
    """`count` modules of class `cls` with an operation of this kind, whether ours runs in them, and why."""

    kind: str  # attention, rms_norm or rope, or a fusion of them: add_rms_norm or qk_norm_rope
    cls: str
    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    ours: bool
    why: str


class Report(NamedTuple):
    """The result of `report`. Printed, it is a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        table = [("operation", "module", "count", "runs", "why")]
        table += [(r.kind, r.cls, str(r.count), "ours" if r.ours else "stock", r.why) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in table)


class Place(NamedTuple):
    """One operation of one module, and whether ours can replace it."""

    module: nn.Module
    kind: str
    ours: bool
    why: str


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
    `patch` before `fully_shard` and before `torch.compile`. Patching a patched model has no effect.

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
        TypeError: `model` is not a torch.nn.Module.
        ValueError: no operation can be replaced, or, with strict, not all of them.
    """
    _check_model("patch", model)
    if _is_patched(model):
        return model
    wanted = {kind for kind, on in zip(KINDS, (attention, rms_norm, rope, fuse, fuse), strict=True) if on}
    places = [place for place in _places(model, wanted) if place.kind in wanted]
    stock = Report(_rows(place for place in places if not place.ours))
    if not any(place.ours for place in places):
        got = f"a {type(model).__name__}, in which nothing can be replaced" + (f":\n{stock}" if stock.rows else "")
        raise ValueError(message("patch", "model", got, "a Transformers model with attention, RMSNorm or RoPE"))
    if strict and stock.rows:
        got = f"a {type(model).__name__} of which this stays stock:\n{stock}\n"
        fix = "strict=False allows stock operations."
        raise ValueError(message("patch", "model", got, "a model in which everything can be replaced", fix))
    expected = [row for row in stock.rows if row.kind not in _NEEDS]
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
        if _STOCK_CONFIG in module.__dict__:
            module.config = module.__dict__.pop(_STOCK_CONFIG)
        module.__dict__.pop(FOLLOWS_MASK, None)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is note_position_ids]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [key for key, hook in module._forward_hooks.items() if hook is forget_position_ids]:
            del module._forward_hooks[key]
    return model


def report(model: nn.Module) -> Report:
    """Which operations of `model` are ours or stock, and why: rows, which print as a table.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    _check_model("report", model)
    now = []
    for place in _places(model, set(KINDS)):
        if place.kind == "attention":
            runs = getattr(getattr(place.module, "config", None), "_attn_implementation", None) == NAME
        else:
            runs = isinstance(place.module, Patched) and place.kind in parts_of(place.module)[0]
        why = "patch has not replaced it" if place.ours and not runs else place.why
        now.append(place._replace(ours=runs, why=why))
    return Report(_rows(now))


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(message(function, "model", f"a {type(model).__name__}", "a torch.nn.Module"))


# --- choosing operations ---------------------------------------------------------------------------------------------


def _places(model: nn.Module, wanted: set[str]) -> Iterator[Place]:
    """Every operation of the model that is of one of the kinds, in the order of its modules.

    wanted: the kinds that fusions may combine.
    """
    norms = {id(m) for m in model.modules() if _own_forward(m) is None and _found(m).get("rms_norm", (None,))[0]}
    by_config: dict[int, bool] = {}  # attention is ours in all the modules of one config, or in none
    for module in model.modules():
        if "attention" in (found := _found(module)) and hasattr(module, "config"):
            key = id(module.config)
            by_config[key] = by_config.get(key, True) and bool(found["attention"].value)
    for module in model.modules():
        found = _found(module)
        for kind in KINDS:
            if kind not in found:
                continue
            value, why, fused = found[kind]
            parts: list[Any] = [getattr(module, name, None) for name in fused]
            if fused and not any("rms_norm" in _found(part) for part in parts):
                continue  # its norms are not RMSNorm
            ours = bool(value)
            if kind == "attention":
                if ours and not hasattr(module, "config"):
                    ours, why = False, "it has no config that names its attention function"
                elif ours and not by_config[id(module.config)]:
                    ours, why = False, "another attention module of its config stays stock"
            elif ours and (own := _own_forward(module)) is not None:
                ours, why = False, own
            elif ours and kind in _NEEDS:
                if not wanted.issuperset(_NEEDS[kind]) or (kind == QK_NORM_ROPE and not found["rope"].value):
                    ours, why = False, "the operations that it combines are not ours"
                elif not all(id(part) in norms for part in parts):
                    ours, why = False, f"{' or '.join(fused)} is not a known RMSNorm"
            yield Place(module, kind, ours, why)


def _found(module: nn.Module) -> dict[str, Any]:
    return found_in(parts_of(module)[1] if isinstance(module, Patched) else type(module))


def _own_forward(module: nn.Module) -> str | None:
    """Why a module does not run the forward of its class, or None if it does."""
    if "forward" not in module.__dict__:
        return None
    return "a forward is set on the instance (by accelerate or kernelize: patch before; by a tp_plan: it stays)"


def _rows(places: Iterable[Place]) -> tuple[Row, ...]:
    counts = Counter((KINDS.index(p.kind), type(p.module).__name__, p.ours, p.why) for p in places)
    return tuple(Row(KINDS[kind], cls, n, ours, why) for (kind, cls, ours, why), n in sorted(counts.items()))


# --- replacing them --------------------------------------------------------------------------------------------------


def _is_patched(model: nn.Module) -> bool:
    return any(isinstance(module, Patched) or _STOCK_CONFIG in module.__dict__ for module in model.modules())


def _apply(model: nn.Module, places: list[Place]) -> None:
    kinds: dict[nn.Module, list[str]] = {}
    for place in places:
        kinds.setdefault(place.module, []).append(place.kind)
    attentions = [module for module, names in kinds.items() if "attention" in names]
    if attentions:
        _name_attention(model, attentions)
    for module, names in kinds.items():
        if swapped := tuple(name for name in names if name != "attention"):
            module.__class__ = class_of(type(module), swapped)


def _name_attention(model: nn.Module, attentions: list[nn.Module]) -> None:
    """Give the model copies of its configs, with our attention in those of `attentions`. `unpatch` restores them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if isinstance(config, PretrainedConfig):
            module.__dict__[_STOCK_CONFIG] = config
            module.config = copy.deepcopy(config, memo)
    ours = {id(module.config) for module in attentions}
    for module in attentions:
        config = module.config
        config._attn_implementation_internal = NAME  # the property would set it in sub-configs too
        module.__dict__[FOLLOWS_MASK] = True
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) in ours:
            module.register_forward_pre_hook(note_position_ids, with_kwargs=True)
            module.register_forward_hook(forget_position_ids)
