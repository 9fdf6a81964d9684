"""Transformers' own tests of every model, for the families of tests/integrations. None of their code is here.

    pip download --no-deps --no-binary :all: transformers==5.24.0 && tar xzf transformers-5.24.0.tar.gz
    pip install parameterized
    for RUN in stock attention patch; do
        TRITON_INTERPRET=0 SUITE=transformers-5.24.0 RUN=$RUN python -m pytest -o addopts= --junitxml=build/$RUN.xml
        tests/regressions/witness/transformers_models.py
    done
    python -m tests.regressions.witness.transformers_models build/stock.xml build/patch.xml  # prints the differences

SUITE is an unpacked source distribution, of the installed version: its tests/test_modeling_common.py is loaded as a
package of another name than our `tests`, and what a source distribution leaves out is stood in for.

RUN is what the models of the suite run: `stock`; `attention`: our attention, chosen by name in their config; `patch`
(the default): all of ours, in each model that a test constructs or loads. Where a test asks for eager attention,
`patch` leaves attention as it is. So tests that compare eager attention with SDPA compare stock attention with ours.
With `patch`, each call of a model also compares its results with those of the stock model, for the same arguments.
FAMILIES=llama,qwen3 chooses families. docs/transformers.md says what passes.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
import types
import unittest
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, set_seed
from transformers.models.auto import modeling_auto

from llama_kernels.integrations.transformers import patch, report, unpatch
from llama_kernels.integrations.transformers.attention import NAME
from tests.integrations.families import EVERY_FAMILY, MULTIMODAL, S, batch, config_of

RUN = os.environ.get("RUN", "patch")
_PACKAGE = "transformers_tests"
_HEADS = ("", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQUENCE_CLASSIFICATION")

# --- the suite -------------------------------------------------------------------------------------------------------


class _StandIn(types.ModuleType):
    """A module that a source distribution leaves out: whatever is imported from it is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _suite() -> types.ModuleType:
    tests = Path(os.environ["SUITE"], "tests").resolve()
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[_PACKAGE] = package
    for name in ("exporters.test_export", "generation.test_utils", "distributed_testing_utils"):
        if not tests.joinpath(*name.split(".")).with_suffix(".py").exists():
            for part in (name.split(".")[0], name):
                sys.modules[f"{_PACKAGE}.{part}"] = _StandIn(f"{_PACKAGE}.{part}")
    return importlib.import_module(f"{_PACKAGE}.test_modeling_common")


class _Tester:
    """What the suite asks of a model's tester."""

    is_training, seq_length = True, S

    def __init__(self, family: str) -> None:
        self.family = family
        self.batch_size = len(batch(family).ids)
        text = config_of(family).get_text_config()
        self.hidden_size, self.num_hidden_layers = text.hidden_size, text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads

    def get_config(self) -> Any:
        config = config_of(self.family)
        if RUN == "attention":
            config._attn_implementation = NAME
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        inputs = batch(self.family).everything
        return self.get_config(), inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


def _classes(family: str) -> tuple[type[PreTrainedModel], ...]:
    """The model of the family and the models with a head."""
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING" if head else "MODEL_MAPPING") for head in _HEADS]
    found = [mapping[type(config_of(family))] for mapping in mappings if type(config_of(family)) in mapping]
    return tuple(dict.fromkeys(cls for entry in found for cls in (entry if isinstance(entry, tuple) else (entry,))))


def _runs(family: str) -> bool:
    """Whether RUN changes models of this family."""
    if RUN == "stock":
        return True
    with torch.device("meta"):
        model = _classes(family)[0](config_of(family))
    try:
        rows = report(patch(model)).rows
    except ValueError:  # nothing can be replaced
        return False
    return RUN == "patch" or all(row.ours for row in rows if row.kind == "attention")


def _test_of(family: str, suite: types.ModuleType) -> type[unittest.TestCase]:
    def set_up(self: Any) -> None:
        self.model_tester = _Tester(family)
        set_seed(0)  # the same weights and inputs in each run
        suite.global_rng.seed(0)

    members = {
        "setUp": set_up,
        "all_model_classes": _classes(family),
        "all_generative_model_classes": (),  # the generation suite is not in a source distribution
        "_is_composite": family in MULTIMODAL,
        "__module__": __name__,
    }
    return type(family, (suite.ModelTesterMixin, unittest.TestCase), members)


# --- patching what the suite makes -----------------------------------------------------------------------------------

_under_way: list[Any] = []  # the calls that make a model or run one


