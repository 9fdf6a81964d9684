"""Which operations of a module class can be replaced, and the subclass that a patched module gets."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import nn

from llama_kernels.integrations.transformers import attention_refusals, fusions, known_code, modules, rotaries, source
from llama_kernels.integrations.transformers.known_rotaries import Rotary

_OPAQUE = "a decorator of its forward does not expose the wrapped function"
KINDS = ("attention", "rms_norm", "rope", fusions.ADD_NORM, fusions.QK_NORM_ROPE)


class Functions(NamedTuple):
    """Every function of a class that `found_in` reads. They are its cache key, since someone may change them."""

    forward: Any
    inner: Any  # the forward without its decorators
    helpers: tuple[Any, ...]  # of a norm, of the rotary functions, and the eager attention


class Rotating(NamedTuple):
    """A function that a forward calls to rotate q and k, and the entry of known_rotaries.py that describes it."""

    replaced: Any
    known: Rotary


class Found(NamedTuple):
    """One kind of operation in a class, and whether ours can replace it."""

    value: Any  # what the replacement needs to know, such as a `Norm` or a `Fusion`; None or False: it stays stock
    why: str
    norms: tuple[str, ...] = ()  # of a fusion: the norm modules that it does not call


def found_in(cls: type) -> dict[str, Found]:
    """The operations of modules of this class, by kind. A class whose functions have changed is read again."""
    return _found_in(cls, _functions_of(cls))


def class_of(stock: type, kinds: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `stock` that runs our operations of `kinds`, which `found_in(stock)` must have found."""
    return _class_of(stock, kinds, _functions_of(stock))


def new_module(stock: type[nn.Module], kinds: tuple[str, ...]) -> nn.Module:
    """An empty module for pickle. It is patched where this process knows the code of `stock` too."""
    found = found_in(stock)
    kinds = tuple(kind for kind in kinds if kind in found and found[kind].value)
    cls = class_of(stock, kinds) if kinds else stock
    return cls.__new__(cls)


def _functions_of(cls: type) -> Functions:
    forward = getattr(cls, "forward", None)
    inner = source.decorated(forward)[-1]
    stock = [inner.__globals__[name] for name in _rotary_names(inner)]
    plain = [source.called_by(rotary) for rotary in stock]
    helpers = [rotary.__globals__.get(name) for rotary in plain for name in sorted(source.global_names(rotary))]
    eager = attention_refusals.eager_functions(inner)
    return Functions(forward, inner, (getattr(cls, "_norm", None), *stock, *plain, *helpers, *eager))


def _rotary_names(inner: Any) -> list[str]:
    names = source.global_names(inner)
    return sorted(name for name in names if "apply_" in name and "rotary" in name and name in inner.__globals__)


def _base_that_rotates(cls: type) -> type | None:
    """The nearest base class whose forward applies rotary embeddings."""
    bases = (base for base in cls.__mro__[1:] if "forward" in vars(base))
    return next((base for base in bases if _rotary_names(source.decorated(vars(base)["forward"])[-1])), None)


@functools.lru_cache(maxsize=1024)
def _found_in(cls: type, functions: Functions) -> dict[str, Found]:
    """`found_in`. functions: `_functions_of(cls)`."""
    forward, inner = functions.forward, functions.inner
    found: dict[str, Found] = {}
    if (norm := known_code.norm_of(cls)) is not None:
        found["rms_norm"] = Found(norm, "known code")
    elif cls.__name__.endswith("RMSNorm"):
        found["rms_norm"] = Found(None, "its forward is not known code")
    if names := _rotary_names(inner):
        found["rope"] = _rotary_in(forward, inner, names)
    elif (base := _base_that_rotates(cls)) is not None:
        found["rope"] = Found(None, f"its forward is not that of {base.__name__}")
    if source.INTERFACE in source.global_names(inner):
        reason = attention_refusals.why_other_attention(inner)
        found["attention"] = Found(reason is None, reason or "through AttentionInterface")
    for kind in (fusions.ADD_NORM, fusions.QK_NORM_ROPE):
        if (fusion := fusions.fusion_of(kind, source.text_of(inner))) is not None:
            found[kind] = _fused_in(forward, inner, fusion)
    return found


def _fused_in(forward: Any, inner: Any, fusion: fusions.Fusion) -> Found:
    """Whether a copy of `forward` can have the text of `fusion`. inner: `forward` without its decorators."""
    if fusion.text is None:
        return Found(None, "other statements come between the norms and RoPE", fusion.norms)
    if inner.__code__.co_freevars:
        return Found(None, "its forward uses variables of what is around it, as super() does", fusion.norms)
    if source.with_globals(forward, {}) is None:
        return Found(None, _OPAQUE, fusion.norms)
    return Found(fusion, "known code", fusion.norms)


def _rotary_in(forward: Any, inner: Any, names: list[str]) -> Found:
    """Whether the rotary functions `names`, which `inner` calls, are known. inner: `forward` without its decorators."""
    known = {}
    for name in names:
        stock = inner.__globals__[name]
        if (code := known_code.rotary_of(source.called_by(stock))) is None:
            return Found(None, f"{name} is not known code")
        known[name] = Rotating(stock, code)
    if source.with_globals(forward, {}) is None:
        return Found(None, _OPAQUE)
    return Found(known, "known code")


@functools.lru_cache(maxsize=1024)
def _class_of(stock: type, kinds: tuple[str, ...], functions: Functions) -> type[nn.Module]:
    """`class_of`. functions: `_functions_of(stock)`."""
    forward, found = functions.forward, _found_in(stock, functions)
    parts: dict[str, Any] = {
        "_kinds": kinds,
        "_found": found,
        "_stock_forward": forward,
        "_our_forward": modules.RMSNorm.forward,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
    }
    if "rms_norm" in kinds:
        return type(stock.__name__, (modules.RMSNorm, stock), {**parts, "known": found["rms_norm"].value})
    rotating = found["rope"].value if "rope" in kinds else {}
    names: dict[str, Any] = {name: rotaries.rotary_like(*rotary) for name, rotary in rotating.items()}
    ours: Any = source.with_globals(forward, names)
    if fusions.ADD_NORM in kinds:
        names["add_and_norm"] = modules.add_and_norm
        ours = fusions.fused_forward(forward, ours, found[fusions.ADD_NORM].value, names)
    if fusions.QK_NORM_ROPE in kinds:
        names["norm_and_rotate"] = rotaries.norm_and_rotary(*rotating["apply_rotary_pos_emb"])
        ours = fusions.fused_forward(forward, ours, found[fusions.QK_NORM_ROPE].value, names)
    return type(stock.__name__, (modules.Patched, stock), {**parts, "forward": ours, "_our_forward": ours})
