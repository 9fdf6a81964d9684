"""The operations of a model, one by one, and which of them `patch` can replace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_kernels.integrations.transformers import source
from llama_kernels.integrations.transformers.attention import NAME
from llama_kernels.integrations.transformers.attention_refusals import SEES_ALL_WITHOUT_MASK, eager_functions
from llama_kernels.integrations.transformers.classes import KINDS, found_in
from llama_kernels.integrations.transformers.fusions import ADD_NORM, QK_NORM_ROPE
from llama_kernels.integrations.transformers.masks import COMPUTED_MASKS
from llama_kernels.integrations.transformers.modules import Patched

NEEDS = {ADD_NORM: ("rms_norm",), QK_NORM_ROPE: ("rms_norm", "rope")}  # the kinds that each fusion combines


class Place(NamedTuple):
    """One operation of one module, and whether ours can replace it."""

    module: nn.Module
    kind: str
    ours: bool
    why: str


def places_in(model: nn.Module, wanted: set[str]) -> Iterator[Place]:
    """Every operation of the model that is of one of the kinds, in the order of its modules.

    wanted: the kinds that fusions may combine.
    """
    norms = {id(module) for module in model.modules() if own_forward(module) is None and _is_known_norm(module)}
    mask_configs = mask_configs_in(model)
    others: dict[nn.Module, str | None] = {}  # why the attention function of a module may not be ours
    by_config: dict[int, bool] = {}  # attention is ours in all the modules whose masks one config makes, or in none
    for module in model.modules():
        if "attention" in (found := found_of(module)) and hasattr(module, "config"):
            key = id(mask_configs[module])
            others[module] = _other_function(module)
            by_config[key] = by_config.get(key, True) and bool(found["attention"].value) and others[module] is None
    for module in model.modules():
        found = found_of(module)
        for kind in KINDS:
            if kind not in found:
                continue
            value, why, fused = found[kind]
            parts: list[Any] = [getattr(module, name, None) for name in fused]
            if fused and not (isinstance(module, Patched) or any("rms_norm" in found_of(part) for part in parts)):
                continue  # its norms are not RMSNorm
            ours = bool(value)
            if kind == "attention":
                model_type = getattr(getattr(module, "config", None), "model_type", None)
                if ours and model_type in COMPUTED_MASKS:
                    ours, why = False, "other code of the model computes with the mask"
                elif ours and model_type in SEES_ALL_WITHOUT_MASK:
                    ours, why = False, "without a mask its layers see all keys, also with is_causal=True"
                elif ours and not hasattr(module, "config"):
                    ours, why = False, "it has no config that names its attention function"
                elif ours and others[module] is not None:
                    ours, why = False, others[module]
                elif ours and not by_config[id(mask_configs[module])]:
                    ours, why = False, "another attention module of its config stays stock"
            elif ours and (own := own_forward(module)) is not None:
                ours, why = False, own
            elif ours and kind in NEEDS:
                if not wanted.issuperset(NEEDS[kind]) or (kind == QK_NORM_ROPE and not found["rope"].value):
                    ours, why = False, "the operations that it combines are not ours"
                elif not all(id(part) in norms for part in parts):
                    ours, why = False, f"{' or '.join(fused)} is not a known RMSNorm"
            yield Place(module, kind, ours, why)


def _other_function(module: Any) -> str | None:
    """Why the attention that the config of a module names may compute something else than ours, or None.

    A function that is not of Transformers may read arguments of its own, as that of TRL's AsyncGRPOTrainer reads a tree
    of completions, or the keys of other processes. So may one that was registered under a name of Transformers, or that
    took the place of a model's eager function.
    """
    name = getattr(module.config, "_attn_implementation", None)
    if name == NAME:
        return None
    for kind, functions in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
        function = functions.get(name)
        if function is not None and not _is_of(function, "transformers"):
            return f"the {kind} function of attn_implementation={name!r} is {source.name_of(function)}"
    if name == "eager":
        forward = source.decorated(module._stock_forward if isinstance(module, Patched) else type(module).forward)[-1]
        package = source.module_of(forward).split(".")[0]  # that of the model, which may have an eager function too
        for function in eager_functions(forward):
            if not (_is_of(function, "transformers") or _is_of(function, package)):
                return f"its eager attention function is {source.name_of(function)}"
    return None


def _is_of(function: Any, package: str) -> bool:
    """Whether `function` is of `package`. PyTorch may wrap it, as torch.compiler.disable does."""
    *wrappers, wrapped = (source.module_of(each).split(".")[0] for each in source.chain_of(function))
    return wrapped == package and {*wrappers} <= {"torch", package}


def mask_configs_in(model: nn.Module) -> dict[nn.Module, Any]:
    """For each module with a config, the config by which its masks are made.

    It is that of the model around it, by whose attention function Transformers chooses the masks. A layer that was
    copied (by deepcopy, or by PEFT's layer replication) has a copy of this config. A module whose config is of another
    class than that of the model around it has its own.
    """
    configs: dict[nn.Module, Any] = {}

    def visit(module: nn.Module, around: Any) -> None:
        own = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel):
            around = own
        if hasattr(module, "config"):
            configs.setdefault(module, around if type(around) is type(own) else own)
        for child in module.children():
            visit(child, around)

    visit(model, None)
    return configs


def _is_known_norm(module: nn.Module) -> bool:
    found = found_of(module).get("rms_norm")
    return found is not None and bool(found.value)


def found_of(module: nn.Module) -> dict[str, Any]:
    """What `found_in` says of the module's stock class: for a patched module, what it said when the class was made."""
    return module._found if isinstance(module, Patched) else found_in(type(module))


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose config names our attention and which call it, by their names in `model`."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME
        and "attention" in found_of(module)
    }


def own_forward(module: nn.Module) -> str | None:
    """Why a module does not run the forward of its class, or None if it does."""
    if "forward" not in module.__dict__:
        return None
    return f"a forward is set on the instance: {source.name_of(module.__dict__['forward'])}"