def _outermost(act: Callable[..., Any]) -> Any:
    """Decorates act(function, self, args, kwargs). In calls inside another call, the function runs alone."""

    def around(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _under_way or torch.compiler.is_compiling():
                return function(self, *args, **kwargs)
            _under_way.append(self)
            try:
                return act(function, self, args, kwargs)
            finally:
                _under_way.pop()

        return wrapper

    return around


@_outermost
def _patching(make: Any, cls_or_model: Any, args: Any, kwargs: Any) -> Any:
    """Call a constructor or from_pretrained, and patch the model."""
    result = make(cls_or_model, *args, **kwargs)
    model = cls_or_model if result is None else result[0] if isinstance(result, tuple) else result
    patch(model, attention=model.config._attn_implementation != "eager")
    return result


@_outermost
def _comparing(call: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """Call a model. Before, compare its results for this call with those of the stock model, both with random weights.

    The suite's own weights are so small that attention is nearly uniform. The difference may be a few times that which
    rounding the weights makes in stock's results.
    """
    if _can_be_compared(model):
        with torch.random.fork_rng(devices=()), torch.no_grad():
            ours = copy.deepcopy(model).eval()
            for parameter in _not_embeddings(ours):
                if parameter.ndim > 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            stock = unpatch(copy.deepcopy(ours))
            moved, eps = copy.deepcopy(stock), torch.finfo(model.dtype).eps
            for parameter in _not_embeddings(moved):
                parameter.mul_(1 + eps * torch.randn_like(parameter))
            mask = kwargs.get("attention_mask")
            models = (ours, stock, moved)
            results = [list(_tensors(call(m, *_copied(args), **_copied(kwargs)), mask)) for m in models]
        for got, want, near in zip(*results, strict=True):
            assert torch.equal(got.isnan(), want.isnan())
            off, rounding = ((x.double() - want.double()).nan_to_num().norm() for x in (got, near))
            allowed = 8 * rounding + 20 * eps * want.double().nan_to_num().norm()
            assert off <= allowed, f"off by {off:.2g} from stock's results, allowed {allowed:.2g}"
    return call(model, *args, **kwargs)


def _can_be_compared(model: Any) -> bool:
    """False on the meta device, and while the model holds tensors of a graph, as RecurrentGemma does in training."""
    held = [x for module in model.modules() for x in vars(module).values() if isinstance(x, torch.Tensor)]
    return not any(x.is_meta for x in model.parameters()) and all(x.is_leaf for x in held)


def _not_embeddings(model: nn.Module) -> list[nn.Parameter]:
    """The parameters without embeddings, in which some models look for the tokens of the inputs_embeds they get."""
    embeddings = {x for module in model.modules() if isinstance(module, nn.Embedding) for x in module.parameters()}
    return [x for x in model.parameters() if x not in embeddings]


def _copied(x: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf), x)


def _tensors(results: Any, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The floating-point tensors among the results of a model, without the rows of padding, which may hold anything."""
    if isinstance(results, torch.Tensor):
        if not results.is_floating_point():
            return
        if mask is None or mask.all():
            yield results
        elif results.shape[:2] == mask.shape:
            yield results[mask.bool()]
    elif isinstance(results, (dict, list, tuple)):
        for result in results.values() if isinstance(results, dict) else results:
            yield from _tensors(result, mask)


def _patch_all(classes: set[type[PreTrainedModel]]) -> None:
    for cls in classes:
        cls.__init__, cls.__call__ = _patching(cls.__init__), _comparing(cls.__call__)
    PreTrainedModel.from_pretrained = classmethod(_patching(PreTrainedModel.from_pretrained.__func__))


# --- differences between two runs ------------------------------------------------------------------------------------


def _outcomes(path: str) -> dict[str, str]:
    outcomes = {}
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname', '').rpartition('.')[2]} {case.get('name')}"
        outcomes[name] = kinds[0] if kinds else outcomes.get(name, "passed")
    return outcomes


def main(stock: str, other: str) -> None:
    before, after = _outcomes(stock), _outcomes(other)
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            print(f"{name}: {before[name]}, now {after[name]}")
    for path, outcomes in ((stock, before), (other, after)):
        print(path, {kind: list(outcomes.values()).count(kind) for kind in sorted(set(outcomes.values()))})


if __name__ == "__main__":
    main(*sys.argv[1:])
elif "SUITE" not in os.environ:
    pytest.exit("SUITE: wanted the folder of an unpacked source distribution of transformers", returncode=2)
else:
    _families = os.environ["FAMILIES"].split(",") if "FAMILIES" in os.environ else EVERY_FAMILY
    _common = _suite()
    _families = [name for name in _families if _runs(name)]
    globals().update({f"{name}_test": _test_of(name, _common) for name in _families})
    if RUN == "patch":
        _patch_all({cls for name in _families for cls in _classes(name)})
