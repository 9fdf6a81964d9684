"""`report`: which operations of a model are ours, as the model is now.

A library may change a patched model: it sets a forward on an instance, makes a subclass, swaps a module, registers
hooks or another attention function. So `report` looks at what a call of each module would run, not at what `patch` did.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_kernels.core.checks import message
from llama_kernels.core.device import KERNEL_DEVICES
from llama_kernels.integrations.transformers import source
from llama_kernels.integrations.transformers.attention import NAME, attention_forward
from llama_kernels.integrations.transformers.classes import KINDS
from llama_kernels.integrations.transformers.documents import FOLLOWS_MASK
from llama_kernels.integrations.transformers.modules import PLAIN_TYPES, Patched, may_be_skipped, parts_of
from llama_kernels.integrations.transformers.places import Place, found_of, places_in
from llama_kernels.integrations.transformers.rotaries import is_kernelized

NOT_REPLACED = "patch has not replaced it"
_INTERFACE = "through AttentionInterface"
_DROPOUT = re.compile(r"dropout=(?:0\.0 if not self\.training else self\.([\w.]+)|self\.([\w.]+) if self\.training)")


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


def report(model: nn.Module) -> Report:
    """Which operations of `model` are ours and which are stock, as the model is now, and why.

    What a later change replaced counts as stock: a forward that another library set on a module, a module that was
    swapped, another attn_implementation, hooks that keep a fusion from running, float64 parameters, attention dropout
    in training mode. The reason names it. What only a call decides, such as its mask, is not seen.

    Returns:
        rows, which print as a table.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message("report", "model", f"a {type(model).__name__}", "a torch.nn.Module"))
    sharded = _is_sharded(model)
    return Report(rows_of(_as_it_runs(place, sharded) for place in _places_now(model)))


def rows_of(places: Iterable[Place]) -> tuple[Row, ...]:
    counts = Counter((KINDS.index(p.kind), type(p.module).__name__, p.ours, p.why) for p in places)
    return tuple(Row(KINDS[kind], cls, n, ours, why) for (kind, cls, ours, why), n in sorted(counts.items()))


def _places_now(model: nn.Module) -> Iterator[Place]:
    """`places_in`, and the modules whose attention a library has changed since `patch`."""
    yield from places_in(model, set(KINDS))
    for module in model.modules():
        if "attention" not in found_of(module) and hasattr(module, "config"):
            if _calls_interface(module):  # a subclass calls the forward of its base class
                yield Place(module, "attention", True, _INTERFACE)
            elif FOLLOWS_MASK in module.__dict__:
                yield Place(module, "attention", False, _replaced_by(module))


def _as_it_runs(place: Place, sharded: bool) -> Place:
    """`place` as a call would run it."""
    module: Any = place.module
    kind = place.kind
    if kind == "attention":
        replaced = getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME
        if not replaced and FOLLOWS_MASK in module.__dict__:
            return place._replace(ours=False, why=f"its config now names {module.config._attn_implementation!r}")
        why = _why_stock_attention(module)
    else:
        replaced = isinstance(module, Patched) and kind in parts_of(module)[0]
        why = _why_stock_operation(module, kind, sharded) if replaced else None
    if not replaced:
        return place._replace(ours=False, why=NOT_REPLACED if place.ours else place.why)
    return place._replace(ours=why is None, why=why or (_INTERFACE if kind == "attention" else "known code"))


def _why_stock_attention(module: nn.Module) -> str | None:
    """Why a module whose config names our attention does not run it, or None if it does."""
    if attention_forward not in source.chain_of(registered := ALL_ATTENTION_FUNCTIONS[NAME]):
        return f"{source.name_of(registered)} is registered under the name {NAME!r}"
    if not _calls_interface(module):
        return _replaced_by(module)
    found = found_of(module).get("attention")
    if found is not None and not found.value:
        return str(found.why)
    if (p := _dropout_of(module)) and module.training:
        return f"the model is in training mode, with attention dropout {p:g}"
    return _why_parameters_refused(module)


def _why_stock_operation(module: Any, kind: str, sharded: bool) -> str | None:
    """Why a module whose class runs our operation does not run it now, or None if it does."""
    if type(module)._our_forward not in _forwards(module):
        return _replaced_by(module)
    found = found_of(module)
    norms: dict[str, Any] = {name: getattr(module, name, None) for name in found[kind].norms}
    if called := [name for name, norm in norms.items() if not may_be_skipped(norm)]:
        return f"hooks, a wrapper or another forward on {' and '.join(called)}"
    rotaries = found["rope"].value if kind in ("rope", "qk_norm_rope") else {}
    if kernelized := [name for name, rotary in rotaries.items() if is_kernelized(rotary.replaced)]:
        return f"kernelize has replaced {kernelized[0]}"
    weights = [norm.known_weight() for norm in (norms.values() if norms else [module] if kind == "rms_norm" else [])]
    other = [type(weight).__name__ for weight in weights if weight is not None and type(weight) not in PLAIN_TYPES]
    if other and not sharded:
        return f"a weight of RMSNorm is a {other[0]}"
    return _why_parameters_refused(module)


def _forwards(module: nn.Module) -> Iterator[Any]:
    """The functions that a call of `module` runs as its forward, as far as its wrappers and super() show them."""
    functions = list(source.chain_of(module.forward))
    yield from functions
    if type(module).forward in functions:
        classes = [cls for cls in type(module).__mro__ if "forward" in vars(cls)]
        for cls, base in itertools.pairwise(classes):
            if "super" not in source.global_names(source.decorated(vars(cls)["forward"])[-1]):
                return
            yield from source.chain_of(vars(base)["forward"])


def _calls_interface(module: nn.Module) -> bool:
    return any(source.INTERFACE in source.global_names(function) for function in _forwards(module))


def _replaced_by(module: nn.Module) -> str:
    where = "set on the instance" if "forward" in module.__dict__ else "its class now has another"
    return f"a forward is {where}: {source.name_of(module.forward)}"


def _why_parameters_refused(module: nn.Module) -> str | None:
    parameters = list(module.parameters())
    if parameters and all(x.dtype is torch.float64 for x in parameters):
        return "its parameters are float64"
    devices = {x.device.type for x in parameters} - {*KERNEL_DEVICES, "meta"}
    return f"its parameters are on {min(devices)}" if devices else None


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a part of the model. It gathers the parameters of a module before a call."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _dropout_of(module: nn.Module) -> float:
    """The probability with which the attention of this module drops out weights while it trains."""
    stock: Any = parts_of(module)[1] if isinstance(module, Patched) else type(module)
    found = _DROPOUT.search(source.text_of(source.decorated(stock.forward)[-1]))
    return float(operator.attrgetter(found[1] or found[2])(module)) if found else 0.0
